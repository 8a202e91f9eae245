"""Rewards that decide which other rewards are asked: gates, sequences, fall-backs and routes.

What need not be judged is not: a judge that costs money sees only what passed the cheap checks before it. Each function
makes a reward from built ones; the configs stand in `combined`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rlft.rewards.inside import forget, picked
from rlft.types import Group, Reward, Task, least

Verdicts = list[float | None]


@dataclass(frozen=True)
class Part:
    """A reward that is asked about some of a group. name: its component; components: all that it writes."""

    reward: Reward
    name: str
    components: Sequence[str]
    weight: float = 1.0
    at_least: float = 1.0

    async def ask(self, group: Group, places: Sequence[int]) -> dict[int, float | None]:
        """Its verdicts on the trajectories at these places, judged as one group, by place.

        Of the others what it wrote in an earlier judgement is taken back. Metric: `reward/<name>/asked`, 1 or 0.
        """
        forget(group, self.components)
        for place, trajectory in enumerate(group):
            trajectory.metrics[f"reward/{self.name}/asked"] = float(place in places)
        return dict(zip(places, await self.reward(picked(group, places)), strict=True))


def gated(gate: Reward, then: Part, otherwise: float) -> Reward:
    """The verdict of `then` where that of `gate` is `then.at_least` or more, else `otherwise`; None where either is."""

    async def judge(group: Group) -> Verdicts:
        passed = await gate(group)
        through = [i for i, verdict in enumerate(passed) if verdict is not None and verdict >= least(then.at_least)]
        found = await then.ask(group, through)
        return [None if verdict is None else found.get(i, otherwise) for i, verdict in enumerate(passed)]

    return judge


def staged(stages: Sequence[Part]) -> Reward:
    """The sum of weight times verdict over the stages up to the first that is not passed, that one included.

    A trajectory that is below a stage's `at_least` is not shown to the later ones. None where a stage that was reached
    has no verdict.
    """

    async def judge(group: Group) -> Verdicts:
        sums: Verdicts = [0.0] * len(group)
        left = list(range(len(group)))
        for stage in stages:
            verdicts = await stage.ask(group, left)
            for i, verdict in verdicts.items():
                before = sums[i]
                sums[i] = None if verdict is None or before is None else before + stage.weight * verdict
            left = [i for i, verdict in verdicts.items() if verdict is not None and verdict >= least(stage.at_least)]
        return sums

    return judge


def first_verdict(stages: Sequence[Part]) -> Reward:
    """Weight times the verdict of the first stage that has one; None where none has.

    Each is asked only about what the stages before it gave no score for. A failure is no score, and stays on record.
    """

    async def judge(group: Group) -> Verdicts:
        found: Verdicts = [None] * len(group)
        for stage in stages:
            left = [i for i, value in enumerate(found) if value is None]
            for i, verdict in (await stage.ask(group, left)).items():
                found[i] = None if verdict is None else stage.weight * verdict
        return found

    return judge


def routed(routes: Mapping[str, Part], route: Callable[[Task], str]) -> Reward:
    """The verdicts of the part that `route` names for the group's task."""

    async def judge(group: Group) -> Verdicts:
        chosen = route(group[0].task)
        everyone = list(range(len(group)))
        verdicts = {key: await part.ask(group, everyone if key == chosen else []) for key, part in routes.items()}
        return list(verdicts[chosen].values())

    return judge
