"""The config's block on memory, see docs/memory.md."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlft.config_data import Block


class Memory(Block):
    """What is done with freed memory, and said before a run that will not fit."""

    check: Literal["warn", "refuse", "adapt", "off"] = Field(
        default="warn",
        description="warn: say so and go on; refuse: only what is well above it; adapt: take the cheapest change that "
        "costs time alone; off: no prediction",
    )
    keep: bool = Field(
        default=True,
        description="on a CPU, what is freed stays with the process: faster, but it takes more memory to learn",
    )
    limit: float | None = Field(default=None, gt=0, description="GB to stay within; default: what the machine has free")
