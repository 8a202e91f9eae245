"""An adapter that changes nothing: how an engine with hot-loaded adapters serves the policy before training.

A request without an adapter would be the plain way, but vLLM's kernels for a CPU give it the last adapter there is
(0.32: the slot of "none" is -1, and they index with it), so the reference's samples would silently be the policy's.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rlft.lock import Scratch

NAME = "adapter_model.safetensors"
PRODUCT = (".lora_B", ".lora_embedding_B")  # the second factor, of a layer and of an embedding


@contextlib.contextmanager
def without_effect(folder: Path) -> Iterator[Path]:
    """A PEFT LoRA adapter of the same shape whose product is exactly 0, in a folder that is removed afterwards."""
    with Scratch("rlft-adapter-none") as empty:
        shutil.copy(folder / "adapter_config.json", empty)
        tensors = load_file(folder / NAME)
        zeros = {name: torch.zeros_like(t) if any(b in name for b in PRODUCT) else t for name, t in tensors.items()}
        save_file(zeros, empty / NAME)
        yield empty
