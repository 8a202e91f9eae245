"""The reward models' entries: what their knobs build, and what is refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from rlft.algorithms.catalog import AlgorithmConfig
from rlft.batch import Batch
from rlft.material import material
from rlft.settings import validate
from rlft.types import InputError

READ = TypeAdapter(AlgorithmConfig)


def build(**knobs: Any) -> Any:
    return READ.validate_python({"type": "reward_model", **knobs}).build()


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"objectives": ["clear"]}, "set loss=regression or remove objectives"),
        ({"loss": "regression", "objectives": ["clear", "clear"]}, "a name stands there twice"),
        ({"loss": "pointwise", "users": ["ann"]}, "set loss=bradley_terry or remove users"),
        ({"users": ["ann", "ann"]}, "a name stands there twice"),
        ({"clusters": 2}, "there are no users"),
        ({"users": ["ann"], "clusters": 1}, "all users are alike"),
        ({"users": ["ann"], "personal": 1.5}, "less than or equal to 1"),
    ],
)
def test_knobs_that_do_not_fit_are_refused(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        build(**knobs)


def test_the_head_has_an_output_for_each_number() -> None:
    assert build().owned.head == 1
    assert build(loss="regression", objectives=["a", "b", "c"]).owned.head == 3
    assert build(users=["ann", "ben"]).owned.head == 3, "one for everybody, and an offset each"
    mixed = build(users=["ann", "ben", "cid"], clusters=2).owned
    assert (mixed.head, mixed.learned) == (2, {"users": [[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]})


def run(folder: Path, rows: list[dict[str, Any]], algorithm: dict[str, Any], **changes: Any) -> Any:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"model": {"path": "tiny-random"}, "adapter": {"type": "lora", "target_modules": "all-linear"}}
    return material(
        validate({"name": "rm", "steps": 1, "data": {"train": str(path)}, "algorithm": algorithm, **model, **changes})
    )


RATED = [{"prompt": "Hi", "completion": "one", "objectives": {"clear": i}} for i in range(3)]
SEVERAL = {"type": "reward_model", "loss": "regression", "objectives": ["clear"]}


def test_recorded_objectives_become_targets(tmp_path: Path) -> None:
    stuff = run(tmp_path, RATED, SEVERAL)
    assert Batch.of(stuff.algorithm.select(stuff.groups)).targets.tolist() == [[0.0], [1.0], [2.0]]


def test_an_objective_that_no_row_has(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no row of data\.train has a value for 'true'; there is clear\."):
        run(tmp_path, RATED, {**SEVERAL, "objectives": ["clear", "true"]})


def test_ranked_rows_train_on_all_their_pairs(tmp_path: Path) -> None:
    """Three ranks make three pairs, two make one, and both prompts count alike."""
    rows = [
        {"prompt": "Hi", "completions": ["one", "two", "six"], "ranks": [2, 1, 3]},
        {"prompt": "Ho", "completions": ["one", "two"], "ranks": [1, 2]},
    ]
    stuff = run(tmp_path, rows, {"type": "reward_model"})
    batch = stuff.algorithm.weigh(Batch.of(stuff.algorithm.select(stuff.groups)))
    assert len(batch) == 8
    assert (batch.scores[::2] > batch.scores[1::2]).all()
    shares = (batch.weights * batch.mask).sum(1)
    assert [float(shares[batch.group == g].sum()) for g in (0, 1)] == pytest.approx([0.5, 0.5])


def test_rows_of_users_are_told_apart(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "chosen": "one", "rejected": "two", "who": who} for who in ("ben", "cid", "ann")]
    algorithm = {"type": "reward_model", "users": ["ann", "ben"]}
    columns = {"columns": {"user": "who"}, "train": str(tmp_path / "rows.jsonl")}
    stuff = run(tmp_path, rows, algorithm, data=columns)
    assert Batch.of(stuff.algorithm.select(stuff.groups)).user.tolist() == [2, 2, 0, 0, 1, 1]


def test_recorded_steps_are_labelled(tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "completions": ["one", "two"], "labels": [True, False]}]
    stuff = run(tmp_path, rows, {"type": "process_reward"})
    batch = stuff.algorithm.weigh(Batch.of(stuff.algorithm.select(stuff.groups)))
    assert batch.rewards[batch.rewards != 0].tolist() == [1.0, -1.0]
    assert batch.weights[batch.rewards != 0].tolist() == [0.5, 0.5]


def test_held_out_tasks_need_no_recorded_roles(tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"prompt": "Hi", "answer": "1"}) + "\n")
    rows = [{"prompt": "Hi", "said": "one", "good": 1}]
    columns = {"completion": "said", "objectives/clear": "good"}
    data = {"train": str(tmp_path / "rows.jsonl"), "eval": str(held), "columns": columns}
    stuff = run(tmp_path, rows, SEVERAL, data=data, reward={"type": "exact"}, rollout={"engine": {"type": "local"}})
    assert len(stuff.held_out) == 1
