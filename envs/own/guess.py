"""Guess the number: told after each guess whether it is higher or lower. Halving wins in log2(highest) guesses."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from rlft.envs.own.play import Move, WorldKnobs, last_number


class Guess:
    """One number from 1 to `highest`."""

    def __init__(self, chance: random.Random, highest: int, turns: int) -> None:
        self._highest = highest
        self._left = turns
        self._number = chance.randint(1, highest)

    def opening(self) -> str:
        """The rules."""
        return (
            f"I think of a whole number from 1 to {self._highest}. Find it in at most {self._left} guesses. After each "
            "I say whether it is higher or lower. Answer with one number."
        )

    def move(self, text: str) -> Move:
        """Higher or lower than the last number of the answer."""
        self._left -= 1
        said = last_number(text)
        if said is None or not 1 <= said <= self._highest:
            return Move(f"Answer with one number from 1 to {self._highest}. Guesses left: {self._left}.", fit=False)
        if said == self._number:
            return Move(won=True)
        return Move(f"My number is {'higher' if said < self._number else 'lower'}. Guesses left: {self._left}.")


class GuessConfig(WorldKnobs):
    """Guess a number from higher and lower."""

    type: Literal["guess"] = "guess"
    highest: int = Field(default=100, ge=2, le=10**9, description="it is from 1 to this")
    turns: int = Field(default=7, ge=1, description="the most guesses")

    @property
    def answers(self) -> int:
        return self.turns

    def openings(self) -> Iterable[str]:
        yield self.world(random.Random(0)).opening()

    def replies(self) -> Iterable[str]:
        for said in ("higher", "lower"):
            yield f"My number is {said}. Guesses left: {self.turns}."
        yield f"Answer with one number from 1 to {self.highest}. Guesses left: {self.turns}."

    def world(self, chance: random.Random) -> Guess:
        return Guess(chance, self.highest, self.turns)
