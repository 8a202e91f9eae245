"""Nim with one heap, for one side against an opponent or for both: take stones in turn, and the last one wins.

Whoever leaves a multiple of `most` + 1 wins (the subtraction game). The smallest game in which a policy can learn by
playing itself, where the sum of every episode is 0.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Literal

from pydantic import Field, model_validator

from rlft.envs.base import Action, Env, EnvKnobs
from rlft.envs.own.play import last_number, most
from rlft.types import Message, Task, Turn

Opponent = Literal["random", "best", "policy"]


class Nim:
    """One heap. Every move is shown the heap alone, which is all that matters."""

    def __init__(self, task: Task, knobs: NimConfig) -> None:
        self._system = tuple(message for message in task.messages if message["role"] == "system")
        self._knobs = knobs
        chance = random.Random(f"{task.info.get('seed', task.id)}")
        self._left = chance.randint(knobs.fewest, knobs.stones)
        self._seat = chance.randint(0, 1)
        self._chance = chance
        self._role = 0  # whose move it is, of those that the policy plays

    async def reset(self) -> tuple[Message, ...]:
        """The heap, after the opponent's move where it begins."""
        if self._knobs.opponent != "policy" and self._seat == 1:
            self._left -= min(self._answer(self._left), self._left - 1)  # it leaves the policy a move
        return self._shown()

    async def step(self, action: Action) -> Turn:
        """What comes of a move; one that cannot be made loses."""
        taken = last_number(action.text)
        if taken is None or not 1 <= taken <= min(self._knobs.most, self._left):
            return self._over(won=False, malformed=1.0)
        self._left -= taken
        if self._left == 0:
            return self._over(won=True)
        if self._knobs.opponent == "policy":
            self._role = 1 - self._role
        else:
            self._left -= self._answer(self._left)
            if self._left == 0:
                return self._over(won=False)
        return Turn(self._shown(), done=False, rewrite=True, role=self._role)

    async def close(self) -> None:
        """Nothing to close."""

    def _shown(self) -> tuple[Message, ...]:
        return (*self._system, {"role": "user", "content": question(self._left, self._knobs.most)})

    def _answer(self, left: int) -> int:
        """What the opponent takes of so many."""
        best = left % (self._knobs.most + 1)
        if self._knobs.opponent == "best" and best:
            return best
        return self._chance.randint(1, min(self._knobs.most, left))

    def _over(self, won: bool, malformed: float = 0.0) -> Turn:
        """The last mover has won or lost."""
        if self._knobs.opponent != "policy":
            return Turn(reward=1.0 if won else -1.0, metrics={"success": float(won), "malformed": malformed})
        winner = self._role if won else 1 - self._role
        metrics = {f"{role}/success": float(role == winner) for role in (0, 1)}
        metrics |= {f"{role}/malformed": malformed * (role == self._role) for role in (0, 1)}
        return Turn(pays={winner: 1.0, 1 - winner: -1.0}, metrics=metrics)


class NimConfig(EnvKnobs):
    """Take stones in turn; the last one wins."""

    type: Literal["nim"] = "nim"
    stones: int = Field(default=9, ge=2, le=1000, description="the most that a heap begins with")
    fewest: int = Field(default=5, ge=2, description="the fewest")
    most: int = Field(default=3, ge=1, description="the most that one move takes")
    opponent: Opponent = Field(
        default="policy",
        description="policy: it plays both sides; random; best: the right move, where there is one. An opponent begins "
        "in every second episode, by the seed",
    )

    @model_validator(mode="after")
    def _ordered(self) -> NimConfig:
        if self.fewest > self.stones:
            raise ValueError(f"env.fewest: {self.fewest} is more than env.stones={self.stones}; set fewest lower")
        return self

    @property
    def several(self) -> bool:
        return True

    @property
    def pays(self) -> bool:
        return True

    @property
    def answers(self) -> int:
        return self.stones

    @property
    def speaking(self) -> int:
        return 2 if self.opponent == "policy" else 1

    @property
    def rivals(self) -> bool:
        return self.opponent == "policy"

    def room(self, asked: int, count: Callable[[str], int]) -> int:
        return most(question(self.stones, self.most), count)

    def build(self) -> Callable[[Task], Env]:
        return partial(Nim, knobs=self)


def question(left: int, largest: int) -> str:
    """What a player is shown."""
    return (
        f"There are {left} stones. Each of us in turn takes 1 to {largest}. Whoever takes the last stone wins. "
        "How many do you take? Answer with one number."
    )
