"""Whole runs of algorithms whose groups have further members: recorded, resumed bit for bit, and learning."""

from __future__ import annotations

import asyncio
import json
import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from rlft.build import assemble
from rlft.material import material
from rlft.session import begin, resume
from rlft.settings import load, validate
from rlft.source import Rollouts
from rlft.terminal import Terminal
from rlft.trainer import Run, train
from rlft.types import Group, Trajectory

pytestmark = pytest.mark.usefixtures("one_thread")

REWARD = '''
def even(trajectory):
    """The share of even token ids in what the policy chose."""
    sample = trajectory.samples[0]
    chosen = [token for token, mine in zip(sample.tokens, sample.mask) if mine]
    return sum(token % 2 == 0 for token in chosen) / max(len(chosen), 1)
'''
EVEN = "$&(*,.0"  # characters whose ids are even
HELPED = {
    "remax": {},
    "star": {"at_least": 0.7, "attempts": 2},
    "hint_rft": {"at_least": 0.7, "at": "[a-m]", "learn_hint": True},
    "hpt": {"gamma": 0.5, "demonstration": "solution"},
}


@pytest.fixture
def settings(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (tmp_path / "rlft_drawn_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    tasks = [{"prompt": f"Say {i}", "answer": EVEN[i], "solution": EVEN} for i in range(7)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return {
        "name": "drawn",
        "steps": 3,
        "model": {"path": str(tiny_model), "device": "cpu"},
        "adapter": {"type": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        "data": {"train": str(tmp_path / "train.jsonl")},
        "reward": {"type": "custom", "path": "rlft_drawn_reward:even"},
        "rollout": {"engine": {"type": "local"}, "tasks_per_step": 4, "group_size": 2, "sampling": {"max_tokens": 6}},
        "learner": {"lr": 0.01},
        "checkpoint": {"every": 1, "keep": 3},
        "show": {"every": 0},
    }


def written(settings: dict[str, Any], tmp_path: Path, name: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**settings, "algorithm": {"type": name, **HELPED[name]}}))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", HELPED)
def test_a_resumed_run_is_the_whole_one(settings: dict[str, Any], tmp_path: Path, name: str) -> None:
    """Trap 37, and what was drawn how is in the record."""
    config, quiet = written(settings, tmp_path, name), Terminal(Console(quiet=True))
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert begin(load(config, [f"out={whole}"]), quiet) == 0
    assert begin(load(config, [f"out={part}", "steps=2"]), quiet) == 0
    assert resume(part, ["steps=3"], quiet) == 0
    ends = [load_file(run / "checkpoints/step-000003/trained.safetensors") for run in (whole, part)]
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())
    numbers = set()
    for step in (1, 2, 3):
        first, second = (pq.read_table(run / f"rollouts/step-{step:06d}.parquet").to_pylist() for run in (whole, part))
        assert [(row["tokens"], row["drawn"], row["score"]) for row in first] == [
            (row["tokens"], row["drawn"], row["score"]) for row in second
        ]
        numbers |= {row["drawn"] for row in first}
    assert numbers == ({0, 1, 2} if name == "hint_rft" else {0, 1})
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert any(row["tokens/trained"] for row in rows)


class Quiet:
    """Hooks that do nothing."""

    async def before(self, start: int) -> None: ...

    async def after(self, step: int, groups: list[Group], chosen: list[Group], metrics: dict[str, float]) -> None: ...

    async def finish(self, step: int, stopped: bool) -> None: ...


def mean(groups: list[Group], drawn: int) -> float:
    def total(t: Trajectory) -> float:
        assert t.total is not None
        return t.total

    return statistics.fmean(total(t) for group in groups for t in group if t.drawn == drawn)


@pytest.mark.slow
def test_xpo_learns(settings: dict[str, Any], tmp_path: Path) -> None:
    """Real vLLM serving two policies: the one that is trained gets better, the reference beside it stays as it was."""
    rollout = {"engine": {"type": "vllm", "cache_gb": 0.1}, "tasks_per_step": 7, "group_size": 8,
               "sampling": {"max_tokens": 8}}  # fmt: skip
    algorithm = {"type": "xpo", "references": 8, "alpha": 1e-4, "min_margin": 0.25}
    config = validate({**settings, "steps": 25, "rollout": rollout, "algorithm": algorithm})
    stuff = material(config)
    parts = assemble(stuff, tmp_path / "engine.log")
    source: Any = parts.source
    assert isinstance(source, Rollouts)
    assert parts.kind == "adapter"

    async def learned() -> tuple[list[Group], list[Group]]:
        try:
            await parts.serve(0)
            before = await source.next()
            await train(Run(25, source, stuff.algorithm, parts.learner, parts.serve, Quiet()))
            return before, await source.next()
        finally:
            await parts.close()

    before, after = asyncio.run(learned())
    assert mean(after, 0) > mean(before, 0) + 0.1, (mean(before, 0), mean(after, 0))
    assert abs(mean(after, 1) - mean(before, 1)) < 0.12, (mean(before, 1), mean(after, 1))
