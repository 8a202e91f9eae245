"""How long the thinking is, held against a budget: length-controlled policy optimization.

L1 (Aggarwal and Welleck 2025, arXiv:2503.04697). The paper counts the whole answer, which is nearly all thinking; here
what comes after the last closing tag is left out, so that the answer itself costs nothing.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from rlft.rewards.base import Config, each
from rlft.rewards.parts import TAG_HELP, split
from rlft.types import InputError, Reward, Task, Trajectory


class Thinking(Config):
    """How well the thinking, all that stands before the last closing tag, keeps to a budget of n tokens.

    `exact`: -scale * |budget - n|; in a sum with a verifier it is LCPO-Exact. `most`: scale * (budget - n) + start, cut
    to [0, 1]; in a gate behind a verifier it is LCPO-Max. Where nothing is closed, or something is opened after it, all
    of the answer is thinking: to leave the tags out saves nothing. Logs n as reward/<name>/length and n - budget as
    reward/<name>/over.

    Tokens of a part of the text cannot be counted without the policy's tokenizer, so they are estimated: the tokens of
    the last answer times the part's share of its characters, white space left out. Words and characters are counted.
    """

    type: Literal["thinking"] = "thinking"
    budget: int | None = Field(default=None, ge=1, description="The same for every task. Either this or `column`.")
    column: str | None = Field(default=None, min_length=1, description="Column of the task that holds its budget.")
    mode: Literal["exact", "most"] = Field(default="exact", description="Meet the budget, or stay below it.")
    scale: float = Field(default=0.0003, gt=0, allow_inf_nan=False, description="What one token off costs.")
    start: float = Field(default=0.5, ge=0, le=1, description="Under `most`, the value at the budget itself.")
    unit: Literal["tokens", "words", "characters"] = Field(default="tokens", description="What is counted.")
    tag: str = Field(default="think", pattern=r"^\w+$", description=TAG_HELP)

    @model_validator(mode="after")
    def _one_budget(self) -> Thinking:
        if (self.budget is None) == (self.column is None):
            raise ValueError("set either budget, one for all tasks, or column, where each task has its own")
        return self

    def check(self, task: Task) -> None:
        """As for every reward: there is a budget."""
        self._budget(task)

    def judge(self, name: str) -> Reward:
        def verdict(trajectory: Trajectory) -> float:
            budget, n = self._budget(trajectory.task), self._length(trajectory)
            trajectory.metrics[f"reward/{name}/length"] = n
            trajectory.metrics[f"reward/{name}/over"] = n - budget
            if self.mode == "exact":
                return 0.0 - self.scale * abs(budget - n)
            return min(1.0, max(0.0, self.scale * (budget - n) + self.start))

        return each(verdict)

    def thought(self, text: str) -> str:
        """The thinking in a completion, without the tags."""
        return split(text, self.tag)[0].replace(f"<{self.tag}>", "").replace(f"</{self.tag}>", "")

    def _length(self, trajectory: Trajectory) -> float:
        text = trajectory.completion
        thought = self.thought(text)
        if self.unit == "words":
            return float(len(thought.split()))
        if self.unit == "characters":
            return float(len(thought))
        return _last_answer(trajectory) * _printed(thought) / max(_printed(text), 1)

    def _budget(self, task: Task) -> float:
        if self.budget is not None:
            return float(self.budget)
        value = task.info.get(self.column or "")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(
                f"task '{task.id}': column '{self.column}' holds {value!r}, not a budget above 0. Repair that row, or "
                "set the reward's `column` to the column that holds the budget"
            )
        return float(value)


def _printed(text: str) -> int:
    """Characters that are no white space."""
    return sum(map(len, text.split()))


def _last_answer(trajectory: Trajectory) -> int:
    """Tokens of the last answer."""
    if not trajectory.turns:
        return 0
    turn = trajectory.turns[-1]
    mask = trajectory.samples[turn.sample].mask[: turn.end + 1]
    return next((n for n, chosen in enumerate(reversed(mask)) if not chosen), len(mask))
