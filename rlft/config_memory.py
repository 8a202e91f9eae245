"""The config's block on memory, see docs/memory.md."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlft.config_data import Block


class Memory(Block):
    """What is said before a run that will not fit into memory."""

    check: Literal["warn", "refuse", "off"] = Field(
        default="warn", description="warn: say so and go on; refuse: only what is well above it; off: no prediction"
    )
    limit: float | None = Field(default=None, gt=0, description="GB to stay within; default: what the machine has free")
