"""Sums whose weights are no constants: they change over the steps, or go by how much a group differs in a term."""

from __future__ import annotations

import asyncio
import bisect
import math
from collections.abc import Mapping, Sequence

from rlft.types import Group, InputError, Reward, stepping

Verdicts = list[float | None]
Points = Mapping[int, float]


def scheduled(terms: Mapping[str, Reward], points: Mapping[str, Points]) -> Reward:
    """The sum of the terms, each times what its points say for this step. None where a term that counts has no value.

    terms: by component. points: factors by step, by component; 1 where there are none. A term whose factor is 0 is
    judged and logged, and has no say, not even by having no value. Metric: `reward/<component>/factor`. Raises
    InputError where there is no step.
    """

    async def judge(group: Group) -> Verdicts:
        step = stepping.get()
        if step is None:
            raise InputError(
                "reward.type: `scheduled` weighs by the step of a run, and here is none; name the reward that the run "
                "ends with, say `type: weighted`"
            )
        factors = [at(points[name], step) if name in points else 1.0 for name in terms]
        columns = await asyncio.gather(*(reward(group) for reward in terms.values()))
        for trajectory in group:
            trajectory.metrics |= {f"reward/{name}/factor": f for name, f in zip(terms, factors, strict=True)}
        return _weighed(factors, columns)

    return judge


def at(points: Points, step: int) -> float:
    """The factor at a step: on the line between two points, and beyond the first and the last theirs."""
    steps = sorted(points)
    place = bisect.bisect_right(steps, step)
    if place in (0, len(steps)):
        return points[steps[max(place - 1, 0)]]
    before, after = steps[place - 1], steps[place]
    return points[before] + (points[after] - points[before]) * (step - before) / (after - before)


def normalised(terms: Sequence[Reward], weights: Sequence[float], epsilon: float) -> Reward:
    """The sum of weight times (value - group mean) / (group std + epsilon), each term by itself; the std with n - 1.

    GDPO (Liu et al. 2026, arXiv:2601.05242): summed first and normalised then, a term of small spread is lost beside
    one of large spread, and different mixtures come out as the same advantage. A term that is equal for the whole
    group up to rounding gives 0. A trajectory alone in its group, as in evaluation, is given its plain sum. None where
    a term that counts has no value; the others are then compared among themselves.
    """

    async def judge(group: Group) -> Verdicts:
        columns = await asyncio.gather(*(reward(group) for reward in terms))
        return _weighed(weights, columns if len(group) < 2 else [_standard(column, epsilon) for column in columns])

    return judge


def _weighed(factors: Sequence[float], columns: Sequence[Sequence[float | None]]) -> Verdicts:
    """For each trajectory the sum of factor times value, over the factors that are not 0; None where a value is."""
    counting = [(factor, column) for factor, column in zip(factors, columns, strict=True) if factor]
    found: Verdicts = []
    for i in range(len(columns[0])):
        parts = [(factor, column[i]) for factor, column in counting]
        present = [factor * value for factor, value in parts if value is not None]
        found.append(math.fsum(present) if len(present) == len(parts) else None)
    return found


def _standard(column: Sequence[float | None], epsilon: float) -> Verdicts:
    """The values less their mean, over their std; 0 where there is no spread beyond rounding."""
    known = [value for value in column if value is not None]
    spread = max(known) - min(known) if known else 0.0
    if spread <= 1e-6 * max(1.0, *map(abs, known)):
        return [None if value is None else 0.0 for value in column]
    mean = math.fsum(known) / len(known)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (len(known) - 1))
    return [None if value is None else (value - mean) / (std + epsilon) for value in column]
