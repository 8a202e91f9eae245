"""Where groups come from: played now (online) or written down before (offline). Offline is a source, not an algorithm.

What has been drawn is one number; the order of an epoch is a function of (seed, epoch), so a resumed source goes on
with the row that an uninterrupted one would have taken.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Protocol

from rlft.rollout import Player, derive_seed, rollout
from rlft.types import Group, Reward, Task


class Source(Protocol):
    """Gives the groups of one step. online: they are sampled from the weights that the engine serves now."""

    online: bool
    metrics: dict[str, float]

    async def next(self) -> list[Group]:
        """The next step's groups; the state moves on only once they are complete."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Deck:
    """Row numbers without end: every row once an epoch, in an order drawn from (seed, epoch)."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self._orders: dict[int, list[int]] = {}

    def at(self, position: int) -> int:
        """The row at a position counted over all epochs."""
        epoch, offset = divmod(position, self._size)
        if epoch not in self._orders:
            order = list(range(self._size))
            random.Random(derive_seed(self._seed, "order", epoch)).shuffle(order)
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1} | {epoch: order}
        return self._orders[epoch][offset]


class Rollouts:
    """Plays `tasks_per_step` tasks, `group_size` times each, with the weights that the engine serves now."""

    online = True

    def __init__(
        self, tasks: Sequence[Task], player: Player, reward: Reward, tasks_per_step: int, group_size: int, seed: int
    ) -> None:
        self._tasks = tasks
        self._player = player
        self._reward = reward
        self._count = tasks_per_step
        self._group_size = group_size
        self._seed = seed
        self._deck = Deck(len(tasks), seed)
        self._position = 0
        self.metrics: dict[str, float] = {}

    async def next(self) -> list[Group]:
        """See `Source.next`."""
        tasks = [self._tasks[self._deck.at(self._position + i)] for i in range(self._count)]
        seed = derive_seed(self._seed, "rollout", self._position)
        groups, clock = await rollout(self._player, self._reward, tasks, self._group_size, seed)
        self._position += self._count
        self.metrics = {
            "time/generate": clock.generate,
            "time/reward": clock.reward,
            "time/reward_hidden": clock.reward_hidden,
            "tokens/generated": float(sum(t.length for group in groups for t in group)),
        }
        return groups

    def state_dict(self) -> dict[str, Any]:
        """How much has been drawn."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._position = int(state["position"])


class Recorded:
    """Groups that were written down: demonstrations, pairs, scored completions."""

    online = False

    def __init__(self, groups: Sequence[Group], groups_per_step: int, seed: int) -> None:
        self._groups = groups
        self._count = groups_per_step
        self._deck = Deck(len(groups), seed)
        self._position = 0
        self.metrics: dict[str, float] = {}

    async def next(self) -> list[Group]:
        """See `Source.next`."""
        drawn = [self._groups[self._deck.at(self._position + i)] for i in range(self._count)]
        self._position += self._count
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """How much has been drawn."""
        return {"position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._position = int(state["position"])
