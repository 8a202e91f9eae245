"""Several rewards as one. The terms run at the same time, so that a slow judge does not wait for another."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from rlft.types import Group, Reward


def total(terms: Sequence[Reward]) -> Reward:
    """The sum of the terms. It is None where any term is: half a sum is no smaller score, it is another quantity."""

    async def judge(group: Group) -> list[float | None]:
        columns = await asyncio.gather(*(term(group) for term in terms))
        return [_sum(row) for row in zip(*columns, strict=True)]

    return judge


def _sum(row: Sequence[float | None]) -> float | None:
    present = [value for value in row if value is not None]
    return math.fsum(present) if len(present) == len(row) else None
