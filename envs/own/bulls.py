"""Bulls and cows, the older form of Mastermind: a secret of different digits, and how many of a guess are right.

A bull is a digit in its place, a cow one that stands elsewhere in the secret.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from typing import Literal

from pydantic import Field, model_validator

from rlft.envs.own.play import Move, WorldKnobs


def marks(guess: str, secret: str) -> tuple[int, int]:
    """Bulls and cows of a guess."""
    bulls = sum(a == b for a, b in zip(guess, secret, strict=True))
    return bulls, len(set(guess) & set(secret)) - bulls


class Bulls:
    """One secret."""

    def __init__(self, chance: random.Random, places: int, digits: int, turns: int) -> None:
        self._places, self._digits, self._turns = places, digits, turns
        self._secret = "".join(map(str, chance.sample(range(1, digits + 1), places)))

    @property
    def _rule(self) -> str:
        return f"{self._places} different digits from 1 to {self._digits}"

    def opening(self) -> str:
        """The rules."""
        return (
            f"My secret has {self._rule}. Find it in at most {self._turns} guesses. After each I say how many digits "
            "are in their place (bulls) and how many belong elsewhere (cows). Answer with the digits only, such as "
            f"{''.join(map(str, range(1, self._places + 1)))}."
        )

    def move(self, text: str) -> Move:
        """The marks of the last word of digits."""
        found = re.findall(r"(?<!\w)[0-9]+(?!\w)", text)
        guess = found[-1] if found else ""
        known = set(map(str, range(1, self._digits + 1)))
        if len(guess) != self._places or len(set(guess)) != self._places or not set(guess) <= known:
            return Move(f"A guess is {self._rule}, such as {'123456789'[: self._places]}.", fit=False)
        bulls, cows = marks(guess, self._secret)
        return Move(won=True) if bulls == self._places else Move(f"Bulls: {bulls}, cows: {cows}.")


class BullsConfig(WorldKnobs):
    """Find a secret of digits from bulls and cows."""

    type: Literal["bulls"] = "bulls"
    places: int = Field(default=3, ge=1, le=9, description="digits of the secret, all different")
    digits: int = Field(default=6, ge=2, le=9, description="they are from 1 to this")
    turns: int = Field(default=8, ge=1, description="the most guesses")

    @model_validator(mode="after")
    def _fits(self) -> BullsConfig:
        if self.places > self.digits:
            raise ValueError(
                f"places: {self.places} different digits are not to be had of {self.digits}; raise `digits`"
            )
        return self

    @property
    def answers(self) -> int:
        return self.turns

    def openings(self) -> Iterable[str]:
        yield self.world(random.Random(0)).opening()

    def replies(self) -> Iterable[str]:
        world = self.world(random.Random(0))
        yield "Bulls: 0, cows: 0."
        yield world.move("").said

    def world(self, chance: random.Random) -> Bulls:
        return Bulls(chance, self.places, self.digits, self.turns)
