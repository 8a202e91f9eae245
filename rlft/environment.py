"""What a run's numbers depend on beside its config: the machine, the packages, the data; and what differs now.

Noted in `environment.json` when a session of the run begins, one entry per session. `rlft doctor RUN_DIR` compares.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

import rlft
from rlft.config import Config
from rlft.models import locate
from rlft.types import InputError
from rlft.whole import replacing

FILE = "environment.json"
WHOLE = 2**28  # bytes; of a larger file only the size and the first so many are hashed
VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG")
Facts = dict[str, Any]


def note(folder: Path, config: Config, start: int) -> None:
    """Add a session that goes on after step `start`; the file is replaced as a whole."""
    path = folder / FILE
    sessions = [session for session in read(folder) if session["start"] < start]
    with replacing(path) as scratch:
        scratch.write_text(json.dumps([*sessions, {"start": start, **facts(config)}], indent=1, ensure_ascii=False))


def read(folder: Path) -> list[Facts]:
    """The sessions of a run, oldest first; empty where none was noted."""
    path = folder / FILE
    try:
        return json.loads(path.read_text()) if path.is_file() else []
    except ValueError as error:
        raise InputError(f"{path}: this is not readable as JSON: {error}") from error


def facts(config: Config) -> Facts:
    """This machine, as flat facts by topic, and the lock: a hash over every installed package and its version."""
    places = [place for place in sys.path if Path(place).name != "_vendor"]  # setuptools adds its own when it is used
    packages = {d.metadata["Name"].lower(): d.version for d in distributions(path=places) if d.metadata["Name"]}
    listed = "\n".join(f"{name}=={packages[name]}" for name in sorted(packages))
    return {
        "machine": _machine(),
        "lock": hashlib.sha256(listed.encode()).hexdigest(),
        "packages": dict(sorted(packages.items())),
        "files": dict(files(config)),
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for everything that is not as it was; the lock's line counts the packages, which follow."""
    lines = []
    moved = {topic: _moved(then[topic], now[topic]) for topic in ("machine", "packages", "files")}
    lines += [f"{name}: {_said(a)} then, {_said(b)} now" for name, a, b in moved["machine"]]
    if then["lock"] != now["lock"]:
        count = len(moved["packages"])
        lines.append(f"lock: {then['lock'][:12]} then, {now['lock'][:12]} now; {count} package(s) differ")
    lines += [f"package {name}: {_said(a)} then, {_said(b)} now" for name, a, b in moved["packages"]]
    lines += [f"file {name}: its content is another" if b else f"file {name}: gone" for name, a, b in moved["files"]]
    return lines


def files(config: Config) -> Iterator[tuple[str, str]]:
    """Every file that the config names, with its SHA-256: data, templates, rewards, adapters, the model's folder."""
    model = config.model.path
    with contextlib.suppress(InputError):  # gone since the run; it is then missing below
        model = str(locate(model))
    for key, text in [*_texts(config.model_dump(mode="json")), ("model.path", model)]:
        path = Path(text if os.path.exists(text) else text.partition(":")[0])  # module.py:function, too
        if key in ("out", "name") or not os.path.exists(path) or path == Path():
            continue
        if path.is_file():
            yield key, _hash(path)
        elif (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
            yield from ((f"{key}/{p.name}", _hash(p)) for p in sorted(path.iterdir()) if p.is_file())


def _machine() -> Facts:
    gpu = torch.cuda.is_available()
    return {
        "rlft": rlft.__version__,
        "rlft's code": _code(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        **{name: os.environ.get(name) for name in VARIABLES},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _code() -> str:
    """A hash over rlft's own modules."""
    root = Path(rlft.__file__).parent
    total = hashlib.sha256()
    for path in sorted({*root.rglob("*.py"), *(p for below in _linked(root) for p in below.rglob("*.py"))}):
        total.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return total.hexdigest()[:12]


def _linked(root: Path) -> list[Path]:
    """Packages inside rlft that are links, which `rglob` does not follow."""
    return [path for path in root.iterdir() if path.is_symlink() and path.is_dir()]


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in nested settings, by its dotted key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inside in value.items():
            yield from _texts(inside, f"{key}.{name}" if key else str(name))


def _hash(path: Path) -> str:
    size, total = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        left = WHOLE
        while left > 0 and (block := file.read(min(left, 2**22))):
            total.update(block)
            left -= len(block)
    if size > WHOLE:
        total.update(str(size).encode())
    return total.hexdigest()


def _moved(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    names = dict.fromkeys([*then, *now])
    return [(name, then.get(name), now.get(name)) for name in names if then.get(name) != now.get(name)]


def _said(value: Any) -> str:
    return "none" if value is None else str(value)
