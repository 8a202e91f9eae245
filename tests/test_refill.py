"""Whole runs of an algorithm that samples on: full steps, every group trained on once, and a resume bit for bit."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from rlft.algorithms import credit, filtering, select, weigh
from rlft.algorithms.base import Algorithm, Owned
from rlft.algorithms.losses import policy
from rlft.build import assemble
from rlft.material import material
from rlft.session import begin, resume
from rlft.settings import load
from rlft.terminal import Terminal

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, TASKS = 5, 3
REWARD = '''
def odd(trajectory):
    """Whether the first sampled token's id is odd: half of all groups of two agree."""
    sample = trajectory.samples[0]
    return float(sample.tokens[sample.mask.index(True)] % 2)
'''


def growing() -> Algorithm:
    """Takes everything in its first step, later what is right."""

    def revise(numbers: Mapping[str, float]) -> Mapping[str, Any]:
        return {"select": filtering.threshold(1.0)} if numbers["steps"] else {}

    return Algorithm(
        select.everything, credit.uniform, weigh.by_token, policy.likelihood, refill=True, revise=revise,
        owned=Owned(remembered={"steps": 0.0}),
    )  # fmt: skip


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rlft_refill_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"ask": f"Say {i}"}) + "\n" for i in range(7)))
    settings = {
        "name": "refill",
        "steps": STEPS,
        "model": {"path": str(tiny_model), "device": "cpu"},
        "adapter": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "data": {"train": str(tmp_path / "train.jsonl"), "columns": {"prompt": "ask"}},
        "reward": {"type": "custom", "path": "rlft_refill_reward:odd"},
        "rollout": {
            "engine": {"type": "local"},
            "tasks_per_step": TASKS,
            "group_size": 2,
            "sampling": {"max_tokens": 3},
        },
        "algorithm": {"type": "dapo", "mask_truncated": False},
        "learner": {"lr": 1e-3},
        "checkpoint": {"every": 1, "keep": STEPS},
        "show": {"every": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def train(config: Path, out: Path, *overrides: str) -> Path:
    assert begin(load(config, [f"out={out}", *overrides]), Terminal(Console(quiet=True))) == 0
    return out


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def groups(run: Path, step: int) -> list[list[dict[str, Any]]]:
    """The recorded samples of a step by group."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in pq.read_table(run / f"rollouts/step-{step:06d}.parquet").to_pylist():
        found.setdefault(row["group"], []).append(row)
    return list(found.values())


def test_every_step_is_full_and_a_resumed_run_is_the_whole_one(config: Path, tmp_path: Path) -> None:
    whole = train(config, tmp_path / "whole")
    metrics = rows(whole)
    assert [row["rollout/waiting"] for row in metrics] != [0.0] * STEPS, "otherwise this proves little"
    assert any(row["rollout/refills"] for row in metrics)
    assert all(row["parity/logprob_max"] < 1e-4 for row in metrics), "what waited does not count as a gap"
    aged = [row for row in metrics if "parity/stale_logprob_max" in row]
    assert aged, "otherwise this proves little"
    assert all(row["parity/stale_logprob_max"] > 10 * row["parity/logprob_max"] for row in aged)
    ages = set()
    for step in range(1, STEPS + 1):
        informative = [g for g in groups(whole, step) if g[0]["score"] != g[1]["score"]]
        assert len(informative) == TASKS, "each step is full, and selected once"
        assert all(row["advantage"] is not None for g in informative for row in g)
        ages |= {step - 1 - row["version"] for g in informative for row in g}
    assert ages == {0, 1}, "what waited is one version older, never more"
    for stop in (2, 3):
        part = train(config, tmp_path / f"part-{stop}", f"steps={stop}")
        assert resume(part, [f"steps={STEPS}"], Terminal(Console(quiet=True))) == 0
        for name in ("loss/total", "rollout/kept", "rollout/waiting", "reward/mean", "tokens/trained"):
            assert [row[name] for row in rows(part)] == [row[name] for row in metrics], name
        ends = [load_file(run / f"checkpoints/step-{STEPS:06d}/trained.safetensors") for run in (whole, part)]
        assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_rounds_are_a_limit(config: Path, tmp_path: Path) -> None:
    """Trap 34: the step takes what there is."""
    run = train(config, tmp_path / "run", "rollout.rounds=1", "steps=3")
    kept = [sum(g[0]["score"] != g[1]["score"] for g in groups(run, step)) for step in (1, 2, 3)]
    assert all(row["rollout/refills"] == 0 for row in rows(run))
    assert min(kept) < TASKS
    assert all(len(groups(run, step)) == TASKS for step in (1, 2, 3))


def test_a_filter_that_changes_with_the_steps(config: Path) -> None:
    """A step is filled with what is selected now, not with what was at the start."""
    parts = assemble(material(load(config, ["algorithm={type: custom, path: 'tests.test_refill:growing'}"])), None)

    async def scores() -> set[float | None]:
        await parts.source.next()
        assert parts.source.selected
        return {t.score for group in parts.source.selected for t in group}

    async def both() -> tuple[set[float | None], set[float | None]]:
        try:
            await parts.serve(0)
            first = await scores()
            parts.learner.remembered = {"steps": 1.0}
            return first, await scores()
        finally:
            await parts.close()

    assert asyncio.run(both()) == ({0.0, 1.0}, {1.0})
