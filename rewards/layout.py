"""Rewards for how an answer is laid out and whether it repeats itself. Shaping, never accuracy.

`tags` gives partial credit for every tag in its place, as DeepSeek-R1's format reward (arXiv:2501.12948) is commonly
softened for policies that begin without the format. `repetition` is the share of n-grams that were there before, which
Yeo et al. 2025 (arXiv:2502.03373) punish because length rewards are gamed by repeating.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from rlft.rewards.base import Config, each
from rlft.types import Reward, Trajectory

Tag = Annotated[str, StringConstraints(pattern=r"^\w+$")]


class Tags(Config):
    """The share of what the layout asks for: each opening and each closing tag once, and all of them in order.

    The last part, which counts as much as one tag, is the layout as a whole: <a>...</a><b>...</b>, something between
    each pair, and nothing but white space outside. Logs it as reward/<name>/whole.
    """

    type: Literal["tags"] = "tags"
    tags: list[Tag] = Field(
        default_factory=lambda: ["think", "answer"], min_length=1, description="Names of the tags, in order."
    )
    partial: bool = Field(default=True, description="Credit for parts. false: 1 if the whole layout holds, else 0.")
    opened: bool = Field(default=False, description="The prompt ends with the first opening tag; it is not repeated.")

    @model_validator(mode="after")
    def _each_once(self) -> Tags:
        twice = [tag for tag in self.tags if self.tags.count(tag) > 1]
        if twice:
            raise ValueError(f"tags: '{twice[0]}' stands there twice; name each tag once")
        return self

    def judge(self, name: str) -> Reward:
        marks = [mark for tag in self.tags for mark in (f"<{tag}>", f"</{tag}>")]
        wanted = [int(i > 0 or not self.opened) for i in range(len(marks))]

        def verdict(trajectory: Trajectory) -> float:
            text = trajectory.completion
            once = [text.count(mark) == count for mark, count in zip(marks, wanted, strict=True)]
            whole = all(once) and self._in_order(text)
            trajectory.metrics[f"reward/{name}/whole"] = float(whole)
            if not self.partial:
                return float(whole)
            held = sum(found for found, count in zip(once, wanted, strict=True) if count)
            return (held + whole) / (sum(wanted) + 1)

        return each(verdict)

    def _in_order(self, text: str) -> bool:
        """Nothing but the pairs in order, each with something in it. text: holds every mark once."""
        rest = text.strip()
        for i, tag in enumerate(self.tags):
            if i or not self.opened:
                before, _, rest = rest.partition(f"<{tag}>")
                if before.strip():
                    return False
            inner, closed, rest = rest.partition(f"</{tag}>")
            if not closed or not inner.strip():
                return False
        return not rest.strip()


class Repetition(Config):
    """Minus the share of n-grams that stand in the completion already, from 0 to nearly -1.

    Over all turns, within each of them. An answer of fewer than `n` tokens or words has 0. Logs the share as
    reward/<name>/repeated.
    """

    type: Literal["repetition"] = "repetition"
    n: int = Field(default=4, ge=1, description="Tokens or words of an n-gram.")
    unit: Literal["tokens", "words"] = Field(
        default="tokens", description="Tokens that the policy chose; or words, in small letters, between white space."
    )
    free: float = Field(
        default=0.0, ge=0, lt=1, description="Share that costs nothing; from there it falls to -1 at 1."
    )

    def judge(self, name: str) -> Reward:
        def verdict(trajectory: Trajectory) -> float:
            turns = _tokens(trajectory) if self.unit == "tokens" else _words(trajectory)
            grams = [tuple(turn[i : i + self.n]) for turn in turns for i in range(len(turn) - self.n + 1)]
            repeated = 1 - len(set(grams)) / len(grams) if grams else 0.0
            trajectory.metrics[f"reward/{name}/repeated"] = repeated
            return 0.0 - max(0.0, repeated - self.free) / (1 - self.free)

        return each(verdict)


def _words(trajectory: Trajectory) -> list[Sequence[Hashable]]:
    return [turn.text.casefold().split() for turn in trajectory.turns if turn.messages]


def _tokens(trajectory: Trajectory) -> list[Sequence[Hashable]]:
    """The tokens that the policy chose, each unbroken run of them by itself."""
    found: list[list[int]] = []
    for sample in trajectory.samples:
        before = False
        for token, chosen in zip(sample.tokens, sample.mask, strict=True):
            if chosen and not before:
                found.append([])
            if chosen:
                found[-1].append(token)
            before = chosen
    return list(found)
