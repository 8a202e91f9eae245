"""A profile of a real run: its trace, and what it says of where a step went."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from rlft.session import begin
from rlft.settings import load
from rlft.terminal import Terminal

RUN: dict[str, Any] = {
    "name": "watched",
    "model": {"path": "tiny-random"},
    "adapter": {"type": "lora", "r": 4, "target_modules": "all-linear"},
    "data": {"train": {"type": "generated", "limit": 8}},
    "reward": {"type": "format", "pattern": "[a-m]", "full": False},
    "rollout": {
        "engine": {"type": "local"},
        "tasks_per_step": 2,
        "group_size": 4,
        "sampling": {"max_tokens": 6},
    },
    "algorithm": {"type": "grpo"},
    "show": {"every": 0},
}


@pytest.mark.parametrize(("steps", "watched"), [(3, 2), (1, 1)])
def test_the_trace_and_the_table(tmp_path: Path, steps: int, watched: int) -> None:
    path, said = tmp_path / "run.yaml", Console(record=True, width=300, file=(tmp_path / "said").open("w"))
    path.write_text(yaml.safe_dump({**RUN, "steps": steps, "profile": True, "out": str(tmp_path / "run")}))
    assert begin(load(path), Terminal(said)) == 0
    assert [file.name for file in (tmp_path / "run" / "profile").iterdir()] == [f"step-{watched:06d}.json.gz"]
    with gzip.open(tmp_path / "run" / "profile" / f"step-{watched:06d}.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"rlft: sample and score", "rlft: learn", "rlft: forward", "rlft: sync", "aten::mm"} <= names
    lines = said.export_text().splitlines()
    first = next(i for i, line in enumerate(lines) if f"where step {watched} went" in line)
    table = {line[:24].strip(): line[24:].split() for line in lines[first + 1 : first + 9]}
    whole = float(lines[first].split(",")[1].split()[0])
    assert list(table)[:2] == ["sample and score", "learn"]
    top = sum(float(table[name][0]) for name in ("sample and score", "learn", "sync"))
    assert top == pytest.approx(whole, abs=0.03)
    assert float(table["learn"][0]) >= float(table["forward"][0]) + float(table["backward"][0]) - 0.02
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == steps


def test_watching_changes_nothing(tmp_path: Path) -> None:
    kept = []
    for name, profile in (("plain", False), ("watched", True)):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**RUN, "steps": 2, "profile": profile, "out": str(tmp_path / name)}))
        assert begin(load(path), Terminal(Console(quiet=True))) == 0
        weights = tmp_path / name / "checkpoints" / "step-000002"
        kept.append(next(weights.rglob("adapter_model.safetensors")).read_bytes())
    assert kept[0] == kept[1]
