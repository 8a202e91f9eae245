"""Episodes in which roles are paid each for itself: every role's part is a trajectory, and its like its group.

In a game that one wins and the other loses, the sum of an episode says nothing, and a role's chances are not the
other's. So each role is compared with itself in the group's other episodes: the mean of those is the baseline of that
role in that game, as the role-conditioned baseline of SPIRAL (Liu et al. 2025, arXiv:2506.24119) is, which is a moving
average over steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from rlft.types import Group, Sample, Trajectory

OF_ROLE = re.compile(r"env/([0-9]+)/(.+)")


def by_role(episodes: Sequence[Trajectory]) -> list[Group]:
    """A group for every role that spoke, in the roles' order. Episodes that failed stay whole, in the first."""
    parts: dict[int, list[Trajectory]] = {}
    for episode in episodes:
        roles = {0} if episode.failed else {episode.samples[turn.sample].role for turn in episode.said}
        for role in sorted(roles):
            parts.setdefault(role, []).append(episode if episode.failed else _part(episode, role))
    return [tuple(parts[role]) for role in sorted(parts)]


def _part(episode: Trajectory, role: int) -> Trajectory:
    """What one role was shown, said and earned."""
    own = restricted(episode, lambda sample: sample.role == role)
    last = own.said[-1]
    return replace(
        own,
        messages=last.messages,
        metrics=_metrics(episode.metrics, role),
        finish=last.finish if episode.cut in ("", "answer") else "length",
        failures=list(episode.failures),
    )


def restricted(episode: Trajectory, mine: Callable[[Sample], bool]) -> Trajectory:
    """With the samples that are `mine` alone, the turns in them, and what was paid for those."""
    own = [i for i, sample in enumerate(episode.samples) if mine(sample)]
    samples = [episode.samples[i] for i in own]
    return replace(
        episode,
        samples=samples,
        said=tuple(replace(turn, sample=own.index(turn.sample)) for turn in episode.said if turn.sample in own),
        paid={name: [(own.index(i), j, x) for i, j, x in some if i in own] for name, some in episode.paid.items()},
        sampled=sum(sum(sample.mask) for sample in samples),
    )


def _metrics(metrics: dict[str, float], role: int) -> dict[str, float]:
    """Everybody's, and the role's own under their plain names."""
    named = [(OF_ROLE.fullmatch(name), name, value) for name, value in metrics.items()]
    shared = {name: value for found, name, value in named if not found}
    return shared | {f"env/{found[2]}": value for found, _, value in named if found and int(found[1]) == role}
