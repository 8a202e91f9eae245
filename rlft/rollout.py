"""Playing the tasks of a step: every task several times, each group scored as soon as it is complete.

All episodes of a step are open at once, so the engine batches across them. Each draws from a seed that is a function
of (run seed, step, task, sample, turn), so a result does not depend on how requests happened to be batched.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from rlft.draws import further, waits, wanted
from rlft.player import Player, derive_seed
from rlft.recover import surviving
from rlft.roles import by_role
from rlft.together import together
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

    Where roles are rivals, a task has a group for each of them. draws: further members of each group. Those that wait
    for the group's own scores are scored after them, together. Where the engine is lost on the way and can be started
    again, all is played again: the same prompts and seeds.
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
        whole = tuple(trajectory for trajectory in members if not trajectory.failed)
        for trajectory, verdict in zip(whole, await reward(whole), strict=True):
            trajectory.score = verdict
        busy += time.perf_counter() - now

    async def one(index: int, task: Task) -> list[Group]:
        own = [player.play(task, derive_seed(seed, index, task.id, i)) for i in range(group_size)]
        apart = [(number, draw, derive_seed(seed, index, task.id, "draw", number)) for number, draw in numbered]
        beside = [further(player, draw, n, task, s, ()) for n, draw, s in apart if not waits(draw)]
        group = [member for part in await together([together(own), *beside]) for member in part]
        if player.rivals:
            groups = by_role(group)
            await together(map(score, groups))
            return groups
        await score(group)
        own_done = [trajectory for trajectory in group[:group_size] if not trajectory.failed]
        called = [entry for entry in apart if waits(entry[1]) and wanted(entry[1], own_done)]
        parts = await together([further(player, draw, n, task, s, own_done) for n, draw, s in called])
        more = [member for part in parts for member in part]
        if more:
            await score(more)
        return [(*group, *more)]

    groups = [group for part in await together([one(i, task) for i, task in enumerate(tasks)]) for group in part]
    shown = time.perf_counter() - ended
    return groups, Clock(ended - begun, shown, max(0.0, busy - shown))
