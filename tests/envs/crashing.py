"""A Gymnasium environment around one of the library's that ends its process, as a native library may."""

from __future__ import annotations

import os
from typing import Any

import gymnasium  # pyright: ignore[reportMissingImports]


class Crashing(gymnasium.Wrapper):
    """FrozenLake, whose move 1 aborts."""

    def __init__(self, **options: Any) -> None:
        super().__init__(gymnasium.make("FrozenLake-v1", **options))

    def step(self, action: int) -> Any:
        if action == 1:
            os.abort()
        return super().step(action)


gymnasium.register("Crashing-v0", entry_point=Crashing)
