"""Blackjack of gym_cards (Zhai et al. 2024, arXiv:2405.10292), which GFlowVLM (arXiv:2503.06514) plays too, as text.

It is example 5.1 of Sutton and Barto: an endless deck, the dealer draws to 17, and the end pays 1, 0 or -1. An ace
counts 11 where that busts nobody. What differs from the authors' environment stands in docs/envs-own.md.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Literal

from pydantic import Field

from rlft.envs.base import Env
from rlft.envs.own.play import Move, Played, WorldKnobs, last_word
from rlft.types import Task

FACES = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
MOVES = {"hit": "hit", "stand": "stand", "stick": "stand"}
LOST = -1.0


def worth(hand: Sequence[str]) -> tuple[int, bool]:
    """The hand's sum, and whether an ace counts 11 in it."""
    total = sum(min(10, FACES.index(card) + 1) for card in hand)
    soft = "A" in hand and total + 10 <= 21
    return total + 10 * soft, soft


class Blackjack:
    """One hand."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._dealer = [self._card(), self._card()]
        self._mine = [self._card(), self._card()]

    def opening(self) -> str:
        """The rules, and the cards that are seen."""
        return (
            "You play blackjack. Come nearer to 21 than the dealer, but not over it. J, Q and K count 10, an ace (A) "
            f"1 or 11. Answer with one word: hit for another card, or stand.\n{self._seen()}"
        )

    def move(self, text: str) -> Move:
        """Another card, or the dealer's cards and the end."""
        move = MOVES.get(last_word(text, MOVES) or "")
        if move is None:
            return Move(f"Answer with one word: hit or stand.\n{self._seen()}", fit=False)
        if move == "stand":
            while worth(self._dealer)[0] < 17:
                self._dealer.append(self._card())
            return self._end()
        self._mine.append(self._card())
        return Move(reward=LOST, won=False) if worth(self._mine)[0] > 21 else Move(self._seen())

    def _end(self) -> Move:
        mine, theirs = (total if total <= 21 else 0 for total, _ in map(worth, (self._mine, self._dealer)))
        reward = float(mine > theirs) - float(mine < theirs)
        return Move(reward=reward, won=reward > 0, metrics={"draw": float(reward == 0)})

    def _card(self) -> str:
        return self._chance.choice(FACES)

    def _seen(self) -> str:
        return shown(self._dealer[0], self._mine)


def shown(dealer: str, mine: Sequence[str]) -> str:
    """The table in words."""
    total, soft = worth(mine)
    return f"Dealer: {dealer}\nYou: {' '.join(mine)}\nSum: {total}{' (an ace counts 11)' if soft else ''}"


class BlackjackConfig(WorldKnobs):
    """Hit or stand."""

    type: Literal["blackjack"] = "blackjack"
    turns: int = Field(default=10, ge=1, description="the most answers; a hand that was not ended by then is lost")

    @property
    def pays(self) -> bool:
        return True

    @property
    def answers(self) -> int:
        return self.turns

    def openings(self) -> Iterable[str]:
        rules = self.world(random.Random(0)).opening().partition("\n")[0]
        for seen in self._seen(2):
            yield f"{rules}\n{seen}"

    def replies(self) -> Iterable[str]:
        for seen in self._seen(min(21, self.turns + 1)):
            yield f"Answer with one word: hit or stand.\n{seen}"

    def _seen(self, cards: int) -> Iterable[str]:
        """Hands that say the most: all of one face, of cards that fit, and with the longest remark."""
        for face in ("10", "A", "K"):
            yield f"Dealer: 10\nYou: {' '.join([face] * cards)}\nSum: 21 (an ace counts 11)"

    def world(self, chance: random.Random) -> Blackjack:
        return Blackjack(chance)

    def build(self) -> Callable[[Task], Env]:
        return partial(Played, world=self.world, turns=self.turns, late=LOST)
