"""A reward for every turn: any reward judges the trajectory as it stood after each turn, and is paid where it ended.

What is paid stands in the samples' `rewards`, at the last token of the turn that earned it, beside what the environment
paid, so that `Trajectory.total` counts it once. Every turn is judged once, together with the same turn of the group's
other trajectories.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

from rlft.rewards.base import pay
from rlft.types import Group, Reward, Said, Sample, Trajectory

Shares = Callable[[Sequence[float]], list[float]]


def each_its_own(verdicts: Sequence[float]) -> list[float]:
    """Every turn its verdict; the total is their sum. Two agents' shared reward (CORY, arXiv:2410.06101, eq. 4)."""
    return list(verdicts)


def improvement(verdicts: Sequence[float]) -> list[float]:
    """The first turn its verdict, every other one what it gained on the turn before; the total is the last verdict.

    Shaping by a potential (Ng et al. 1999) that is the verdict on the answer at hand.
    """
    return [*verdicts[:1], *(after - before for before, after in pairwise(verdicts))]


def last_only(verdicts: Sequence[float]) -> list[float]:
    """Nothing before the last turn."""
    return [0.0] * (len(verdicts) - 1) + list(verdicts[-1:])


PAY: dict[str, Shares] = {"sum": each_its_own, "improvement": improvement, "last": last_only}


def turn_by_turn(inner: Reward, name: str, components: Sequence[str], share: str, weight: float = 1.0) -> Reward:
    """A reward that pays the verdicts of `inner`, times `weight`, where the turns end, and itself returns 0.

    It returns None, and pays nothing, where any turn has no verdict. The metrics of the last turn become the
    trajectory's; those of the first stand beside them as `reward/<component>/first`. Judging a trajectory again
    replaces what was paid under `name`.
    """

    async def reward(group: Group) -> list[float | None]:
        parts = [[until(trajectory, turn) for turn in trajectory.turns] for trajectory in group]
        verdicts = await _judged(inner, parts)
        found: list[float | None] = []
        for trajectory, turns, own in zip(group, parts, verdicts, strict=True):
            present = [verdict for verdict in own if verdict is not None]
            whole = len(present) == len(own) and bool(own)
            shares = [weight * part for part in PAY[share](present)] if whole else []
            ends = [(turn.sample, turn.end) for turn in trajectory.turns[: len(shares)]]
            pay(trajectory, name, [(*end, amount) for end, amount in zip(ends, shares, strict=True)])
            _log(trajectory, turns, components, missing=not whole)
            found.append(0.0 if whole else None)
        return found

    return reward


def until(trajectory: Trajectory, turn: Said) -> Trajectory:
    """The trajectory as it stood when the policy had said `turn`: messages, samples and tokens up to there."""
    samples = [_cut(sample, len(sample.tokens)) for sample in trajectory.samples[: turn.sample]]
    samples.append(_cut(trajectory.samples[turn.sample], turn.end + 1))
    turns = trajectory.turns
    place = turns.index(turn)
    finish = trajectory.finish if place == len(turns) - 1 else "stop"
    changes = {"messages": turn.messages, "samples": samples, "finish": finish, "said": turns[: place + 1]}
    return replace(trajectory, **changes, score=None, metrics={}, paid={}, failures=[])


def _cut(sample: Sample, end: int) -> Sample:
    lists = (sample.tokens[:end], sample.mask[:end], sample.logprobs[:end], sample.rewards[:end])
    return Sample(*lists, version=sample.version, agent=sample.agent, role=sample.role)


async def _judged(inner: Reward, parts: Sequence[Sequence[Trajectory]]) -> list[list[float | None]]:
    """The verdict on every turn of every trajectory; those with the same number are judged as one group."""
    columns = [
        tuple(own[i] for own in parts if i < len(own)) for i in range(max((len(own) for own in parts), default=0))
    ]
    judged = [iter(verdicts) for verdicts in await asyncio.gather(*(inner(column) for column in columns))]
    return [[next(judged[i]) for i in range(len(own))] for own in parts]


def _log(trajectory: Trajectory, turns: Sequence[Trajectory], components: Sequence[str], missing: bool) -> None:
    for component in components:  # of an earlier judgement
        trajectory.metrics.pop(f"reward/{component}", None)
    others = [failure for failure in trajectory.failures if failure.reward not in components]
    trajectory.failures = [*others, *(failure for turn in turns for failure in turn.failures)]
    if turns:
        trajectory.metrics.update(turns[-1].metrics)
        first = turns[0].metrics.items()
        trajectory.metrics.update({f"{key}/first": value for key, value in first if key != "reward/missing"})
    trajectory.metrics["reward/missing"] = float(missing)
