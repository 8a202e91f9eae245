"""A recorded run's steps again, with other rewards or another objective on the same trajectories, and what changes.

Nothing is sampled and nothing is learned. Step n is computed where the run computed it, at the parameters of version
n - 1: the base for step 1, else the checkpoint of that version, or the nearest one there is, which is said.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from torch import Tensor

from rlft.algorithms.base import Algorithm, Metrics, Outputs, fixed
from rlft.batch import Batch, note_advantages
from rlft.build import make_learner, make_policy
from rlft.checkpoint import Checkpoints, restore, restore_policy
from rlft.config import Config
from rlft.draws import waits
from rlft.learner import Learner
from rlft.material import material
from rlft.rewards.base import pay
from rlft.session import of_run
from rlft.track import read_groups
from rlft.types import Group, InputError, Reward, Task, Trajectory, at_step

CHANGEABLE = ("reward", "algorithm", "teacher", "reference", "learner")
ROUNDING = 1e-6  # two numbers closer than this count as the same
Watch = Callable[[Outputs, Batch, Tensor], None]


@dataclass(frozen=True)
class Taken:
    """An optimizer step that was computed and not taken.

    batch: with its advantages. gradients: of the policy's parameters, by name, on the CPU.
    """

    batch: Batch
    loss: float
    gradients: Mapping[str, Tensor]

    @property
    def norm(self) -> float:
        """Of the gradient, before clipping."""
        return math.sqrt(_dot(self.gradients, self.gradients))


class Bench:
    """A config's algorithm and learner, which is brought to the version that a step was computed at."""

    def __init__(self, run: Path, config: Config, own: Bench | None = None) -> None:
        if config.agents.count > 1:
            raise InputError(
                "agents.count: a step of several agents is not computed again; look at its rows in rollouts/, where "
                "the column agent says whose each is"
            )
        if config.agents.past and not config.env.rivals:
            raise InputError(
                "agents.past: a step is not computed again where earlier versions had a part in the totals, since what "
                "they said is not recorded; look at its rows in rollouts/"
            )
        self.config = config
        self.material = material(config)
        self.algorithm = self.material.algorithm
        self._checkpoints = Checkpoints(run / "checkpoints", 1)
        self._whole = own is None or (self.algorithm.owned, config.reference) == (
            own.algorithm.owned,
            own.config.reference,
        )
        if own is not None and config.model_copy(update={"reward": own.config.reward}) == own.config:
            self.learner = own.learner  # another reward is no reason to load the model twice
        else:
            self.learner = make_learner(self.material, make_policy(config, self.material.model), dropout=False)
        self._at = 0

    def tasks(self) -> dict[str, Task]:
        """What was played, by id."""
        written = [group[0].task for group in self.material.groups]
        return {task.id: task for task in [*self.material.tasks, *written]}

    def nearest(self, version: int) -> int:
        """The version there is that is nearest to `version`; the older of two. Version 0 is always there."""
        return min([0, *self._checkpoints.steps()], key=lambda have: abs(have - version))

    def bring(self, version: int) -> None:
        """To a version that `nearest` named, and never back to 0."""
        if version == self._at:
            return
        folder = self._checkpoints.path(version)
        if self._whole:
            restore(folder, self.learner, None)
        else:
            restore_policy(folder, self.learner)
        self._at = version

    def take(self, groups: Sequence[Group], watch: Watch | None = None) -> Taken:
        """What the algorithm makes of a step's groups, all of its samples as one optimizer step."""
        algorithm = self.algorithm.at(self.learner.remembered)
        return take(self.learner, algorithm, chosen(algorithm, groups), watch)


def chosen(algorithm: Algorithm, groups: Sequence[Group]) -> list[Group]:
    """What the algorithm trains on; where it samples on until there is enough, it was asked group by group."""
    if algorithm.refill:
        return [part for group in groups for part in algorithm.select([group])]
    return algorithm.select(groups)


