"""Trap 37: a run that was killed and resumed is the uninterrupted run, bit for bit: samples, metrics, checkpoints.

Every run here is an rlft of its own that gets a real SIGKILL in the middle of a step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.killing import Server, assert_same, family, rows, samples

STEPS = 5
PAIR = {"rollout": {"tasks_per_step": 3, "group_size": 2, "sampling": {"max_tokens": 3}}}
RECORDED = {
    "data": {"train": "gold.jsonl", "columns": {"prompt": "ask", "completion": "gold"}},
    "reward": None,
    "eval": {"every": 0},
}
ADALORA = {
    "type": "adalora", "init_r": 4, "target_r": 1, "tinit": 1, "tfinal": 1, "deltaT": 1, "total_step": 5,
    "target_modules": ["q_proj", "v_proj"],
}  # fmt: skip
# What a run has between its steps beside its parameters and the optimizer's state, and a run that has it.
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"algorithm": {"type": "grpo", "kl": 0.01}, "learner": {"minibatches": 2, "scheduler": "cosine"}},
    "dapo, groups wait": {"algorithm": {"type": "dapo", "mask_truncated": False}, "reward": "odd", **PAIR},
    "ppo": {"algorithm": {"type": "ppo"}, "learner": {"epochs": 2, "minibatches": 2}},
    "online dpo": {"algorithm": {"type": "dpo"}, "learner": {"optimizer": "adafactor"}},
    "sft, dropout": {"algorithm": {"type": "sft"}, "adapter": {"lora_dropout": 0.3}, **RECORDED},
    "controllers of kl and entropy": {
        "algorithm": {"type": "grpo", "kl": 0.1, "kl_target": 0.001, "entropy_target": 3.0},
    },
    "a reference that follows": {"algorithm": {"type": "grpo", "kl": 0.5}, "reference": {"every": 1, "mix": 0.3}},
    "thresholds that grow": {"algorithm": {"type": "reinforced_self_training", "thresholds": [0.0, 0.3, 0.5]}},
    "ranks that move": {"algorithm": {"type": "grpo"}, "adapter": ADALORA},
    "a reward that throws dice": {"algorithm": {"type": "rloo"}, "reward": "drawn"},
    "no adapter": {"algorithm": {"type": "grpo"}, "adapter": {"type": "none"}, "learner": {"lr": 1e-3}},
}  # fmt: skip
Make = Callable[..., Path]


def merged(plain: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with others put over them; another type replaces a block."""
    found = dict(plain)
    for name, value in changes.items():
        inside = isinstance(value, dict) and isinstance(found.get(name), dict) and "type" not in value
        found[name] = merged(found[name], value) if inside else value
    return found


def settings(folder: Path, model: Path, **changes: Any) -> dict[str, Any]:
    """A run of a few steps in `folder`, with a checkpoint and an evaluation every other step."""
    if isinstance(changes.get("reward"), str):
        changes["reward"] = {"type": "custom", "path": f"rlft_killed_rewards:{changes['reward']}", "threads": 1}
    plain: dict[str, Any] = {
        "name": "killed",
        "steps": STEPS,
        "model": {"path": str(model), "device": "cpu"},
        "adapter": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "data": {"train": "train.jsonl", "eval": "held.jsonl", "columns": {"prompt": "ask"}},
        "reward": {"type": "custom", "path": "rlft_killed_rewards:small", "threads": 1},
        "rollout": {
            "engine": {"type": "local"}, "tasks_per_step": 2, "group_size": 4, "sampling": {"max_tokens": 6},
        },
        "learner": {"lr": 1e-2},
        "eval": {"every": 2},
        "checkpoint": {"every": 2, "keep": 2},
        "show": {"every": 0},
    }  # fmt: skip
    found = merged(plain, changes)
    if found["reward"] is None:
        del found["data"]["eval"]
    return found


def write(folder: Path, model: Path, **changes: Any) -> Path:
    """The config of such a run, its data and its rewards."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"ask": f"Say {i}", "gold": f"{i} and {i * i}"} for i in range(7)]
    for name, few in (("train", rows), ("gold", rows), ("held", rows[:2])):
        kept = rows if name == "gold" else [{"ask": row["ask"]} for row in few]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    (folder / "run.yaml").write_text(yaml.safe_dump(settings(folder, model, **changes)))
    return folder / "run.yaml"


def recorded(run: Path, step: int) -> bool:
    return (run / f"rollouts/step-{step:06d}.parquet").exists()


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_is_the_uninterrupted_one(server: Server, tmp_path: Path, tiny_model: Path, case: str) -> None:
    """Killed in step 3 or 4, whose records are made again from the checkpoint of step 2."""
    config = write(tmp_path, tiny_model, **CASES[case])
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert server.start("train", config, f"out={whole}").end() == 0, server.log()
    life = server.start("train", config, f"out={killed}")
    assert life.kill(lambda: recorded(killed, 3)), server.log()
    assert not family(life.pid)
    assert not (killed / "checkpoints/step-000005").exists()
    assert server.start("resume", killed).end() == 0, server.log()
    assert_same(killed, whole)
    assert_it_proves_something(case, whole)


def assert_it_proves_something(case: str, whole: Path) -> None:
    """The state that the case is about is there when the run is killed."""
    table = rows(whole)
    state = json.loads((whole / "checkpoints/step-000004/state.json").read_text())
    assert all(row["tokens/trained"] for row in table if row["step"])
    if case == "dapo, groups wait":
        assert any(row["rollout/waiting"] for row in table if row["step"] in (2, 4))
    if case in ("controllers of kl and entropy", "thresholds that grow"):
        assert state["remembered"]
    if case != "sft, dropout":
        assert state["best"], "which checkpoint is the best so far"
        assert len(samples(whole, "eval")) == 4


@pytest.mark.slow
def test_a_run_on_vllm_too(server: Server, tmp_path: Path, tiny_model: Path) -> None:
    """By the command line, with a real engine in process."""
    vllm = {
        "engine": {"type": "vllm", "cache_gb": 0.05},
        "tasks_per_step": 2,
        "group_size": 4,
        "sampling": {"max_tokens": 6},
    }
    config = write(tmp_path, tiny_model, **{**CASES["grpo"], "rollout": vllm})
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert server.program("train", config, f"out={whole}").end() == 0, server.log()
    life = server.program("train", config, f"out={killed}")
    assert life.kill(lambda: recorded(killed, 3), 120), server.log()
    assert not family(life.pid)
    assert server.program("resume", killed).end() == 0, server.log()
    assert_same(killed, whole)
