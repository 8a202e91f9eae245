"""What our own worlds share. A world is plain Python: it opens with a text, and answers each text with a move.

All that is random in an episode comes from `task.info["seed"]`, or from the task's id where there is none: the same row
is the same episode, in a resumed run and in every evaluation.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from rlft.envs.base import Action, Env, EnvKnobs
from rlft.types import Message, Task, Turn

NUMBER = re.compile(r"(?<![\w.])-?[0-9]{1,12}(?![\w]|\.[0-9])")
GROUPED = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")  # the comma of 1,000


@dataclass(frozen=True)
class Move:
    """What comes of one answer. said: shown to the policy, if it goes on. won: None while it goes on. fit: it was a
    move at all, and no text that the world could not read."""

    said: str = ""
    reward: float = 0.0
    won: bool | None = None
    fit: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict)


class World(Protocol):
    """One game. It never raises, whatever text it is given."""

    def opening(self) -> str:
        """The question that opens it."""
        ...

    def move(self, text: str) -> Move:
        """What comes of an answer."""
        ...


class Played:
    """A world as an environment. It reports `success` (1 or 0) and `malformed`, the answers that were no moves.

    late: paid at the end of an episode that the limit of turns ended.
    """

    def __init__(self, task: Task, world: Callable[[random.Random], World], turns: int, late: float = 0.0) -> None:
        self._system = tuple(message for message in task.messages if message["role"] == "system")
        self._world = world(random.Random(f"{task.info.get('seed', task.id)}"))
        self._left = turns
        self._late = late
        self._malformed = 0

    async def reset(self) -> tuple[Message, ...]:
        """The task's system message, if any, and the world's opening in place of its question."""
        return (*self._system, {"role": "user", "content": self._world.opening()})

    async def step(self, action: Action) -> Turn:
        """The world's reply, until it is over or there are no turns left."""
        move = self._world.move(action.text)
        self._left -= 1
        self._malformed += not move.fit
        metrics = {"success": float(bool(move.won)), "malformed": float(self._malformed), **move.metrics}
        if move.won is not None:
            return Turn(reward=move.reward, metrics=metrics)
        if self._left <= 0:
            return Turn(reward=move.reward + self._late, metrics=metrics)
        return Turn(({"role": "user", "content": move.said},), move.reward, done=False, metrics=metrics)

    async def close(self) -> None:
        """Nothing to close."""


class WorldKnobs(EnvKnobs):
    """What the configs of our own worlds share."""

    @property
    def several(self) -> bool:
        return True

    def openings(self) -> Iterable[str]:
        """Openings of which one has the most tokens."""
        raise NotImplementedError

    def replies(self) -> Iterable[str]:
        """Replies of which one has the most tokens."""
        raise NotImplementedError

    def world(self, chance: random.Random) -> World:
        """A new game. chance: the only source of what is random in it."""
        raise NotImplementedError

    def room(self, asked: int, count: Callable[[str], int]) -> int:
        opening = max(most(text, count) for text in self.openings())
        return opening + (self.answers - 1) * max(most(text, count) for text in self.replies())

    def build(self) -> Callable[[Task], Env]:
        return partial(Played, world=self.world, turns=self.answers)


def most(text: str, count: Callable[[str], int]) -> int:
    """The most tokens of a text that has other digits in the same places: one for each digit, and those between."""
    between = re.split(r"[0-9]", text)
    return sum(count(part) for part in between if part) + len(between) - 1


def last_number(text: str) -> int | None:
    """The last whole number of a text, if it has one."""
    found = NUMBER.findall(GROUPED.sub("", text))
    return int(found[-1]) if found else None


def last_word(text: str, words: Iterable[str]) -> str | None:
    """That of the words, in lower case, that stands last in a text, as a word of its own, in whatever case."""
    # Not re.IGNORECASE, to which more letters are the same than `lower` makes the same, such as \u017f and s.
    found = re.findall(rf"(?<!\w)(?:{'|'.join(map(re.escape, words))})(?!\w)", text.lower())
    return found[-1] if found else None
