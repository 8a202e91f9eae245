"""NumberLine of gym_cards (Zhai et al. 2024, arXiv:2405.10292), which GFlowVLM (arXiv:2503.06514) plays too, as text.

Rules and rewards are those of the authors' environment: 1 on the target, where the episode ends, -1 for a move that
does not come nearer, else 0; over after twice as many moves as the line is long. Differences stand in docs/envs-own.md.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from rlft.envs.own.play import Move, WorldKnobs

SIGN = re.compile(r"(?<![\w+\-])[+\-](?![\w+\-])")


class NumberLine:
    """One line from 0 to `longest`."""

    def __init__(self, chance: random.Random, longest: int) -> None:
        self._longest = longest
        self._at, self._target = chance.randint(0, longest), chance.randint(0, longest)
        if self._at == self._target:
            self._target = (self._target + 1) % longest

    def opening(self) -> str:
        """The rules, and both numbers."""
        return (
            "Bring the current number to the target, one by one. Answer with one sign: + adds one, - takes one away.\n"
            + self._seen()
        )

    def move(self, text: str) -> Move:
        """One up or down, as the last sign of the answer that stands alone says."""
        signs = SIGN.findall(text)
        if not signs:
            return Move(f"Answer with + or - alone. {self._seen()}", fit=False)
        before = abs(self._target - self._at)
        self._at = min(self._longest, max(0, self._at + (1 if signs[-1] == "+" else -1)))
        after = abs(self._target - self._at)
        if after == 0:
            return Move(reward=1.0, won=True)
        return Move(self._seen(), reward=0.0 if after < before else -1.0)

    def _seen(self) -> str:
        return f"Target: {self._target}\nCurrent: {self._at}"


class NumberLineConfig(WorldKnobs):
    """Bring a number to a target by + and -."""

    type: Literal["numberline"] = "numberline"
    longest: int = Field(
        default=5, ge=2, le=10**6, description="the line is from 0 to this; twice as many moves at most"
    )

    @property
    def pays(self) -> bool:
        return True

    @property
    def answers(self) -> int:
        return 2 * self.longest

    def openings(self) -> Iterable[str]:
        world = self.world(random.Random(0)).opening()
        yield world.partition("\n")[0] + f"\nTarget: {self.longest}\nCurrent: {self.longest}"

    def replies(self) -> Iterable[str]:
        yield f"Answer with + or - alone. Target: {self.longest}\nCurrent: {self.longest}"

    def world(self, chance: random.Random) -> NumberLine:
        return NumberLine(chance, self.longest)
