"""vLLM starts beside numba, whose objects its search through all modules would stumble over."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

import pytest

from rlft.engine.scan import scan_plain_objects


def test_what_keeps_no_dict_is_passed_over() -> None:
    ffi = pytest.importorskip("llvmlite.binding").ffi
    importlib.import_module("numba")
    assert not isinstance(vars(ffi.lib), Mapping), "else there is nothing to pass over any more"
    scan_plain_objects()
    dispatcher = importlib.import_module("vllm.triton_utils.dispatcher")
    assert dispatcher.vars(ffi.lib) == {}
    assert dispatcher.vars(scan_plain_objects) == {}
    held = type("Held", (), {})()
    setattr(held, "kernel", 1)  # noqa: B010
    assert dispatcher.vars(held) == {"kernel": 1}
