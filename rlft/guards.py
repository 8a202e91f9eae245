"""Signs that a reward is not what it was meant to be, in what a step sampled. They are logged, and said when they stay.

A reward that is gamed rises like one that is learned. What gives it away is around it: its spread is gone, length
explains it, one of its parts falls as another rises, or one short text scores high whatever was asked. All are taken
within groups, so that hard and easy tasks do not look like a pattern.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

from rlft.types import Group, Trajectory

WINDOW = 5  # steps over whose mean a sign is judged
ENOUGH = 8  # trajectories from which on a correlation is taken
SHORT = 80  # characters of a text that can score high everywhere
ELSEWHERE = 3  # tasks that are everywhere

Column = list[float]
Read = Callable[[Trajectory], float | None]


def signs(groups: Sequence[Group], components: Sequence[str]) -> dict[str, float]:
    """What a step's own samples show; a sign that cannot be taken from them is left out.

    guard/flat: the share of groups in which all scores are equal. guard/length: the correlation of score and tokens.
    guard/same: the share of the samples that is one short text, said about three tasks or more, whose mean score lies
    above the middle between the mean and the best. guard/conflict/<a>:<b>: the correlation of two components, where it
    is less than zero.
    """
    own = [[t for t in group if not t.drawn and t.total is not None] for group in groups]
    several = [group for group in own if len(group) > 1]
    found: dict[str, float] = {}
    if several:
        found["guard/flat"] = sum(len({t.total for t in group}) == 1 for group in several) / len(several)
    _keep(found, "guard/length", _correlation(several, [_total, lambda t: float(t.length)]))
    for a, b in combinations(components, 2):
        together = _correlation(several, [_component(a), _component(b)])
        if together is not None and together < 0 and not (a.startswith(f"{b}/") or b.startswith(f"{a}/")):
            found[f"guard/conflict/{a}:{b}"] = together
    _keep(found, "guard/same", _said_everywhere([t for group in own for t in group]))
    return found


class Guards:
    """Which signs have stayed for some steps. Each is told once in a run."""

    def __init__(self) -> None:
        self._rows: deque[Mapping[str, float]] = deque(maxlen=WINDOW)
        self._told: set[str] = set()

    def warnings(self, row: Mapping[str, float]) -> list[str]:
        """What there is to say after this step; row: its `signs`."""
        self._rows.append(row)
        if len(self._rows) < WINDOW:
            return []
        said = []
        for name in row:
            values = [past[name] for past in self._rows if name in past]
            text = _warning(name, sum(values) / WINDOW) if len(values) == WINDOW else None
            if text is not None and name not in self._told:
                self._told.add(name)
                said.append(f"reward: over the last {WINDOW} steps {text}")
        return said


def _warning(name: str, mean: float) -> str | None:
    """The warning, where a sign's mean over the window is one."""
    kind = name.split("/")[1]
    # One after the other, for each has a bound and a text of its own.
    if kind == "flat" and mean >= 0.95:
        return (
            f"{mean:.0%} of the groups had equal scores throughout, and nothing is learned from those. Take tasks of "
            "another difficulty, a finer reward, or a higher temperature."
        )
    if kind == "length" and abs(mean) >= 0.8:
        way = "longer" if mean > 0 else "shorter"
        return (
            f"the score went with length (correlation {mean:.2f}): {way} answers get more. If that is not what the "
            "reward is for, judge by something else, or add a term that bounds the length."
        )
    if kind == "conflict" and mean <= -0.5:
        a, b = name.removeprefix("guard/conflict/").split(":")
        return f"'{a}' fell where '{b}' rose (correlation {mean:.2f}). Weigh one less, or gate it by the other."
    if kind == "same" and mean >= 0.2:
        return (
            f"{mean:.0%} of the answers were one short text that scores high whatever was asked. Read them in "
            "rollouts/, and try the reward on that text with `rlft audit`."
        )
    return None


def _total(trajectory: Trajectory) -> float | None:
    return trajectory.total


def _component(name: str) -> Read:
    return lambda trajectory: trajectory.metrics.get(f"reward/{name}")


def _keep(found: dict[str, float], name: str, value: float | None) -> None:
    if value is not None:
        found[name] = value


def _correlation(groups: Sequence[Sequence[Trajectory]], columns: Sequence[Read]) -> float | None:
    """Pearson's, of two columns less their groups' means; None where one does not vary, or there are too few."""
    first: Column = []
    second: Column = []
    for group in groups:
        rows = [(x, y) for t in group if (x := columns[0](t)) is not None and (y := columns[1](t)) is not None]
        if len(rows) > 1:
            means = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
            first += [x - means[0] for x, _ in rows]
            second += [y - means[1] for _, y in rows]
    spread = [math.sqrt(math.fsum(value * value for value in column)) for column in (first, second)]
    if len(first) < ENOUGH or min(spread) <= 1e-9 * len(first):
        return None
    return math.fsum(x * y for x, y in zip(first, second, strict=True)) / (spread[0] * spread[1])


def _said_everywhere(trajectories: Sequence[Trajectory]) -> float | None:
    if not trajectories:
        return None
    scores = [t.total for t in trajectories if t.total is not None]
    bar = (math.fsum(scores) / len(scores) + max(scores)) / 2
    said: dict[str, list[Trajectory]] = defaultdict(list)
    for t in trajectories:
        text = t.completion.strip()
        if len(text) <= SHORT:
            said[text].append(t)
    shares = [0.0]
    for same in said.values():
        mean = math.fsum(t.total for t in same if t.total is not None) / len(same)
        if len({t.task.id for t in same}) >= ELSEWHERE and mean >= bar and max(scores) > min(scores):
            shares.append(len(same) / len(trajectories))
    return max(shares)
