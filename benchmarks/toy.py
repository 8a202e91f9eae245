"""Every algorithm of the catalog on one toy task, through the one loop: does it learn, and how far in 30 steps?

The policy is a random model of 0.1M parameters, the reward the share of even token ids in what it says (0.5 by chance).
Online algorithms sample for themselves; recorded ones get 64 groups that the untrained policy sampled, the scores
included. Teachers are a policy that was trained first. Figures: the mean reward of fresh samples, before and after.

    python -m benchmarks.toy [--only NAME ...] [--seeds N] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import string
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import rlft  # noqa: F401  (first: it says how torch's threads wait)

# isort: split
import torch

from rlft.algorithms.catalog import entries
from rlft.build import Parts, assemble
from rlft.material import material
from rlft.player import derive_seed
from rlft.settings import validate
from rlft.source import Recorded, Rollouts
from rlft.trainer import Run, train
from rlft.types import NAN, Group, Trajectory

STEPS, TOKENS = 30, 8
# Entries whose knobs have no default, or whose default is for another kind of data.
KNOBS: dict[str, dict[str, Any]] = {
    "rejection": {"at_least": 0.0},
    "gflownet": {"beta": 0.03},
    "star": {"at_least": 0.75, "attempts": 4},
    "hint_rft": {"at_least": 0.75, "attempts": 2},
    "hpt": {"gamma": 0.5, "demonstration": "solution"},
}
# An entry that needs another world than one answer, and another world for an entry, under a name of its own. A letter
# ends an answer, so that there is a turn after it.
EVEN: dict[str, Any] = {"type": "custom", "path": "benchmarks.toy:even"}
ODD: dict[str, Any] = {"type": "custom", "path": "benchmarks.toy:odd"}
EACH: dict[str, Any] = {"type": "per_turn", "of": EVEN}
WORLDS: dict[str, dict[str, Any]] = {
    "rise": {"env": {"type": "retry"}, "reward": EACH, "stop": tuple(string.ascii_letters)},
    "gigpo": {"env": {"type": "retry"}, "reward": EACH, "stop": tuple(string.ascii_letters)},
    "dpa": {
        "reward": {"type": "directed", "of": {"type": "weighted", "terms": {"even": EVEN, "odd": ODD}}},
        "direction": {"components": ("even", "odd"), "arc": (0, 45)},
    },
    "cory": {"env": {"type": "pioneer_observer"}, "reward": EACH, "algorithm": {"type": "grpo"}},
    "cory_two": {
        "env": {"type": "pioneer_observer"},
        "reward": EACH,
        "algorithm": {"type": "grpo"},
        "agents": {"count": 2, "exchange": 5},
    },
}
# Not policies: a reward model scores, and says nothing. Their accuracy is measured in tests/algorithms/.
NOT_POLICIES = {"custom", "reward_model", "process_reward"}
# Samples from the policy before training, which the local engine does not have; tests/test_drawn_runs.py has it learn.
ELSEWHERE = {"xpo"}
SOLUTION = "$&(*,.0"  # characters whose token ids are even


def even(trajectory: Trajectory) -> float:
    """The share of even token ids among those that the policy chose in its last answer."""
    *earlier, last = trajectory.turns
    start = earlier[-1].end + 1 if earlier and earlier[-1].sample == last.sample else 0
    sample = trajectory.samples[last.sample]
    chosen = [token for token, mine in zip(sample.tokens[start:], sample.mask[start:], strict=True) if mine]
    return sum(token % 2 == 0 for token in chosen) / max(len(chosen), 1)


def odd(trajectory: Trajectory) -> float:
    """The share of odd ones."""
    return 1.0 - even(trajectory)


@dataclass
class Quiet:
    """Hooks that keep every step's mean reward."""

    rewards: list[float] = field(default_factory=list)

    async def before(self, start: int) -> None: ...

    async def after(self, step: int, groups: list[Group], chosen: list[Group], metrics: dict[str, float]) -> None:
        totals = [t.total for group in groups for t in group if t.total is not None]
        self.rewards.append(statistics.fmean(totals) if totals else NAN)

    async def finish(self, step: int, stopped: bool) -> None: ...


