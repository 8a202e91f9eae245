"""Two answers to one question: a pioneer's, and that of an observer who is shown the pioneer's.

CORY (Ma et al. 2024, arXiv:2410.06101, equation 3): a1 from pi(. | s0), a2 from pi(. | s0, a1). The two answers are two
samples of one trajectory, so a credit that looks at totals gives both the sum of both verdicts (equation 4) where the
reward is paid for every turn. The paper trains two copies of the model, and exchanges their roles every five steps so
that each learns both prompts: `agents: {count: 2, exchange: 5}` in a config. With one agent both roles are the same
weights, which play both in every step, and there is nothing to exchange. Afterwards one policy is used, on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from pydantic import Field

from rlft.envs.base import Action, Env, EnvKnobs, asked_again
from rlft.types import Message, Task, Turn

REFERENCE = "{prompt}\nReference: {answer}\nAnswer:"
OBSERVER = 1  # the pioneer opens, in role 0


class PioneerObserver:
    """The task's question, then the question with the first answer as a reference."""

    def __init__(self, task: Task, message: str) -> None:
        self._task = task
        self._message = message
        self._observed = False

    async def reset(self) -> tuple[Message, ...]:
        """The pioneer's prompt: the task's own messages."""
        return self._task.messages

    async def step(self, action: Action) -> Turn:
        """The observer's prompt in place of the pioneer's conversation; over after the observer's answer."""
        if self._observed:
            return Turn()
        self._observed = True
        shown = asked_again(self._task.messages, self._message, answer=action.text)
        return Turn((*self._task.messages[:-1], shown), done=False, rewrite=True, role=OBSERVER)

    async def close(self) -> None:
        """Nothing to close."""


class PioneerObserverConfig(EnvKnobs):
    """Two answers: the second by a policy that is shown the first one as a reference."""

    type: Literal["pioneer_observer"] = "pioneer_observer"
    message: str = Field(
        default=REFERENCE,
        pattern=r"(?s)\{answer\}",
        description="the observer's question; {prompt} is the pioneer's, {answer} what the pioneer answered",
    )

    @property
    def several(self) -> bool:
        return True

    @property
    def answers(self) -> int:
        return 2

    @property
    def speaking(self) -> int:
        return 2

    def room(self, asked: int, count: Callable[[str], int]) -> int:
        return count(self.message) + max(0, self.message.count("{prompt}") - 1) * asked

    def build(self) -> Callable[[Task], Env]:
        return partial(PioneerObserver, message=self.message)
