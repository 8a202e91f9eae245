"""The named environments. A config builds a function from a task to a fresh environment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict

from rlft.envs.base import Env
from rlft.envs.single_turn import SingleTurn
from rlft.types import Task


class SingleTurnConfig(BaseModel):
    """Ask once; the reward judges the answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["single_turn"] = "single_turn"

    def build(self) -> Callable[[Task], Env]:
        return SingleTurn


EnvConfig = SingleTurnConfig


def names() -> list[str]:
    """The names that `env.type` accepts."""
    return ["single_turn"]
