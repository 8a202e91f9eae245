"""Rewards for how a completion is written, whatever it says: its format and its length. Shaping, never accuracy."""

from __future__ import annotations

import re
from typing import Literal

import regex
from pydantic import Field, ValidationInfo, field_validator

from rlft.rewards.base import Config, each
from rlft.rewards.pooled import Verdict, pooled
from rlft.types import Reward, Trajectory


class Format(Config):
    """1 if the completion matches a regular expression, else 0.

    It is matched by the module regex, which reads what Python's `re` accepts and can be stopped: an expression with a
    repetition in a repetition may take years on an answer that nearly matches, and `re` would hold up the whole run.
    """

    type: Literal["format"] = "format"
    pattern: str = Field(
        description="Regular expression of Python's `re`. Begin it with (?s) to let the dot match line ends too."
    )
    full: bool = Field(
        default=True,
        description="The whole completion must match, without the white space at its ends. false: a part is enough.",
    )
    seconds: float = Field(
        default=5.0, gt=0, allow_inf_nan=False, description="For one completion. One that takes longer has failed."
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a valid regular expression: {error}") from error
        return pattern

    def judge(self, name: str) -> Reward:
        pattern = regex.compile(self.pattern)
        limits = {"timeout": self.seconds, "concurrent": True}

        def verdict(trajectory: Trajectory) -> Verdict:
            text = trajectory.completion
            found = pattern.fullmatch(text.strip(), **limits) if self.full else pattern.search(text, **limits)
            return float(found is not None), {}

        return pooled(verdict, name, seconds=10 * self.seconds + 60)


class Length(Config):
    """1 up to `free` tokens, falling on a straight line to 0 at `limit` tokens and beyond.

    Counted are the tokens that the policy chose, over all turns. For a penalty, give it a weight: the score then
    loses up to `weight`.
    """

    type: Literal["length"] = "length"
    free: int = Field(default=0, ge=0, description="Tokens up to which the value is 1.")
    limit: int = Field(description="Tokens from which on the value is 0. Larger than `free`.")

    @field_validator("limit")
    @classmethod
    def _above_free(cls, limit: int, info: ValidationInfo) -> int:
        free = info.data.get("free", 0)
        if limit <= free:
            raise ValueError(f"limit ({limit}) must be larger than free ({free}): between them the value falls to 0")
        return limit

    def judge(self, name: str) -> Reward:
        def verdict(trajectory: Trajectory) -> float:
            left = (self.limit - trajectory.length) / (self.limit - self.free)
            return min(1.0, max(0.0, left))

        return each(verdict)
