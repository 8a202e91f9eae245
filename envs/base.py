"""What an environment is: it opens with messages, answers each action with a turn, and is used once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pydantic import BaseModel, ConfigDict

from rlft.types import Message, Task, Turn


@dataclass(frozen=True)
class Action:
    """What the policy said, and how the engine stopped it ("stop" or "length")."""

    text: str
    finish: str


class Env(Protocol):
    """One episode of one task."""

    async def reset(self) -> tuple[Message, ...]:
        """The messages that open the episode."""
        ...

    async def step(self, action: Action) -> Turn:
        """The reply to one action."""
        ...

    async def close(self) -> None:
        """Called once, whatever happened."""
        ...


class EnvKnobs(BaseModel):
    """The knobs of an environment, and what a run has to know of it beforehand."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    def several(self) -> bool:
        """The policy may speak more than once in an episode."""
        return False

    @property
    def pays(self) -> bool:
        """It may reward the policy's moves itself."""
        return False

    @property
    def answers(self) -> int:
        """The most answers of one episode."""
        return 1

    @property
    def speaking(self) -> int:
        """How many roles speak in an episode; each may be another agent's."""
        return 1

    def room(self, asked: int, count: Callable[[str], int]) -> int:
        """The most tokens that it adds to a prompt of `asked` tokens; count: the tokens of a text."""
        return 0

    def build(self) -> Callable[[Task], Env]:
        """A function that makes a fresh environment for every episode. Raises InputError."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to build")


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with {name} replaced for every name in `values`; other braces stay as they are."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda found: values[found[1]], template)


def asked_again(messages: Sequence[Message], template: str, **values: str) -> Message:
    """The last message with its content put into the template as {prompt}, beside other values."""
    return {**messages[-1], "content": fill(template, {"prompt": str(messages[-1]["content"]), **values})}