def _config(name: str, seed: int, folder: Path, teacher: Path | None) -> Any:
    rows = folder / "tasks.jsonl"
    tasks = [{"prompt": f"Say {i}", "answer": SOLUTION[i % 7], "solution": SOLUTION} for i in range(32)]
    rows.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    world = WORLDS.get(name, {})
    algorithm = {"type": name, **KNOBS.get(name, {}), **world.get("algorithm", {})}
    kind = entries()[algorithm["type"]](**algorithm, **({"path": "-"} if name == "custom" else {}))
    size = max(8, kind.group_size_min)
    settings: dict[str, Any] = {
        "name": name,
        "steps": STEPS,
        "seed": seed,
        "model": {"path": "tiny-random"},
        "adapter": {"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "data": {"train": str(rows), "direction": world.get("direction")},
        "env": world.get("env", {"type": "single_turn"}),
        "agents": world.get("agents", {}),
        "reward": world.get("reward", EVEN),
        "rollout": {"engine": {"type": "local"}, "tasks_per_step": 8, "group_size": size,
                    "sampling": {"max_tokens": TOKENS, "stop": world.get("stop", ())}},
        "algorithm": algorithm,
        "learner": {"lr": 0.01},
    }  # fmt: skip
    if kind.teacher:
        settings["teacher"] = {"path": str(teacher)}
    return validate(settings)


def _unsampled(groups: list[Group]) -> list[Group]:
    """As recorded data: nobody's log-probs, no version."""

    def plain(t: Trajectory) -> Trajectory:
        return replace(t, samples=[replace(s, logprobs=[NAN] * len(s.tokens), version=-1) for s in t.samples])

    return [tuple(map(plain, group)) for group in groups]


async def _mean(parts: Parts, source: Rollouts) -> float:
    """The mean reward of 128 fresh samples, per answer."""
    groups = await source.next() + await source.next()
    return statistics.fmean(t.total / len(t.turns) for group in groups for t in group if t.total is not None)


async def _learn(name: str, seed: int, folder: Path, teacher: Path | None, keep: Path | None) -> dict[str, float]:
    config = _config(name, seed, folder, teacher)
    sampler = config if config.online else validate(_sampling(config))
    stuff = replace(material(sampler), algorithm=config.algorithm.build())
    parts = assemble(stuff, None)
    try:
        await parts.serve(0)
        fresh: Any = _fresh(parts, derive_seed(seed, "measure"))
        before = await _mean(parts, fresh)
        source: Any = parts.source
        if not config.online:
            recorded = [group for _ in range(8) for group in await fresh.next()]
            source = Recorded(_unsampled(recorded), config.rollout.tasks_per_step, seed)
        await train(Run(STEPS, source, stuff.algorithm, parts.trainee, parts.serve, Quiet()))
        after = await _mean(parts, fresh)
        if keep is not None:
            parts.policy.save_merged(keep)
            stuff.chat.tokenizer.save_pretrained(str(keep))
    finally:
        await parts.close()
    return {"before": before, "after": after}


def _sampling(config: Any) -> dict[str, Any]:
    """The same run for an algorithm that samples: only its engine and its reward are used."""
    settings = config.model_dump(mode="json")
    return {**settings, "algorithm": {"type": "grpo"}, "teacher": None}


def _fresh(parts: Parts, seed: int) -> Rollouts:
    inner: Any = parts.source
    while not isinstance(inner, Rollouts):
        inner = inner._inner
    return Rollouts(inner._tasks, inner._player, inner._reward, inner._count, inner._group_size, seed)


def measure(names: Sequence[str], seeds: int) -> dict[str, list[dict[str, float]]]:
    """Per entry and seed, the mean reward before and after."""
    torch.set_num_threads(1)
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        teacher = folder / "teacher"
        if any(entries()[name].model_construct().teacher for name in names if name in entries()):
            asyncio.run(_learn("grpo", 0, folder, None, teacher))
        for name in names:
            found[name] = [asyncio.run(_learn(name, seed, folder, teacher, None)) for seed in range(seeds)]
            print(_line(name, found[name]), flush=True)
    return found


def _line(name: str, runs: list[dict[str, float]]) -> str:
    ends = [run["after"] for run in runs]
    before = statistics.fmean(run["before"] for run in runs)
    return f"| `{name}` | {before:.2f} | {statistics.fmean(ends):.2f} | {min(ends):.2f} to {max(ends):.2f} |"


def main() -> None:
    """Print a table in Markdown, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    names = asked.only or [
        name for name in (*entries(), *WORLDS.keys() - entries()) if name not in NOT_POLICIES | ELSEWHERE
    ]
    print("| `type` | before | after | over the seeds |\n|---|---|---|---|")
    found = measure(names, asked.seeds)
    if asked.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
