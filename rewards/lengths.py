"""Rewards for how long a completion is, some of them by whether it is right. Lengths count the tokens that the policy
chose, over all turns.

`cosine` makes the price of a token depend on whether the answer is right (Yeo et al. 2025, "Demystifying long
chain-of-thought", arXiv:2502.03373), `relative_length` compares right and wrong answers with the rest of
their group (Kimi k1.5, 2025, arXiv:2501.12599), `overlong` is a soft edge before the limit (DAPO, Yu et
al. 2025, arXiv:2503.14476, eq. 13).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from rlft.rewards.base import Config, each
from rlft.rewards.inside import Holding, bare
from rlft.types import Group, Reward, Trajectory, least

if TYPE_CHECKING:
    from rlft.rewards.catalog import RewardConfig


class ByRight(Holding):
    """A value by how long an answer is and whether another reward says it is right, where its verdict is 1 or more.

    No score where the other reward has none. Logs the share of right answers as reward/<name>/right.
    """

    of: RewardConfig = Field(
        description="The reward that says whether the answer is right. Its weight does not matter."
    )
    at_least: float = Field(
        default=1.0, allow_inf_nan=False, description="The other reward's verdict from which on the answer is right."
    )

    def judge(self, name: str) -> Reward:
        inner = bare(self.of).build(f"{name}/of")

        async def judge(group: Group) -> list[float | None]:
            verdicts = await inner(group)
            lengths = [trajectory.length for trajectory in group]
            found: list[float | None] = []
            for trajectory, verdict, length in zip(group, verdicts, lengths, strict=True):
                trajectory.metrics.pop(f"reward/{name}/right", None)
                if verdict is None:
                    found.append(None)
                    continue
                right = verdict >= least(self.at_least)
                trajectory.metrics[f"reward/{name}/right"] = float(right)
                found.append(self.value(right, length, min(lengths), max(lengths)))
            return found

        return judge

    def value(self, right: bool, length: int, shortest: int, longest: int) -> float:
        """What an answer of this length is worth. shortest, longest: in its group."""
        raise NotImplementedError(f"{type(self).__name__} does not say what a length is worth")

    def components(self, name: str | None = None) -> list[str]:
        name = name or self.type
        return [*self.of.components(f"{name}/of"), name]

    def called(self, name: str | None) -> list[tuple[str | None, Config]]:
        return [(f"{name or self.type}/of", self.of)]


class Cosine(ByRight):
    """A value by length: a right answer is better short, a wrong one better long, each along half a cosine.

    The shape is the paper's, which lets wrong answers go on looking. Choose the values so that every right answer is
    above every wrong one.
    """

    type: Literal["cosine"] = "cosine"
    limit: int = Field(ge=1, description="Tokens at which an answer is too long, usually rollout.sampling.max_tokens.")
    right_short: float = Field(default=2.0, allow_inf_nan=False, description="Of a right answer without tokens.")
    right_long: float = Field(default=1.0, allow_inf_nan=False, description="Of a right answer near the limit.")
    wrong_short: float = Field(default=-1.0, allow_inf_nan=False, description="Of a wrong answer without tokens.")
    wrong_long: float = Field(default=0.0, allow_inf_nan=False, description="Of a wrong answer near the limit.")
    beyond: float = Field(default=-1.0, allow_inf_nan=False, description="At the limit and beyond, right or wrong.")

    def value(self, right: bool, length: int, shortest: int, longest: int) -> float:
        if length >= self.limit:
            return self.beyond
        short, long = (self.right_short, self.right_long) if right else (self.wrong_short, self.wrong_long)
        return long + (short - long) * (1 + math.cos(math.pi * length / self.limit)) / 2


class RelativeLength(ByRight):
    """From 0.5 for the shortest answer of the group to -0.5 for the longest; a wrong answer has no more than 0.

    0 where all are equally long, and for an answer alone, as in evaluation. It says how long, not how right: sum it
    with a verifier.
    """

    type: Literal["relative_length"] = "relative_length"

    def value(self, right: bool, length: int, shortest: int, longest: int) -> float:
        if shortest == longest:
            return 0.0
        share = 0.5 - (length - shortest) / (longest - shortest)
        return share if right else min(0.0, share)


class Overlong(Config):
    """0 until `margin` tokens before `limit`, falling on a straight line to -1 at the limit and beyond.

    DAPO's soft overlong punishment, L_max being `limit` and L_cache `margin`, as the algorithm `dapo` has it in
    `overlong_limit` and `overlong_buffer`; here for every algorithm. Logs the share of answers that lose something as
    reward/<name>/over.
    """

    type: Literal["overlong"] = "overlong"
    limit: int = Field(ge=1, description="Tokens from which on the value is -1.")
    margin: int = Field(ge=1, description="Tokens before that, over which it falls from 0. No more than `limit`.")

    @model_validator(mode="after")
    def _fits(self) -> Overlong:
        if self.margin > self.limit:
            raise ValueError(f"margin ({self.margin}) must not be larger than limit ({self.limit})")
        return self

    def judge(self, name: str) -> Reward:
        def verdict(trajectory: Trajectory) -> float:
            over = max(0, trajectory.length - (self.limit - self.margin))
            trajectory.metrics[f"reward/{name}/over"] = float(over > 0)
            return 0.0 - min(1.0, over / self.margin)

        return each(verdict)