def take(learner: Learner, algorithm: Algorithm, groups: Sequence[Group], watch: Watch | None = None) -> Taken:
    """Loss and gradient of selected groups; their trajectories' metrics get `advantage/mean`.

    watch: is shown the loss of every micro-batch, before its gradient is taken.
    """
    batch = Batch.of(groups)
    credited: list[Batch] = []
    losses: list[float] = []

    def credit(filled: Batch) -> Batch:
        credited.append(algorithm.credit(filled))
        return credited[-1]

    def loss(outputs: Outputs, part: Batch) -> tuple[Tensor, Metrics]:
        value, metrics = algorithm.loss(outputs, part)
        losses.append(float(value.detach()))
        if watch is not None:
            watch(outputs, part, value)
        return value, metrics

    if not len(batch) or not batch.mask.any():
        return Taken(batch, 0.0, {})
    watched = replace(algorithm, credit=credit, loss=loss, revise=fixed)
    found = learner.gradients(batch, watched)
    note_advantages(credited[-1], groups)
    own = {name: gradient.cpu() for name, gradient in found.items() if not name.startswith("own.")}
    return Taken(credited[-1], sum(losses), own)


def replay(run: Path, overrides: Sequence[str], steps: str | None) -> dict[str, Any]:
    """What the overrides change in the steps `steps` ("3", "3-7", None: all of them), as plain numbers for JSON.

    Raises InputError for what cannot be replayed.
    """
    own = Bench(run, of_run(run))
    other = Bench(run, _changed(run, own.config, overrides), own) if overrides else own
    files = recorded(run, steps)
    norms = _norms(run)
    _refuse_other_draws(own, other, files)
    tasks = own.tasks()
    found = [_step(own, other, step, file, tasks) for step, file in files.items()]
    for report in found:
        report["gradient"]["recorded_norm"] = norms.get(report["step"])
    return {"run": str(run), "overrides": list(overrides), "scored_anew": _anew(own, other), "steps": found}


def recorded(run: Path, steps: str | None) -> dict[int, Path]:
    """The files of the steps that are asked for, oldest first. Raises InputError where there is none."""
    have = {int(file.stem[5:]): file for file in sorted((run / "rollouts").glob("step-*.parquet"))}
    if not have:
        raise InputError(f"{run} has no rollouts yet; there is nothing to look at")
    first, _, last = (steps or f"{min(have)}-{max(have)}").partition("-")
    if not (first.isdecimal() and (last or first).isdecimal()):
        raise InputError(f"--steps: {steps!r} is neither a step nor a range such as 3-7")
    picked = {step: file for step, file in have.items() if int(first) <= step <= int(last or first)}
    if not picked:
        raise InputError(f"--steps: {run} has rollouts of steps {min(have)} to {max(have)}, none in {steps}")
    return picked


def _changed(run: Path, own: Config, overrides: Sequence[str]) -> Config:
    for override in overrides:
        block = override.partition("=")[0].partition(".")[0].strip()
        if block not in CHANGEABLE:
            raise InputError(
                f"{block}: the trajectories are recorded, so a replay changes nothing but {', '.join(CHANGEABLE)}; "
                "for anything else, train a new run"
            )
    config = of_run(run, list(overrides))
    if config.online != own.online:
        raise InputError(
            f"algorithm.type: {own.algorithm.type} and {config.algorithm.type} do not learn from the same: one from "
            "its own samples, the other from recorded data; choose one of the same kind"
        )
    if not own.online and config.reward != own.reward:
        raise InputError("reward: this run learned from recorded data, whose scores no reward gave; leave reward alone")
    return config


def _refuse_other_draws(own: Bench, other: Bench, files: Mapping[int, Path]) -> None:
    if own.algorithm.draws == other.algorithm.draws:
        return
    drawn = any(max(pq.read_table(file, columns=["drawn"])["drawn"].to_pylist()) for file in files.values())
    if drawn or other.algorithm.draws:
        raise InputError(
            "algorithm: with these settings the members of a group are drawn in other ways than the run drew them; "
            "choose an algorithm with the same draws, or train a new run"
        )


def _anew(own: Bench, other: Bench) -> bool:
    """Whether the rewards are asked again: where they changed, or to see that they say what they said."""
    return own.config.online and (own is other or own.config.reward != other.config.reward)


def _step(own: Bench, other: Bench, step: int, file: Path, tasks: Mapping[str, Task]) -> dict[str, Any]:
    """One step, by the run's own config and by the other one."""
    before, groups = read_groups(file, tasks), read_groups(file, tasks)
    advantages = _advantages(before)
    scores = _components(before)
    for group in before:
        for trajectory in group:
            trajectory.metrics.pop("advantage/mean", None)
    for trajectory in (t for group in groups for t in group):
        trajectory.metrics.pop("advantage/mean", None)
    if _anew(own, other):
        with at_step(step):
            asyncio.run(_score(groups, other.config, own.algorithm))
    used = own.nearest(step - 1)
    own.bring(used)
    first = own.take(before)
    other.bring(used)
    second = other.take(groups)
    return {
        "step": step,
        "version": step - 1,
        "used": used,
        "exact": used == step - 1,
        "rewards": [{"name": name, **_compared(*columns)} for name, *columns in _paired(scores, _components(groups))],
        "advantages": {
            **_compared(advantages, _advantages(groups)),
            "reproduced": _largest(advantages, _advantages(before)),
        },
        "gradient": {
            "own_norm": first.norm,
            "norm": second.norm,
            "cosine": _cosine(first, second),
            "own_loss": first.loss,
            "loss": second.loss,
        },
    }


