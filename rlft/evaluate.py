"""Held-out tasks on the same engine: greedy accuracy, and from samples at the run's temperature pass@k and their vote.

Every share of tasks has its 95% interval beside it, see `interval`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rlft.interval import counted, rated
from rlft.player import Player, derive_seed
from rlft.recover import surviving
from rlft.rollout import rollout
from rlft.types import Group, Reward, Task, Trajectory, at_step
from rlft.vote import Vote


@dataclass(frozen=True)
class Evaluation:
    """component: the reward component that equals 1 where the answer is correct. samples: k of pass@k, 1 for none.

    vote: how the k samples are put together, if they are. watch: is shown all groups once they are judged.
    """

    player: Player
    reward: Reward
    tasks: Sequence[Task]
    component: str
    samples: int
    seed: int
    deterministic: bool = True
    watch: Callable[[Sequence[Group]], None] = lambda groups: None
    vote: Vote | None = None

    async def __call__(self, step: int) -> tuple[dict[str, float], list[Group]]:
        """Metrics under `eval/`, and the greedy groups of one. A task without a verdict counts as not correct.

        step: that the policy stands after; rewards that change over the steps judge as they did in it.
        """
        with at_step(step):
            return await self._at(step)

    async def _at(self, step: int) -> tuple[dict[str, float], list[Group]]:
        greedy = replace(self.player, sampling=replace(self.player.sampling, temperature=0.0, seed=0))
        groups, clock = await rollout(greedy, self.reward, self.tasks, 1, self.seed)
        self.watch(groups)
        metrics = summary([t for group in groups for t in group], self.component)
        seconds = clock.generate + clock.reward
        if self.samples > 1:
            drawn, more = await self._drawn(step)
            metrics |= drawn
            seconds += more
        if self.deterministic:
            await surviving(self.player.engine.forget)
        return metrics | {"time/eval": seconds}, groups

    async def _drawn(self, step: int) -> tuple[dict[str, float], float]:
        """What several samples of each task come to, and the seconds that it took."""
        groups, clock = await rollout(
            self.player, self.reward, self.tasks, self.samples, derive_seed(self.seed, "pass", step)
        )
        begun = time.perf_counter()
        metrics = counted(f"eval/pass@{self.samples}", [any(map(self._right, group)) for group in groups])
        if self.vote is not None:
            metrics |= await self.vote(groups, self._right)
        self.watch(groups)
        return metrics, clock.generate + clock.reward + time.perf_counter() - begun

    def _right(self, trajectory: Trajectory) -> bool:
        return right(trajectory, self.component)


def win_rate(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """How often the score of a task is higher than before training, ties counted half, with a 95% interval.

    Scores by task id. The interval is Wilson's (1927), with a tie as half a win: it is never too narrow for that.
    """
    shared = before.keys() & after.keys()
    n = len(shared)
    if not n:
        return {}
    rate = sum((after[name] > before[name]) + 0.5 * (after[name] == before[name]) for name in shared) / n
    return rated("eval/win_rate", rate, n)


def right(trajectory: Trajectory, component: str) -> bool:
    """Whether the answer is correct. No verdict is not."""
    return trajectory.metrics.get(f"reward/{component}") == 1


def summary(trajectories: list, component: str) -> dict[str, float]:
    """Accuracy, mean score and components of greedy answers."""
    n = len(trajectories)
    scores = [t.total for t in trajectories if t.total is not None]
    metrics = counted("eval/accuracy", [right(t, component) for t in trajectories]) | {
        "eval/tasks": float(n),
        "eval/reward": sum(scores) / len(scores) if scores else math.nan,
        "eval/tokens_mean": sum(t.length for t in trajectories) / n,
        "eval/truncated": sum(t.finish == "length" for t in trajectories) / n,
    }
    for name in sorted({key for t in trajectories for key in t.metrics if key.startswith("reward/")}):
        values = [t.metrics[name] for t in trajectories if name in t.metrics]
        metrics[f"eval/{name.removeprefix('reward/')}"] = sum(values) / len(values)
    metrics["eval/missing"] = sum(t.total is None for t in trajectories) / n
    if failed := sum(bool(t.failures) for t in trajectories):
        metrics["eval/failed"] = failed / n
    return metrics
