"""Tasks that the policy solves sometimes: those whose success rate lies in a band are drawn more often.

A group whose answers are all right or all wrong teaches an algorithm that compares them nothing, and the variance of a
result that is 0 or 1 is p (1 - p). Dynamic sampling (Yu et al. 2025, arXiv:2503.14476) leaves such groups out once they
were sampled; here fewer are sampled. The estimate, its start and the shares are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlft.curriculum.cells import Cells, Numbers, column, dice, drawn_by, evenness, results
from rlft.source import Deck
from rlft.types import Group, Task, least


class Band:
    """A `Curriculum`, see source. by: columns; tasks with the same values there share an estimate, none: each its own.

    An estimate starts at `start` and moves by `rate` of the way to each group's share of results of at least `level`.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        seed: int,
        *,
        low: float,
        high: float,
        rate: float,
        start: float,
        random: float,
        by: Sequence[str],
        component: str | None,
        level: float,
    ) -> None:
        values = [column(tasks, name, "data.curriculum.by") for name in by]
        keys = [repr(key) for key in zip(*values, strict=True)] if by else range(len(tasks))
        self._cells = Cells(keys, seed)
        self._seed = seed
        self._low, self._high, self._rate, self._random = low, high, rate, random
        self._component, self._level = component, least(level)
        count = len(self._cells.drawn)
        self._estimates: Numbers = np.full(count, start)
        first = Deck(count, seed)
        self._first = [first.at(i) for i in range(count)]

    def choose(self, position: int, count: int) -> list[int]:
        """See `Curriculum.choose`: cells that were never drawn from, then a random one or one in the band."""
        rng = dice(self._seed, position)
        unseen = [cell for cell in self._first if not self._cells.drawn[cell]]
        unseen.reverse()
        outside = self._outside()

        def pick(free: Numbers) -> int:
            if unseen:
                return unseen.pop()
            nearest = outside <= outside[free > 0].min()  # in the band, while one is left there
            return drawn_by(free if rng.random() < self._random else free * nearest, rng)

        return self._cells.deal(count, pick)

    def learn(self, rows: Sequence[int], groups: Sequence[Group]) -> None:
        """See `Curriculum.learn`."""
        self._cells.note(rows)
        for row, group in zip(rows, groups, strict=True):
            values = results(group, self._component)
            if values:
                cell = self._cells.of[row]
                success = sum(value >= self._level for value in values) / len(values)
                self._estimates[cell] += self._rate * (success - self._estimates[cell])

    def metrics(self) -> dict[str, float]:
        """See `Curriculum.metrics`. Shares and means are over tasks that are known, if only by their cell."""
        seen, sizes = self._cells.seen, self._cells.sizes
        known = max(float(seen.sum()), 1.0)
        weights = self._favoured() * sizes
        shares = (1 - self._random) * weights / weights.sum() + self._random * sizes / sizes.sum()
        each = np.repeat(shares / sizes, sizes.astype(int))
        return {
            "curriculum/seen": float(seen.sum() / sizes.sum()),
            "curriculum/success": float((seen * self._estimates).sum() / known),
            "curriculum/in_band": float((seen * (self._outside() == 0)).sum() / known),
            "curriculum/entropy": evenness(each),
        }

    def state_dict(self) -> dict[str, Any]:
        """How often each cell was drawn from, and its estimate."""
        return {**self._cells.state_dict("band"), "estimates": self._estimates.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Curriculum.load_state_dict`."""
        if self._cells.load_state_dict(state, "band"):
            self._estimates = np.array(state["estimates"], dtype=float)

    def _outside(self) -> Numbers:
        """How far each cell's estimate is from the band; 0 in it."""
        return np.maximum(np.maximum(self._low - self._estimates, self._estimates - self._high), 0.0)

    def _favoured(self) -> Numbers:
        """1 for the cells in the band, else 0; where none is in it, 1 for those nearest to it."""
        outside = self._outside()
        return (outside <= outside.min()).astype(float)
