"""vLLM beside numba: as an engine starts, vLLM looks through what every module holds, and takes what `vars` gives for a
dict. llvmlite's library object gives another thing, so that no engine starts once numba is imported (bm25s does that).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping
from typing import Any


def scan_plain_objects() -> None:
    """Let vLLM's search pass over objects that keep no dict. A vLLM without that search is left as it is."""
    with contextlib.suppress(ImportError):
        importlib.import_module("vllm.triton_utils.dispatcher").vars = _held  # type: ignore[attr-defined]


def _held(value: Any) -> Mapping[str, Any]:
    found: Any = vars(value)
    return found if isinstance(found, Mapping) else {}
