"""How long the completion is as a reader counts: in words, sentences, paragraphs or characters, not tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from pydantic import Field, model_validator

from rlft.rewards.base import Config
from rlft.rewards.pooled import Verdict, pooled
from rlft.rewards.sentences import sentences, words_in
from rlft.types import Reward, Trajectory

COUNTS: dict[str, Callable[[str], int]] = {
    "words": lambda text: len(words_in(text)),
    "sentences": lambda text: len(sentences(text)),
    "paragraphs": lambda text: len([part for part in re.split(r"\n\s*\n", text) if part.strip()]),
    "characters": lambda text: len(text.strip()),
}


class TextLength(Config):
    """1 if the completion has a number of words, sentences, paragraphs or characters in a range, else 0.

    Logged: reward/<name>/count, how many it has; an empty completion has 0 of each.
    """

    type: Literal["text_length"] = "text_length"
    unit: Literal["words", "sentences", "paragraphs", "characters"] = Field(
        default="words",
        description="`words`: runs of letters and digits, so that don't is two. `sentences`: by nltk's rules for "
        "English. `paragraphs`: with an empty line between them. `characters`: with white space, but at the ends.",
    )
    at_least: int = Field(default=0, ge=0, description="How many at least.")
    at_most: int | None = Field(default=None, ge=0, description="How many at most. As many as there are unless given.")
    outside: Literal["zero", "falling"] = Field(
        default="zero",
        description="What a number outside the range has: 0, or how near it is to the range: half of `at_least`, and "
        "twice `at_most`, have 0.5.",
    )

    @model_validator(mode="after")
    def _a_range(self) -> TextLength:
        if not self.at_least and self.at_most is None:
            raise ValueError("set `at_least`, `at_most` or both: how long the completion is to be")
        if self.at_most is not None and self.at_most < self.at_least:
            raise ValueError(
                f"at_most ({self.at_most}) is less than at_least ({self.at_least}): nothing would be right"
            )
        return self

    def judge(self, name: str) -> Reward:
        count = COUNTS[self.unit]
        count("Once.")  # so that a library that is not installed is missed before the run begins

        def verdict(trajectory: Trajectory) -> Verdict:
            number = count(trajectory.completion)
            near = self.near(number)
            return (near if self.outside == "falling" else float(near == 1.0)), {"count": float(number)}

        return pooled(verdict, name)

    def near(self, number: int) -> float:
        """1 inside the range, else the ratio of the number and the end that it has missed, from 0 to 1."""
        if number < self.at_least:
            return number / self.at_least
        if self.at_most is not None and number > self.at_most:
            return self.at_most / number
        return 1.0
