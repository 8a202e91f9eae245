"""Hints: what the environment says in place of ending the episode, to suggest a tool where none was used.

START (Li et al. 2025, arXiv:2503.04625) puts such texts behind words like "Wait" and at the end of an answer, and
learns from the answers that follow. They are the environment's, so no loss is on them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, Field, field_validator


class Hint(BaseModel):
    """One hint, given at most once in an episode, to an answer that uses no tool."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    text: str = Field(min_length=1, description="what is said")
    at: str | None = Field(
        default=None,
        description="a regular expression for the end of such an answer, with rollout.sampling.stop for words that it "
        "is to stop at; none: any",
    )

    @field_validator("at")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
            at_end(value or "")  # where more may be wrong: flags that have to stand first
        except re.error as error:
            raise ValueError(f"{value!r} is no regular expression: {error}") from error
        return value


class Hints:
    """The hints of one episode, in their order."""

    def __init__(self, hints: Sequence[Hint]) -> None:
        self._left = list(hints)

    def next(self, answer: str) -> str | None:
        """The first one left that suits an answer without a call; None where the episode may end."""
        for hint in self._left:
            if hint.at is None or at_end(hint.at).search(answer):
                self._left.remove(hint)
                return hint.text
        return None


def at_end(expression: str) -> re.Pattern[str]:
    """The expression for the end of a text, white space left out. Raises re.error."""
    return re.compile(f"(?:{expression})\\s*\\Z")
