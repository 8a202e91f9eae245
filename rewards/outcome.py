"""What the world itself says of an episode: won, solved, how far it came."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rlft.rewards.base import Config, each
from rlft.types import Reward, Trajectory


class Outcome(Config):
    """A number that the environment reports of its episode, such as whether it was won."""

    type: Literal["outcome"] = "outcome"
    metric: str = Field(default="success", min_length=1, description="Its name, logged as env/<name>.")
    otherwise: float | None = Field(
        default=0.0,
        allow_inf_nan=False,
        description="The value where it reports none, since a limit ended the episode first, say. None: no score.",
    )

    def judge(self, name: str) -> Reward:
        def reported(trajectory: Trajectory) -> float | None:
            return trajectory.metrics.get(f"env/{self.metric}", self.otherwise)

        return each(reported)
