"""The environment that runs the code blocks of an answer and shows what they print, in an interpreter with a state.

Tool-integrated reasoning in the form of ToRA (Gou et al. 2023, arXiv:2309.17452) and START (arXiv:2503.04625): blocks
marked as Python are run, their output is the environment's, and an answer without one ends the episode.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Literal

from pydantic import Field, field_validator

from rlft.envs.base import Action, Env, EnvKnobs, fill, with_place
from rlft.envs.tools.base import cut
from rlft.envs.tools.hints import Hint, Hints
from rlft.envs.tools.python import Pieces, Sandboxed
from rlft.threads import Threads
from rlft.types import Message, Task, Turn

BLOCK = re.compile(r"^```[ \t]*(?:python3?|py)[ \t]*\n(.*?)^```", re.S | re.M | re.I)
MESSAGE = "```output\n{output}\n```\n"
NOTE = 60  # tokens of the notes beside an output


class Programs:
    """One question; each answer with code is followed by what the code prints."""

    def __init__(self, task: Task, knobs: PythonConfig, threads: Threads) -> None:
        self._task, self._knobs = task, knobs
        self._pieces = Pieces(knobs, threads)
        self._hints = Hints(knobs.hints)
        self._left = knobs.answers

    async def reset(self) -> tuple[Message, ...]:
        """The task's own messages, with the instructions in front."""
        return led(self._task.messages, self._knobs.instructions)

    async def step(self, action: Action) -> Turn:
        """What the code of the answer prints; the end where there is none, and no hint to give."""
        self._left -= 1
        if action.finish == "length":  # the episode ends here
            return Turn(metrics=self._pieces.metrics())
        blocks = BLOCK.findall(action.text)
        if blocks:
            told = "\n".join([await self._pieces.run(block) for block in blocks])
            said = fill(self._knobs.message, {"output": cut(told, self._knobs.longest)})
        else:
            said = self._hints.next(action.text)
        if said is None or self._left <= 0:
            return Turn(metrics=self._pieces.metrics())
        return Turn(({"role": "user", "content": said},), done=False, metrics=self._pieces.metrics())

    async def close(self) -> None:
        """The interpreter ends with the episode."""
        await self._pieces.close()


class PythonConfig(EnvKnobs, Sandboxed):
    """Run the code blocks of each answer and show what they print; names stay defined over the episode."""

    type: Literal["python"] = "python"
    most_answers: int = Field(default=4, ge=2, description="the most answers to one question")
    longest: int = Field(default=2000, ge=20, description="characters of the output that one answer is shown")
    message: str = Field(default=MESSAGE, description="how it is shown; {output} is what was printed")
    instructions: str = Field(default="", description="put in front of the task's first message")
    hints: tuple[Hint, ...] = Field(default=(), description="said in place of the end, where an answer has no code")

    @field_validator("message")
    @classmethod
    def _shows(cls, value: str) -> str:
        return with_place(value, "output")

    @property
    def several(self) -> bool:
        return True

    @property
    def answers(self) -> int:
        return self.most_answers

    def room(self, asked: int, count: Callable[[str], int]) -> int:
        shown = count(fill(self.message, {"output": "0" * self.longest})) + NOTE
        return count(self.instructions) + said_most(self.hints, self.answers, shown, count)

    def build(self) -> Callable[[Task], Env]:
        self.limits()
        threads = Threads(self.workers)
        return lambda task: Programs(task, self, threads)


def led(messages: tuple[Message, ...], text: str) -> tuple[Message, ...]:
    """The messages with a text in front of the first one, which every chat template takes."""
    if not text:
        return messages
    return ({**messages[0], "content": f"{text}\n\n{messages[0]['content']}"}, *messages[1:])


def said_most(hints: tuple[Hint, ...], answers: int, shown: int, count: Callable[[str], int]) -> int:
    """The most tokens that the world says between the answers: what a call gives, `shown`, or hints."""
    longer = sorted((count(hint.text) - shown for hint in hints), reverse=True)[: answers - 1]
    return (answers - 1) * shown + sum(max(0, more) for more in longer)
