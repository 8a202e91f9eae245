"""Tasks of the difficulty at which the policy changes most: absolute learning progress, by Gaussian mixtures.

ALP-GMM (Portelas et al. 2019, arXiv:1910.07224). The progress at a task is how far its result is from that of the
nearest task before, in either direction: also what is being forgotten is worth practice. A mixture of Gaussians is
fitted to the last (difficulty, progress) points every so often; a Gaussian is drawn by its mean progress, a difficulty
from that Gaussian. A share of the tasks is drawn at random, and all before the first fit. Defaults are the paper's and
those of its code (flowersteam/teachDeepRL).

Ours: a task is the row of data nearest to the drawn difficulty; one group is one result; and the groups of a step are
measured from those before that step, since among themselves they were answered by the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from rlft.curriculum.cells import Cells, Numbers, column, dice, drawn_by, evenness, refuse, results
from rlft.curriculum.mixture import Mixture, best
from rlft.player import derive_seed
from rlft.types import Group, InputError, Task, finite

KEY = "data.curriculum.columns"


class AlpGmm:
    """A `Curriculum`, see source. columns: of numbers, each brought to 0 to 1 over the tasks; a point is a cell."""

    def __init__(
        self,
        tasks: Sequence[Task],
        seed: int,
        *,
        columns: Sequence[str],
        every: int,
        gaussians: int,
        criterion: Literal["aic", "bic"],
        random: float,
        component: str | None,
    ) -> None:
        self._names = tuple(columns)
        raw = np.array([_numbers(tasks, name) for name in columns]).T
        least, most = raw.min(0), raw.max(0)
        for name, spread in zip(columns, most - least, strict=True):
            if spread == 0:
                raise InputError(f"{KEY}: column {name!r} has one value alone, so it says nothing; leave it out")
        self._raw = raw
        scaled = (raw - least) / (most - least)
        keys = [tuple(point) for point in scaled.tolist()]
        self._cells = Cells(keys, seed)
        self._points = np.array(list(dict.fromkeys(keys)))
        self._seed, self._every, self._gaussians = seed, every, gaussians
        self._criterion: Literal["aic", "bic"] = criterion
        self._random, self._component = random, component
        self._last: list[float | None] = [None] * len(self._points)
        self._window: list[tuple[int, float]] = []
        self._count = 0
        self._mixture: Mixture | None = None
        self._shown: dict[str, float] = {}

    def choose(self, position: int, count: int) -> list[int]:
        """See `Curriculum.choose`."""
        rng, mixture = dice(self._seed, position), self._mixture

        def pick(free: Numbers) -> int:
            if mixture is None or rng.random() < self._random:
                return drawn_by(free, rng)
            chosen = drawn_by(_promising(mixture), rng)
            lower = np.linalg.cholesky(mixture.covariances[chosen])
            wanted = mixture.means[chosen] + lower @ rng.standard_normal(len(lower))
            away = ((self._points - wanted[:-1].clip(0, 1)) ** 2).sum(1)
            return int(np.where(free > 0, away, math.inf).argmin())

        return self._cells.deal(count, pick)

    def learn(self, rows: Sequence[int], groups: Sequence[Group]) -> None:
        """See `Curriculum.learn`: what the groups of one cell say is their mean."""
        self._cells.note(rows)
        means = self._raw[list(rows)].mean(0).tolist()
        self._shown = {f"curriculum/difficulty/{name}": m for name, m in zip(self._names, means, strict=True)}
        said: dict[int, list[float]] = {}
        for row, group in zip(rows, groups, strict=True):
            values = results(group, self._component)
            if values:
                said.setdefault(self._cells.of[row], []).append(sum(values) / len(values))
        before = list(self._last)
        known = np.array([value is not None for value in before])
        for cell, each in said.items():
            nearest = self._nearest(cell, known)
            for result in each:
                self._progressed(cell, 0.0 if nearest is None else abs(result - (before[nearest] or 0.0)))
            self._last[cell] = sum(each) / len(each)

    def _nearest(self, cell: int, known: np.ndarray) -> int | None:
        """The cell nearest to this one, itself if it is known, of those with a result; None where there is none."""
        if not known.any():
            return None
        away = ((self._points - self._points[cell]) ** 2).sum(1)
        return int(np.where(known, away, math.inf).argmin())

    def _progressed(self, cell: int, progress: float) -> None:
        """One more result; each `every`-th fits the mixture anew, to as many."""
        self._window = [*self._window, (cell, progress)][-self._every :]
        self._count += 1
        if self._count % self._every == 0:
            points = np.array([[*self._points[cell], progress] for cell, progress in self._window])
            rng = np.random.default_rng(derive_seed(self._seed, "mixture", self._count))
            self._mixture = best(points, self._gaussians, self._criterion, rng)

    def metrics(self) -> dict[str, float]:
        """See `Curriculum.metrics`. The entropy is of which Gaussian is drawn, 1 before there is one."""
        known = [(size, value) for size, value in zip(self._cells.sizes, self._last, strict=True) if value is not None]
        tasks = sum(size for size, _ in known)
        sizes, mixture = self._cells.sizes, self._mixture
        return {
            **self._shown,
            "curriculum/seen": float(self._cells.seen.sum() / sizes.sum()),
            "curriculum/success": float(sum(size * value for size, value in known) / tasks) if tasks else 0.0,
            "curriculum/progress": sum(p for _, p in self._window) / max(len(self._window), 1),
            "curriculum/gaussians": float(len(mixture.shares)) if mixture is not None else 0.0,
            "curriculum/entropy": evenness(_promising(mixture)) if mixture is not None else 1.0,
        }

    def state_dict(self) -> dict[str, Any]:
        """Draws, the last result of every cell, the points to be fitted, and the mixture."""
        return {
            **self._cells.state_dict("alp_gmm"),
            "last": list(self._last),
            "window": [list(point) for point in self._window],
            "count": self._count,
            "mixture": None if self._mixture is None else self._mixture.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Curriculum.load_state_dict`."""
        if self._cells.load_state_dict(state, "alp_gmm"):
            self._last, self._count = list(state["last"]), int(state["count"])
            self._window = [(int(cell), float(progress)) for cell, progress in state["window"]]
            self._mixture = None if state["mixture"] is None else Mixture.of(state["mixture"])


def _promising(mixture: Mixture) -> Numbers:
    """The Gaussians' mean progress, by which one is drawn; all 1 where none has any."""
    progress = mixture.means[:, -1].clip(0)
    return progress if progress.any() else np.ones(len(progress))


def _numbers(tasks: Sequence[Task], name: str) -> list[float]:
    """A column of finite numbers. Raises InputError with the rows where it is none."""
    values = column(tasks, name, KEY)
    bad = [task.id for task, value in zip(tasks, values, strict=True) if not finite(value)]
    refuse(bad, f"{KEY}: column {name!r} has {len(bad)} value(s) that are no finite number; choose a column of numbers")
    return [float(value) for value in values]
