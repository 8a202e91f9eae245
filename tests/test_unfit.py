"""Data that a run must not learn from are refused at the start, over all rows; a step without labels is no reason."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlft.config import Config
from rlft.material import material
from rlft.session import begin
from rlft.settings import validate
from rlft.terminal import Terminal
from rlft.types import InputError


def config_of(model: Path, folder: Path, rows: list[dict[str, Any]], algorithm: dict[str, Any], **data: Any) -> Config:
    """A run on recorded rows that sees one a step, each once."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return validate(
        {
            "name": "unfit",
            "out": str(folder / "run"),
            "steps": len(rows),
            "model": {"path": str(model), "device": "cpu"},
            "adapter": {"type": "lora", "r": 4},
            "data": {"train": str(folder / "rows.jsonl"), **data},
            "learner": {"lr": 1e-3},
            "rollout": {"tasks_per_step": 1},
            "show": {"every": 0},
            "algorithm": {"type": "reward_model", **algorithm},
        }
    )


def logged(config: Config) -> list[dict[str, Any]]:
    """The metrics of a whole run."""
    assert config.out is not None
    assert begin(config, Terminal()) == 0
    return [json.loads(line) for line in (Path(config.out) / "metrics.jsonl").read_text().splitlines()]


def test_a_step_whose_rows_lack_the_objective_teaches_nothing(tiny_model: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"Say {i}", "completion": "one two"} for i in range(4)]
    rows[2]["objectives"] = {"clear": 0.5}
    steps = logged(config_of(tiny_model, tmp_path, rows, {"loss": "regression", "objectives": ["clear"]}))
    moved = [row["loss/total"] for row in steps if row["loss/grad_norm"]]
    assert len(steps) == 4
    assert moved == pytest.approx([0.125]), "the head begins at zero, so 1/2 (0 - 0.5)^2"
    assert all(math.isfinite(value) for row in steps for value in row.values() if isinstance(value, float))


def pairs(*users: str | None) -> list[dict[str, Any]]:
    said = [{"prompt": f"Say {i}", "chosen": "one two", "rejected": "three"} for i in range(len(users))]
    return [row if user is None else row | {"user": user} for row, user in zip(said, users, strict=True)]


def test_a_step_whose_rows_name_nobody_teaches_the_generic_score(tiny_model: Path, tmp_path: Path) -> None:
    rows = pairs(None, "ann", None, "bob")
    steps = logged(config_of(tiny_model, tmp_path, rows, {"users": ["ann", "bob"]}))
    assert len(steps) == 4
    assert all(row["loss/grad_norm"] > 0 for row in steps)


def test_a_listed_user_of_whom_there_is_no_row_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Whoever's column or name is misspelt would get the generic score without a word."""
    users: dict[str, Any] = {"users": ["ann", "Bob"]}
    with pytest.raises(InputError, match=r"algorithm\.users: no row of data.train is from Bob; .* has ann, bob"):
        material(config_of(tiny_model, tmp_path, pairs("ann", "bob", None), users))
    with pytest.raises(InputError, match=r"from ann, Bob; its column `user` has nothing.*data\.columns\.user="):
        material(config_of(tiny_model, tmp_path, pairs(None, None), users))
    rater = [{**row, "rater": name} for row, name in zip(pairs(None, None), ("ann", "Bob"), strict=True)]
    assert len(material(config_of(tiny_model, tmp_path, rater, users, columns={"user": "rater"})).groups) == 2


def test_an_objective_of_no_row_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "Say", "completion": "one", "objectives": {"clear": 1.0}}]
    config = config_of(tiny_model, tmp_path, rows, {"loss": "regression", "objectives": ["clear", "tru"]})
    with pytest.raises(
        InputError, match=r"algorithm\.objectives: no row of data.train has a value for 'tru'; .* clear"
    ):
        material(config)
