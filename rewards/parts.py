"""Which part of an answer a reward reads: all of it, the thinking, or what comes after that."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from rlft.rewards.base import Config
from rlft.types import Trajectory

TAG_HELP = "The thinking stands in <tag> and </tag>."


class OfPart(Config):
    """What rewards share that may be asked about the thinking and the answer apart."""

    part: Literal["whole", "thinking", "answer"] = Field(
        default="whole",
        description="What is read: all of the completion; what stands before the last closing tag; what comes after.",
    )
    tag: str = Field(default="think", pattern=r"^\w+$", description=TAG_HELP)

    def read(self, trajectory: Trajectory) -> str:
        """The part of the completion, without the tags around thinking and answer, which are words of no language."""
        thinking, answer = split(trajectory.completion, self.tag)
        text = {"whole": trajectory.completion, "thinking": thinking, "answer": answer}[self.part]
        return re.sub(rf"</?(?:{self.tag}|answer)>", " ", text)


def split(text: str, tag: str) -> tuple[str, str]:
    """The thinking, with its tags but for the last, and what comes after it.

    All that stands before the last closing tag is thinking. Where nothing is closed, or something is opened after it,
    all of the text is, so that nothing can be hidden by leaving the tags out.
    """
    opening, closing = f"<{tag}>", f"</{tag}>"
    before, closed, after = text.rpartition(closing)
    return (before, after) if closed and opening not in after else (text, "")
