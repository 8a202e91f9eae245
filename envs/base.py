"""What an environment is: it opens with messages, answers each action with a turn, and is used once."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from rlft.types import Message, Task, Turn


@dataclass(frozen=True)
class Action:
    """What the policy said, and how the engine stopped it ("stop" or "length"). raw: with the special tokens."""

    text: str
    finish: str
    raw: str = ""


class Env(Protocol):
    """One episode of one task. It may have an attribute `tools`, once it was reset: those that the policy may call, as
    the JSON schemas that chat templates take.
    """

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

    @property
    def rivals(self) -> bool:
        """The roles are paid each for itself, against each other, say: what one role said in an episode is a trajectory
        of its own, compared with what the same role said in the group's other episodes.
        """
        return False

    def room(self, asked: int, count: Callable[[str], int]) -> int:
        """The most tokens that it adds to a prompt of `asked` tokens; count: the tokens of a text."""
        return 0

    def build(self) -> Callable[[Task], Env]:
        """A function that makes a fresh environment for every episode. Raises InputError."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to build")

    def build_for(self, tokenizer: Any, template: str) -> Callable[[Task], Env]:
        """As `build`, for a model's tokenizer and its chat template, which is empty where it speaks plain text."""
        return self.build()


class Outside(EnvKnobs):
    """The knobs of environments of which a run knows only what it is told, and which may pay the policy themselves."""

    most_said: int = Field(
        default=0, ge=0, description="tokens of the environment's own messages that the context has room for"
    )

    @property
    def several(self) -> bool:
        return True

    @property
    def pays(self) -> bool:
        return True

    def room(self, asked: int, count: Callable[[str], int]) -> int:
        return self.most_said


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with {name} replaced for every name in `values`; other braces stay as they are."""
    names = "|".join(map(re.escape, values))
    return re.sub(rf"\{{({names})\}}", lambda found: values[found[1]], template)


def with_place(template: str, name: str) -> str:
    """A `message` that has a place {name}. Raises ValueError where it has none."""
    if f"{{{name}}}" not in template:
        raise ValueError(f"message: it has no {{{name}}}, so that nothing would be shown; put it where it belongs")
    return template


def asked_again(messages: Sequence[Message], template: str, **values: str) -> Message:
    """The last message with its content put into the template as {prompt}, beside other values."""
    return {**messages[-1], "content": fill(template, {"prompt": str(messages[-1]["content"]), **values})}