async def _score(groups: Sequence[Group], config: Config, algorithm: Algorithm) -> None:
    """Judge again, in the parts in which a group was judged: what waited for the others' scores came after them."""
    reward: Reward | None = config.reward.build() if config.reward else None
    for group in groups:
        for trajectory in group:
            _clear(trajectory)
        late = [bool(t.drawn) and waits(algorithm.draws[t.drawn - 1]) for t in group]
        for part in (False, True):
            members = tuple(t for t, after in zip(group, late, strict=True) if after == part)
            verdicts = await reward(members) if reward and members else [0.0] * len(members)
            for trajectory, verdict in zip(members, verdicts, strict=True):
                trajectory.score = verdict


def _clear(trajectory: Trajectory) -> None:
    """Forget what rewards said; what the environment paid stays."""
    for name in list(trajectory.paid):
        pay(trajectory, name, [])
    trajectory.metrics.clear()


Column = dict[tuple[int, int], float]  # by group and trajectory; only where there is a value


def _advantages(groups: Sequence[Group]) -> Column:
    return _column(groups, lambda t: t.metrics.get("advantage/mean"))


def _components(groups: Sequence[Group]) -> dict[str, Column]:
    """Every reward component, and the total as `score`."""
    names = sorted({key for group in groups for t in group for key in t.metrics if key.startswith("reward/")})
    parts = {name.removeprefix("reward/"): _column(groups, lambda t, n=name: t.metrics.get(n)) for name in names}
    return {**parts, "score": _column(groups, lambda t: t.total)}


def _column(groups: Sequence[Group], value: Callable[[Trajectory], float | None]) -> Column:
    found = {(g, i): value(t) for g, group in enumerate(groups) for i, t in enumerate(group)}
    return {place: number for place, number in found.items() if number is not None}


def _paired(before: Mapping[str, Column], after: Mapping[str, Column]) -> list[tuple[str, Column, Column]]:
    """The columns of both by name; `score` last, `missing` only where something is."""
    names = sorted({*before, *after}, key=lambda name: (name == "score", name))
    pairs = [(name, before.get(name, {}), after.get(name, {})) for name in names]
    return [pair for pair in pairs if pair[0] != "missing" or any([*pair[1].values(), *pair[2].values()])]


def _compared(before: Column, after: Column) -> dict[str, Any]:
    """Means, how many there are, how many are not the same, with how many of another sign; the largest difference."""
    places = sorted({*before, *after})
    both = [(before[p], after[p]) for p in places if p in before and p in after]
    moved = sum(abs(a - b) > ROUNDING for a, b in both) + len(places) - len(both)
    return {
        "recorded": _mean(before.values()),
        "replayed": _mean(after.values()),
        "recorded_size": _mean(map(abs, before.values())),
        "replayed_size": _mean(map(abs, after.values())),
        "recorded_rows": len(before),
        "replayed_rows": len(after),
        "changed": moved,
        "flipped": sum(a * b < 0 for a, b in both),
        "largest": _largest(before, after),
    }


def _largest(before: Column, after: Column) -> float | None:
    return max((abs(before[place] - after[place]) for place in before if place in after), default=None)


def _mean(values: Any) -> float | None:
    found = list(values)
    return math.fsum(found) / len(found) if found else None


def _dot(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> float:
    return math.fsum(float(torch.sum(g.double() * two[name].double())) for name, g in one.items() if name in two)


def _cosine(one: Taken, two: Taken) -> float | None:
    """Of the angle between two gradients of the policy; None where one of them is zero."""
    size = one.norm * two.norm
    return _dot(one.gradients, two.gradients) / size if size else None


def _norms(run: Path) -> dict[int, float]:
    """The gradients' norms in metrics.jsonl, by step; the later row of a step counts."""
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {row["step"]: row["loss/grad_norm"] for row in rows if row.get("loss/grad_norm") is not None}
