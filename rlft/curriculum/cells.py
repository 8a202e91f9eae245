"""Tasks that are taken for one: a cell's tasks share what is known of them, and take turns when it is drawn."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlft.player import derive_seed
from rlft.rows import first_few
from rlft.types import Group, InputError, Task

Numbers = NDArray[np.float64]


class Cells:
    """The tasks by key. drawn: how many tasks of each cell were drawn; sizes: how many it has; of: each row's cell."""

    def __init__(self, keys: Sequence[Hashable], seed: int) -> None:
        numbers: dict[Hashable, int] = {}
        self.of = [numbers.setdefault(key, len(numbers)) for key in keys]
        self._rows: list[list[int]] = [[] for _ in numbers]
        for row, cell in enumerate(self.of):
            self._rows[cell].append(row)
        self._seed = seed
        self._orders: dict[int, list[int]] = {}
        self.sizes: Numbers = np.array([len(rows) for rows in self._rows], dtype=float)
        self.drawn = [0] * len(numbers)

    def deal(self, count: int, pick: Callable[[Numbers], int]) -> list[int]:
        """`count` rows. pick: names the next one's cell, of those that are free; it is given how many tasks each still
        has that this call has not taken. Where every task was taken, all are free again. Moves nothing on.
        """
        rows = []
        taken, free = [0] * len(self.drawn), self.sizes.copy()
        for _ in range(count):
            if not free.any():
                free = self.sizes.copy()
            cell = pick(free)
            order = self._order(cell)
            rows.append(order[(self.drawn[cell] + taken[cell]) % len(order)])
            taken[cell] += 1
            free[cell] -= 1
        return rows

    def _order(self, cell: int) -> list[int]:
        """In which its tasks take turns: the same every time around, so that none comes twice in a step."""
        if cell not in self._orders:
            order = list(self._rows[cell])
            random.Random(derive_seed(self._seed, "cell", cell)).shuffle(order)
            self._orders[cell] = order
        return self._orders[cell]

    def note(self, rows: Sequence[int]) -> None:
        """These were drawn."""
        for row in rows:
            self.drawn[self.of[row]] += 1

    @property
    def seen(self) -> Numbers:
        """How many tasks each cell stands for that was drawn from already; 0 for others."""
        return np.where(np.array(self.drawn) > 0, self.sizes, 0.0)

    def state_dict(self, kind: str) -> dict[str, Any]:
        """kind: of the curriculum."""
        return {"type": kind, "tasks": len(self.of), "drawn": list(self.drawn)}

    def load_state_dict(self, state: Mapping[str, Any], kind: str) -> bool:
        """Go on from there; False where it is the state of another kind, or of none, and nothing was taken from it.

        Raises InputError where it is about other tasks.
        """
        if state.get("type") != kind:
            return False
        if (state["tasks"], len(state["drawn"])) != (len(self.of), len(self.drawn)):
            raise InputError(
                f"data.curriculum: the checkpoint knows of {state['tasks']} tasks in {len(state['drawn'])} cells, and "
                f"data.train has {len(self.of)} in {len(self.drawn)}; resume with the data and columns that the run "
                "began with, or with data.curriculum.type=uniform"
            )
        self.drawn = list(state["drawn"])
        return True


def dice(seed: int, position: int) -> np.random.Generator:
    """The random numbers of one choice: a function of the run's seed and of how many tasks were drawn before."""
    return np.random.default_rng(derive_seed(seed, "curriculum", position))


def drawn_by(weights: Numbers, rng: np.random.Generator) -> int:
    """An index with probability in proportion to its weight; some weight must be above 0."""
    sums = np.cumsum(weights)
    found = int(np.searchsorted(sums, rng.random() * sums[-1], side="right"))
    return min(found, int(np.flatnonzero(weights)[-1]))  # where rounding goes past the last


def evenness(weights: Numbers) -> float:
    """The entropy of the weights, made to sum to 1, over its largest value: 1 where all are equal, 0 where one is all.

    -sum p ln p / ln n; 1 for a single one.
    """
    if len(weights) < 2 or not weights.any():
        return 1.0
    p = weights[weights > 0] / weights.sum()
    return float(-(p * np.log(p)).sum() / math.log(len(weights)))


def results(group: Group, component: str | None) -> list[float]:
    """What each of the policy's own samples earned: its total, or one component of the reward. Without a score: none.

    Further members that an algorithm drew in another way say nothing of what the policy can do.
    """
    own = [t for t in group if t.drawn == 0]
    said = [t.total if component is None else t.metrics.get(f"reward/{component}") for t in own if t.score is not None]
    return [float(value) for value in said if value is not None and math.isfinite(value)]


def column(tasks: Sequence[Task], name: str, key: str) -> list[Any]:
    """The values of a column. Raises InputError where the tasks have none such. key: of the config, which names it."""
    missing = [task.id for task in tasks if task.info.get(name) is None]
    if len(missing) == len(tasks):
        have = ", ".join(sorted({column for task in tasks for column in task.info})) or "no further column"
        raise InputError(f"{key}: data.train has no column {name!r}; it has {have}. Name one of them")
    refuse(missing, f"{key}: {len(missing)} row(s) of data.train have nothing in column {name!r}; fill it")
    return [task.info[name] for task in tasks]


def refuse(where: Sequence[str], reason: str) -> None:
    """Raises InputError with the ids of such tasks, if there are any."""
    if where:
        raise InputError(f"{reason}. Rows: {first_few(where)}")
