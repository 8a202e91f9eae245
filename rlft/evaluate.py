"""Held-out tasks on the same engine: greedy accuracy, and pass@k from samples at the run's temperature."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rlft.player import Player, derive_seed
from rlft.recover import surviving
from rlft.rollout import rollout
from rlft.types import Group, Reward, Task


@dataclass(frozen=True)
class Evaluation:
    """component: the reward component that equals 1 where the answer is correct. samples: k of pass@k, 1 for none.

    watch: is shown all groups once they are judged.
    """

    player: Player
    reward: Reward
    tasks: Sequence[Task]
    component: str
    samples: int
    seed: int
    deterministic: bool = True
    watch: Callable[[Sequence[Group]], None] = lambda groups: None

    async def __call__(self, step: int) -> tuple[dict[str, float], list[Group]]:
        """Metrics under `eval/`, and the greedy groups of one. A task without a verdict counts as not correct."""
        greedy = replace(self.player, sampling=replace(self.player.sampling, temperature=0.0, seed=0))
        groups, clock = await rollout(greedy, self.reward, self.tasks, 1, self.seed)
        self.watch(groups)
        metrics = summary([t for group in groups for t in group], self.component)
        seconds = clock.generate + clock.reward
        if self.samples > 1:
            drawn, clock = await rollout(
                self.player, self.reward, self.tasks, self.samples, derive_seed(self.seed, "pass", step)
            )
            self.watch(drawn)
            solved = [any(t.metrics.get(f"reward/{self.component}") == 1 for t in group) for group in drawn]
            metrics[f"eval/pass@{self.samples}"] = sum(solved) / len(solved)
            seconds += clock.generate + clock.reward
        if self.deterministic:
            await surviving(self.player.engine.forget)
        return metrics | {"time/eval": seconds}, groups


def win_rate(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """How often the score of a task is higher than before training, ties counted half, with a 95% interval.

    Scores by task id. The interval is Wilson's (1927), with a tie as half a win: it is never too narrow for that.
    """
    shared = before.keys() & after.keys()
    n = len(shared)
    if not n:
        return {}
    rate = sum((after[name] > before[name]) + 0.5 * (after[name] == before[name]) for name in shared) / n
    z = 1.959964
    middle = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return {"eval/win_rate": rate, "eval/win_rate_low": middle - half, "eval/win_rate_high": middle + half}


def summary(trajectories: list, component: str) -> dict[str, float]:
    """Accuracy, mean score and components of greedy answers."""
    n = len(trajectories)
    correct = sum(t.metrics.get(f"reward/{component}") == 1 for t in trajectories)
    scores = [t.total for t in trajectories if t.total is not None]
    metrics = {
        "eval/accuracy": correct / n,
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
