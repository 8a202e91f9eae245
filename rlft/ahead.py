"""Asynchrony is a wrapper of the source: `Ahead` samples the groups of coming steps while a step is learned.

As in "Asynchronous RLHF" (Noukhovitch et al. 2024, arXiv:2410.18252) with one step of lag, and as one-step off-policy
trainers do; but the lag is a constant, not an outcome of who was faster, so a run is the same run on any machine, and
one that is resumed goes on with the very samples that wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlft.chance import put, states
from rlft.source import Source, read, written
from rlft.types import Group


@dataclass(frozen=True)
class Drawn:
    """What a source gave for one step."""

    groups: list[Group]
    selected: list[Group] | None
    metrics: dict[str, float]

    def state_dict(self) -> dict[str, Any]:
        """Token by token. What is selected is noted by place, so that it is the same trajectories again."""
        places = {id(t): (i, j) for i, group in enumerate(self.groups) for j, t in enumerate(group)}
        chosen = self.selected
        return {
            "groups": [[written(t) for t in group] for group in self.groups],
            "selected": None if chosen is None else [[places[id(t)] for t in group] for group in chosen],
            "metrics": self.metrics,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Drawn:
        """What `state_dict` wrote."""
        groups = [tuple(read(t) for t in group) for group in state["groups"]]
        chosen = state["selected"]
        if chosen is not None:
            chosen = [tuple(groups[i][j] for i, j in group) for group in chosen]
        return cls(groups, chosen, dict(state["metrics"]))


class Ahead:
    """Gives what `source` gave `depth` steps before, and lets it draw on meanwhile.

    Step n trains on groups that were drawn with the weights after step n - 1 - depth (the first steps' with those of
    the start). With a depth of 0 it gives what waited in a state, then what the source gives.

    Drawing goes on in the background from each `next` until `depth` steps' groups wait. `settled` waits for that, and
    has to be called before the weights that `source` samples from change, or its state is read. A drawing that fails
    is told by the `next` after it, which would have begun it.
    """

    def __init__(self, source: Source, depth: int) -> None:
        self.online = source.online
        self.overlaps = depth > 0
        self.later = 0
        self.metrics: dict[str, float] = {}
        self.selected: list[Group] | None = None
        self._inner = source
        self._depth = depth
        self._waiting: list[Drawn] = []
        self._drawing: asyncio.Task[None] | None = None

    async def next(self) -> list[Group]:
        """See `Source.next`."""
        if self._drawing is not None:
            task, self._drawing = self._drawing, None
            await task  # cancelled with whoever awaits it
        if not self._waiting:
            await self._draw()
        taken = self._waiting.pop(0)
        self.selected, self.metrics = taken.selected, taken.metrics
        if len(self._waiting) < self._depth:
            self._drawing = asyncio.create_task(self._fill())
        return taken.groups

    async def settled(self) -> None:
        """Wait until nothing is being drawn; see `Source.settled`."""
        if self._drawing is not None:
            await asyncio.wait([self._drawing])

    async def close(self) -> None:
        """Draw no more; see `Source.close`."""
        if self._drawing is not None:
            self._drawing.cancel()
            await asyncio.gather(self._drawing, return_exceptions=True)
        await self._inner.close()

    def state_dict(self) -> dict[str, Any]:
        """How much has been drawn, and what waits."""
        return {**self._inner.state_dict(), "ahead": [drawn.state_dict() for drawn in self._waiting]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; a state of the source alone will do."""
        self._inner.load_state_dict({name: value for name, value in state.items() if name != "ahead"})
        self._waiting = [Drawn.of(one) for one in state.get("ahead", [])]

    async def _fill(self) -> None:
        while len(self._waiting) < self._depth:
            await self._draw(later=len(self._waiting) + 1)

    async def _draw(self, later: int = 0) -> None:
        self.later, before = later, states()
        try:
            groups = await self._inner.next()
        except BaseException:  # what is drawn again is drawn by the same dice
            put(before)
            raise
        self._waiting.append(Drawn(groups, self._inner.selected, dict(self._inner.metrics)))
