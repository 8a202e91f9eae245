"""Faults that happen for real: graders that break, gradients that are not finite, engines that are killed or stopped,
disks that may not be written, trackers that are gone. What the run survives, and what it stops at.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from rlft.faults import FILE
from rlft.session import begin, resume
from rlft.settings import validate
from rlft.terminal import Terminal
from rlft.types import RunError

REWARDS = '''
"""Graders with faults. `calls` is a file that counts, so that a fault comes at a certain call."""
import pathlib, threading, time


def low(trajectory):
    said = [t for s in trajectory.samples for t, chosen in zip(s.tokens, s.mask) if chosen]
    return sum(token < 100 for token in said) / len(said)


def count(calls):
    path = pathlib.Path(calls)
    with path.open("a") as out:
        out.write(".")
    return path.stat().st_size


def huge(trajectory, calls, first, last):
    """Scores so far apart that their difference overflows, from one call to another."""
    number = count(calls)
    return 3e38 * (-1) ** number if first <= number <= last else low(trajectory)


def breaks(trajectory, calls, kinds):
    """kinds: by the number of the call, as text."""
    kind = kinds.get(str(count(calls)))
    if kind == "raise":
        raise ValueError("the grader fell over")
    if kind == "hang":
        time.sleep(600)
    return {"nan": float("nan"), "inf": float("inf"), "text": "good", "none": None}.get(kind, low(trajectory))
'''
Make = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(kept)


@pytest.fixture(scope="module", autouse=True)
def graders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("graders")
    (folder / "rlft_faulty_rewards.py").write_text(REWARDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Make:
    """make(changes) -> a config of 4 steps of 8 samples, with a checkpoint after each."""

    def build(algorithm: dict[str, Any] | None = None, **changes: Any) -> Any:
        words = ["one", "two", "three", "four", "five"]
        (tmp_path / "train.jsonl").write_text("".join(json.dumps({"ask": f"Say {word}"}) + "\n" for word in words))
        plain: dict[str, Any] = {
            "name": "faulty",
            "steps": 4,
            "out": str(tmp_path / "run"),
            "model": {"path": str(tiny_model), "device": "cpu"},
            "adapter": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
            "data": {"train": str(tmp_path / "train.jsonl"), "columns": {"prompt": "ask"}},
            "reward": grader("low"),
            "rollout": {
                "engine": {"type": "local"},
                "tasks_per_step": 2,
                "group_size": 4,
                "sampling": {"max_tokens": 6},
            },
            "algorithm": algorithm or {"type": "grpo"},
            "learner": {"lr": 1e-2, "scheduler": "linear"},
            "checkpoint": {"every": 1, "keep": 9},
            "show": {"every": 0},
        }
        for dotted, value in changes.items():
            *path, leaf = dotted.split("__")
            block: Any = plain
            for part in path:
                block = block.setdefault(part, {})
            block[leaf] = value
        return validate(plain)

    return build


def grader(name: str, **options: Any) -> dict[str, Any]:
    return {"type": "custom", "path": f"rlft_faulty_rewards:{name}", "options": options, "threads": 1}


def run(config: Any) -> tuple[Path, str]:
    """Train to the end; the folder, and what was said."""
    said = io.StringIO()
    assert begin(config, Terminal(Console(file=said, width=500))) == 0
    return Path(config.out), said.getvalue()


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def failures(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FILE).read_text().splitlines()]


def trained(folder: Path, step: int, what: str = "trained") -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoints/step-{step:06d}/{what}.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def scraps(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if "writing" in path.name]


# Loss and gradient.


def test_a_step_that_is_not_finite_is_skipped_and_kept(make: Make, tmp_path: Path) -> None:
    """Calls 9 to 12 are the first group of step 2."""
    folder, said = run(make({"type": "rloo"}, reward=grader("huge", calls=str(tmp_path / "calls"), first=9, last=12)))
    first, second, third, _ = rows(folder)
    assert [row.get("learner/skipped") for row in rows(folder)] == [None, 1, None, None]
    assert second["loss/total"] is None
    assert first["learner/lr"] > second["learner/lr"] > third["learner/lr"], "the schedule moves on"
    for what in ("trained", "optimizer"):
        assert same(trained(folder, 2, what), trained(folder, 1, what))
    assert not same(trained(folder, 3), trained(folder, 2))
    kept = folder / "skipped/step-000002.safetensors"
    batch, about = load_file(kept), json.loads(kept.with_suffix(".json").read_text())
    wrong = [row for row in about["rows"] if not row["finite"]]
    assert len(about["rows"]) == len(batch["tokens"]) == 8
    unsound = (batch["mask"] & ~torch.isfinite(batch["advantages"])).any(1)
    assert [row["row"] for row in wrong] == unsound.nonzero().flatten().tolist() == [0, 1, 2, 3]
    played = pq.read_table(folder / "rollouts/step-000002.parquet").to_pylist()
    assert {row["completion"] for row in wrong} <= {row["completion"] for row in played if abs(row["score"]) > 1e38}
    assert about["parameters"]
    (line,) = failures(folder)
    assert (line["step"], line["fault"], line["kept"]) == (2, "skipped", str(kept))
    assert f"Its batch is kept in {kept}" in said
    assert not scraps(folder)


def test_too_many_skipped_steps_in_a_row_end_the_run(make: Make, tmp_path: Path) -> None:
    config = make(
        {"type": "rloo"},
        reward=grader("huge", calls=str(tmp_path / "calls"), first=9, last=10**6),
        faults__skipped=1,
        steps=9,
    )
    with pytest.raises(RunError, match=r"2 optimizer steps in a row.*faults.skipped allows 1.*learner.lr"):
        run(config)
    folder = Path(config.out)
    assert [row["step"] for row in rows(folder)] == [1, 2, 3]
    assert sorted(p.name for p in (folder / "skipped").glob("*.json")) == ["step-000002.json", "step-000003.json"]
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    assert resume(folder, ["reward.options.first=100000", "steps=4"], Terminal(Console(quiet=True))) == 0
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4]


# Rewards.


def test_what_a_reward_fails_on_is_left_out_and_written_down(make: Make, tmp_path: Path) -> None:
    """Step 2 is calls 9 to 16: all but one of its first group have no score, so that nothing is learned from it."""
    kinds = {"9": "raise", "10": "hang", "11": "nan", "14": "none", "20": "inf", "21": "text"}
    reward = grader("breaks", calls=str(tmp_path / "calls"), kinds=kinds) | {"seconds": 0.5}
    folder, _ = run(make(reward=reward, faults__reward=0.5))
    first, second, third, _ = rows(folder)
    assert "reward/failed" not in first
    assert (second["reward/failed"], second["reward/missing"]) == (3 / 8, 4 / 8)
    assert [second[f"reward/failures/{kind}"] for kind in ("raised", "timeout", "nan")] == [1, 1, 1]
    assert (third["reward/failed"], third["reward/failures/value"]) == (2 / 8, 2)
    played = pq.read_table(folder / "rollouts/step-000002.parquet").to_pylist()
    scores = [row["score"] for row in played if row["score"] is not None]
    assert len(scores) == 4
    assert second["reward/mean"] == pytest.approx(sum(scores) / 4), "no failure is a zero"
    assert [row["advantage"] is None for row in played] == [True] * 3 + [False] * 2 + [True] + [False] * 2
    assert played[3]["advantage"] == 0, "alone in its group"
    lines = failures(folder)
    assert [(line["step"], line["kind"]) for line in lines] == [
        (2, "raised"), (2, "timeout"), (2, "nan"), (3, "value"), (3, "value")
    ]  # fmt: skip
    for line, row in zip(lines, played, strict=False):
        if line["step"] == 2:
            assert (line["task_id"], line["prompt"]) == (row["task_id"], row["prompt"])
    assert lines[0]["completion"] == played[0]["completion"]
    assert lines[0]["said"] == "ValueError: the grader fell over"
    assert "in breaks" in lines[0]["trace"]


def test_a_reward_that_fails_too_often_ends_the_run_between_steps(make: Make, tmp_path: Path) -> None:
    """Three of eight in step 3: the step is not learned from, and what was learned before is kept."""
    kinds = {str(number): "raise" for number in (17, 18, 19)}
    config = make(
        reward=grader("breaks", calls=str(tmp_path / "calls"), kinds=kinds), checkpoint__every=0, faults__reward=0.3
    )
    with pytest.raises(
        RunError, match=r"3 of 8 .* step 3, .* a share of 0.3. The first: .* fell over .*failures.jsonl"
    ):
        run(config)
    folder = Path(config.out)
    assert [row["step"] for row in rows(folder)] == [1, 2]
    assert [line["step"] for line in failures(folder)] == [3, 3, 3]
    assert resume(folder, [], Terminal(Console(quiet=True))) == 0
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4]
    config = make(out=str(tmp_path / "undisturbed"))
    assert same(trained(run(config)[0], 4), trained(folder, 4)), "the step was drawn again"


def test_held_out_answers_that_a_reward_fails_on_are_not_correct(make: Make, tmp_path: Path) -> None:
    """The first evaluation is calls 1 to 5; all would be correct."""
    reward = grader("breaks", calls=str(tmp_path / "calls"), kinds={"2": "raise", "3": "nan"})
    config = make(
        steps=0,
        reward={"type": "weighted", "terms": {"right": {"type": "length", "limit": 99, "free": 98}, "own": reward}},
        data__eval=str(tmp_path / "train.jsonl"),
    )
    folder, said = run(config)
    (row,) = rows(folder)
    assert (row["eval/accuracy"], row["eval/failed"], row["eval/missing"]) == (1, 2 / 5, 2 / 5)
    assert "the reward failed on 2 of 5 held-out answers" in said
    assert [(line["step"], line["evaluation"]) for line in failures(folder)] == [(1, True)] * 2
