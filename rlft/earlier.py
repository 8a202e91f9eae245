"""Earlier versions of the policy as its opponents: which are kept, and in which episodes they play.

A policy that only meets itself may come to beat nobody else, or go round in a circle of strategies; one that also
meets what it was before is held to what it could do. Bansal et al. 2018 ("Emergent Complexity via Multi-Agent
Competition", arXiv:1710.03748) draw opponents from past versions likewise. Everything here is a function of version
and seed, so that a resumed run needs no state for it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlft.roles import restricted
from rlft.types import Group, Trajectory

PLAYED = "past/version"  # of a trajectory's opponent, where that is an earlier version
PAID = "past/reward"


@dataclass(frozen=True)
class Earlier:
    """`count` slots of earlier versions, one more filled after every `every` steps, from version 0 on; the oldest makes
    room. They play in a share `against` of the episodes, which have `roles` roles.
    """

    count: int
    every: int
    against: float
    roles: int

    def slot(self, version: int) -> int:
        """Where a version that is kept stands."""
        return version // self.every % self.count

    def kept(self, version: int) -> list[int]:
        """The versions that fill slots once the engine serves `version`, oldest first."""
        newest = version // self.every
        return [self.every * number for number in range(max(0, newest - self.count + 1), newest + 1)]

    def opponent(self, seed: int, version: int) -> tuple[int, int] | None:
        """The current policy's role in an episode, and the version that plays all others; None: it plays them all."""
        chance = random.Random(f"past/{seed}")
        if chance.random() >= self.against:
            return None
        return chance.randrange(self.roles), chance.choice(self.kept(version))


def learned(groups: Sequence[Group], agents: int) -> list[Group]:
    """What there is to learn from: the samples of the `agents` that are trained, in episodes that are judged already.

    What others earned in an episode of one total counts there as before. Episodes that failed stay as they are.
    """
    own = [tuple(mine for t in group if (mine := _own(t, agents)) is not None) for group in groups]
    return [group for group in own if group]


def _own(judged: Trajectory, agents: int) -> Trajectory | None:
    """None where no sample is left."""
    if judged.failed:
        return judged
    whole = judged.total
    left = restricted(judged, lambda sample: sample.agent < agents) if _mixed(judged, agents) else judged
    if not left.samples:
        return None
    if whole is None or PLAYED not in left.metrics:
        return left
    paid = sum(sum(sample.rewards) for sample in left.samples)
    return replace(left, score=whole - paid, metrics=left.metrics | {PAID: whole})


def _mixed(judged: Trajectory, agents: int) -> bool:
    return any(sample.agent >= agents for sample in judged.samples)
