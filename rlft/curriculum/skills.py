"""Tasks that need what the policy lacks: each is weighted by how often answers failed where its skills were needed.

Skill-targeted adaptive training, selecting from what there is (STAT-Sel; He et al. 2025, arXiv:2510.10023): a teacher
model labels each task with its skills and keeps a profile of how often the student failed to apply each, by which tasks
are weighted. The abstract says neither how a profile becomes weights nor how it forgets, so both are ours. The labels
are a column here; and an answer that fails counts against all of its task's skills, where STAT's teacher reads which of
them it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlft.curriculum.cells import Cells, Numbers, column, dice, drawn_by, evenness, refuse, results
from rlft.types import Group, Task, least

KEY = "data.curriculum.column"


class Skills:
    """A `Curriculum`, see source. Tasks that need the same skills are one cell.

    What is missing of a skill starts at 1 and moves by `rate` of the way to each group's share of failures.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        seed: int,
        *,
        labels: str,
        rate: float,
        random: float,
        component: str | None,
        level: float,
    ) -> None:
        needed = [_names(value) for value in column(tasks, labels, KEY)]
        bare = [task.id for task, names in zip(tasks, needed, strict=True) if not names]
        refuse(bare, f"{KEY}: {len(bare)} row(s) of data.train have no skill in {labels!r}; label them")
        self._cells = Cells(needed, seed)
        self._seed, self._rate, self._random = seed, rate, random
        self._component, self._level = component, least(level)
        self._names = sorted({name for names in needed for name in names})
        self._missing: Numbers = np.ones(len(self._names))
        numbers = {name: i for i, name in enumerate(self._names)}
        first = {cell: row for row, cell in reversed(list(enumerate(self._cells.of)))}
        self._needs = [[numbers[name] for name in needed[first[cell]]] for cell in range(len(first))]
        self._flat = [skill for skills in self._needs for skill in skills]
        self._counts = np.array([len(skills) for skills in self._needs])
        self._starts = np.cumsum(self._counts) - self._counts

    def choose(self, position: int, count: int) -> list[int]:
        """See `Curriculum.choose`."""
        rng, weights = dice(self._seed, position), self._weights()

        def pick(free: Numbers) -> int:
            wanted = free * weights
            return drawn_by(free if rng.random() < self._random or not wanted.any() else wanted, rng)

        return self._cells.deal(count, pick)

    def learn(self, rows: Sequence[int], groups: Sequence[Group]) -> None:
        """See `Curriculum.learn`."""
        self._cells.note(rows)
        for row, group in zip(rows, groups, strict=True):
            values = results(group, self._component)
            if values:
                skills = self._needs[self._cells.of[row]]
                failed = sum(value < self._level for value in values) / len(values)
                self._missing[skills] += self._rate * (failed - self._missing[skills])

    def metrics(self) -> dict[str, float]:
        """See `Curriculum.metrics`."""
        sizes, weights = self._cells.sizes, self._weights() * self._cells.sizes
        even = sizes / sizes.sum()
        shares = (1 - self._random) * weights / weights.sum() + self._random * even if weights.any() else even
        each = np.repeat(shares / sizes, sizes.astype(int))
        return {
            "curriculum/seen": float(self._cells.seen.sum() / sizes.sum()),
            "curriculum/missing": float(self._missing.mean()),
            "curriculum/entropy": evenness(each),
            **{f"curriculum/missing/{name}": float(self._missing[i]) for i, name in enumerate(self._names)},
        }

    def state_dict(self) -> dict[str, Any]:
        """How often each cell was drawn from, and the profile."""
        return {**self._cells.state_dict("skills"), "missing": self._missing.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Curriculum.load_state_dict`."""
        if self._cells.load_state_dict(state, "skills"):
            self._missing = np.array(state["missing"], dtype=float)

    def _weights(self) -> Numbers:
        """Of a task in each cell: the mean of what is missing of its skills, so that many labels weigh no more."""
        return np.add.reduceat(self._missing[self._flat], self._starts) / self._counts


def _names(value: Any) -> tuple[str, ...]:
    """A list of labels, or text with commas between them; sorted, each once."""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    return tuple(sorted({str(part).strip() for part in parts} - {""}))
