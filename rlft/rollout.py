"""Playing the tasks of a step: every task several times, each group scored as soon as it is complete.

All episodes of a step are open at once, so the engine batches across them. Each draws from a seed that is a function
of (run seed, step, task, sample, turn), so a result does not depend on how requests happened to be batched.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rlft.draws import further, waits, wanted
from rlft.player import Player, derive_seed
from rlft.recover import surviving
from rlft.types import Draw, Group, Reward, Task, Trajectory


@dataclass
class Clock:
    """Seconds: generate until the last episode ended, reward from there on, reward_hidden while others generated."""

    generate: float = 0.0
    reward: float = 0.0
    reward_hidden: float = 0.0


async def rollout(
    player: Player, reward: Reward, tasks: Sequence[Task], group_size: int, seed: int, draws: Sequence[Draw] = ()
) -> tuple[list[Group], Clock]:
    """Play every task `group_size` times and score each group as soon as it is complete, in the tasks' order.

    draws: further members of each group. Those that wait for the group's own scores are scored after them, together.
    Where the engine is lost on the way and can be started again, all is played again: the same prompts and seeds.
    """
    return await surviving(lambda: _played(player, reward, tasks, group_size, seed, draws))


async def _played(
    player: Player, reward: Reward, tasks: Sequence[Task], group_size: int, seed: int, draws: Sequence[Draw]
) -> tuple[list[Group], Clock]:
    begun = time.perf_counter()
    ended = begun
    busy = 0.0
    numbered = list(enumerate(draws, 1))

    async def score(members: Sequence[Trajectory]) -> None:
        nonlocal ended, busy
        ended = now = time.perf_counter()
        for trajectory, verdict in zip(members, await reward(tuple(members)), strict=True):
            trajectory.score = verdict
        busy += time.perf_counter() - now

    async def one(index: int, task: Task) -> Group:
        own = [player.play(task, derive_seed(seed, index, task.id, i)) for i in range(group_size)]
        apart = [(number, draw, derive_seed(seed, index, task.id, "draw", number)) for number, draw in numbered]
        beside = [further(player, draw, n, task, s, ()) for n, draw, s in apart if not waits(draw)]
        group = [member for part in await _all([_all(own), *beside]) for member in part]
        await score(group)
        own_done = group[:group_size]
        called = [entry for entry in apart if waits(entry[1]) and wanted(entry[1], own_done)]
        parts = await _all([further(player, draw, n, task, s, own_done) for n, draw, s in called])
        more = [member for part in parts for member in part]
        if more:
            await score(more)
        return (*group, *more)

    groups = await _all([one(i, task) for i, task in enumerate(tasks)])
    shown = time.perf_counter() - ended
    return groups, Clock(ended - begun, shown, max(0.0, busy - shown))


async def _all(coroutines: list) -> list:
    """gather, but the first failure ends the others before it is raised."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
