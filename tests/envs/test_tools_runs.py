"""Whole runs with tools: a random model calls nothing, but hints make episodes of several turns."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rlft.settings import validate
from tests.envs.test_runs import finished

HINTS = [{"text": "Use it."}, {"text": "Do."}]
ENVS: dict[str, dict[str, Any]] = {
    "python": {"type": "python", "hints": HINTS, "longest": 20},
    "tools": {
        "type": "tools", "tools": ["tests.envs.mine:add"], "instructions": "add!", "hints": HINTS, "longest": 80,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ENVS)
def test_a_run_trains_on_the_policy_s_turns_alone(name: str, tiny_model: Path, tmp_path: Path) -> None:
    config = validate(
        {
            "name": name,
            "steps": 1,
            "out": str(tmp_path / "run"),
            "model": {"path": str(tiny_model), "device": "cpu"},
            "data": {"train": {"type": "generated"}},
            "env": ENVS[name],
            "reward": {"type": "format", "pattern": "[a-m]", "full": False},
            "algorithm": {"type": "grpo"},
            "rollout": {
                "engine": {"type": "local", "context": 500},
                "tasks_per_step": 2,
                "group_size": 4,
                "sampling": {"max_tokens": 12, "stop": list("aeiounrst")},
            },
        }
    )
    lines, rows = finished(config)
    (first,) = [line for line in lines if line.get("step") == 1 and "loss/total" in line]
    assert first["parity/logprob_max"] < 1e-3, "what is trained on is what was sampled"
    assert first["env/python_calls" if name == "python" else "env/calls"] == 0
    runs = [len(re.findall("1+", "".join("01"[chosen] for chosen in row["mask"]))) for row in rows]
    assert max(runs) == 3, "some answer was followed by both hints"
    assert min(runs) >= 1
