"""A reward that changes over the steps is told the right one: also ahead, refilled, evaluated, resumed, replayed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter
from rich.console import Console

from rlft.replay import replay
from rlft.rewards.catalog import RewardConfig
from rlft.serve_reward import application
from rlft.session import begin, resume
from rlft.settings import load
from rlft.terminal import Terminal
from rlft.types import InputError, at_step, stepping

STEPS = 4
REWARD = '''
def odd(trajectory):
    """Whether the first sampled token's id is odd: half of all groups of two agree."""
    sample = trajectory.samples[0]
    return float(sample.tokens[sample.mask.index(True)] % 2)


def one(trajectory):
    return 1.0
'''
SCHEDULED = {
    "type": "scheduled",
    "points": {"one": {0: 0.0, 100: 100.0}},  # the factor is the step
    "terms": {name: {"type": "custom", "path": f"rlft_stepping_reward:{name}"} for name in ("odd", "one")},
}


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rlft_stepping_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"ask": f"Say {i}"}) + "\n" for i in range(7)))
    settings = {
        "name": "stepping",
        "steps": STEPS,
        "model": {"path": str(tiny_model), "device": "cpu"},
        "adapter": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "data": {
            "train": str(tmp_path / "train.jsonl"),
            "eval": str(tmp_path / "train.jsonl"),
            "columns": {"prompt": "ask"},
        },
        "reward": SCHEDULED,
        "rollout": {
            "engine": {"type": "local"},
            "tasks_per_step": 2,
            "group_size": 2,
            "sampling": {"max_tokens": 2},
        },
        "eval": {"every": 1},
        "algorithm": {"type": "grpo", "mask_truncated": False},
        "checkpoint": {"every": 1, "keep": STEPS},
        "show": {"every": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def trained(config: Path, name: str, *overrides: str) -> Path:
    out = config.parent / name
    assert begin(load(config, [f"out={out}", *overrides]), Terminal(Console(quiet=True))) == 0
    return out


def column(run: Path, name: str) -> list[float | None]:
    return [json.loads(line).get(name) for line in (run / "metrics.jsonl").read_text().splitlines()]


AHEAD = ("rollout.engine.place=worker", "rollout.ahead=2")


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), AHEAD], ids=["in turn", "two ahead"])
def test_every_step_is_judged_by_its_own_weights_also_when_resumed(config: Path, how: tuple[str, ...]) -> None:
    whole = trained(config, "whole", *how)
    assert column(whole, "reward/one/factor") == [None, 1.0, 2.0, 3.0, 4.0]
    assert column(whole, "eval/one/factor") == [0.0, 1.0, 2.0, 3.0, 4.0]
    part = trained(config, "part", *how, "steps=2")
    assert resume(part, [f"steps={STEPS}"], Terminal(Console(quiet=True))) == 0
    for name in ("reward/one/factor", "eval/one/factor", "reward/mean", "reward/odd"):
        assert column(part, name) == column(whole, name), name
    assert stepping.get() is None


@pytest.mark.parametrize("how", [(), (*AHEAD[:1], "rollout.ahead=1")], ids=["in turn", "one ahead"])
def test_what_is_sampled_on_for_a_step_is_judged_by_the_weights_of_that_step(
    config: Path, how: tuple[str, ...]
) -> None:
    """Groups that waited for a later step keep the score that they were given."""
    run = trained(config, "run", *how, "algorithm.type=dapo", "eval.every=0", "rollout.rounds=3")
    refills, factors = column(run, "rollout/refills"), column(run, "reward/one/factor")
    assert any(refills), "otherwise this proves little"
    waited = [0.0, *(value or 0.0 for value in column(run, "rollout/waiting")[1:-1])]
    for step, (factor, before) in enumerate(zip(factors[1:], waited, strict=True), 1):
        assert factor is not None
        assert factor == step if not before else 1 <= factor < step


def test_a_recorded_step_judged_again_says_what_it_said(config: Path) -> None:
    run = trained(config, "run", "eval.every=0")
    (step,) = replay(run, [], "3")["steps"]
    found = {part["name"]: part for part in step["rewards"]}
    assert {name: part["changed"] for name, part in found.items()} == dict.fromkeys(found, 0)
    assert found["one/factor"]["replayed"] == 3.0
    assert found["score"]["replayed"] > 3.0 - 1e-6


def test_a_server_has_no_step() -> None:
    reward: Any = TypeAdapter(RewardConfig).validate_python({"type": "weighted", "terms": {"a": SCHEDULED}})
    with pytest.raises(InputError, match="by the step belongs into the run's own config"):
        application(reward)


def test_steps_are_told_apart_where_judgements_overlap() -> None:
    async def seen(step: int) -> Sequence[int | None]:
        async def later() -> int | None:
            await asyncio.sleep(0)
            return stepping.get()

        with at_step(step):
            return await asyncio.gather(later(), later())

    async def both() -> list[Sequence[int | None]]:
        return list(await asyncio.gather(seen(3), seen(5)))

    assert asyncio.run(both()) == [[3, 3], [5, 5]]
