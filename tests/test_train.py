"""Whole runs with a tiny model and the local engine: what is learned, what is written, and that a resumed run is the
uninterrupted one, bit for bit.
"""

from __future__ import annotations

import io
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from rlft.batch import Batch
from rlft.chat import Chat
from rlft.checkpoint import load_trained
from rlft.data import recorded
from rlft.learner import Learner, Schedule
from rlft.material import material
from rlft.policy import Policy
from rlft.rows import read
from rlft.session import begin, of_run, resume
from rlft.settings import load, validate
from rlft.terminal import Terminal
from rlft.track import SCHEMA
from rlft.types import InputError, RunError

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
RUN_METRICS = [
    "step",
    "reward/mean",
    "reward/std",
    "completion/tokens_mean",
    "completion/truncated",
    "loss/total",
    "loss/grad_norm",
    "parity/logprob_max",
    "parity/logprob_mean",
    "sync/version",
    "sync/seconds",
    "time/step",
    "time/generate",
    "time/reward",
    "time/learn",
    "time/sync",
    "tokens/generated",
    "tokens/trained",
    "policy/entropy",
    "policy/ratio_max",
    "policy/clip_fraction",
    "advantage/zero_groups",
    "learner/lr",
]
REWARDS = '''
"""Toy rewards; `fail_at` lets one raise once it has been called so many times."""
import pathlib


def low(trajectory, below=100):
    """The share of sampled tokens whose id is small."""
    said = [t for s in trajectory.samples for t, chosen in zip(s.tokens, s.mask) if chosen]
    return sum(token < below for token in said) / len(said)


def brittle(trajectory, calls, fail_at):
    path = pathlib.Path(calls)
    with path.open("a") as out:
        out.write(".")
    if path.stat().st_size >= fail_at:
        raise ValueError("the grader fell over")
    return low(trajectory)
'''
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a module of rewards, on the path."""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "rlft_toy_rewards.py").write_text(REWARDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="module")
def make(tiny_model: Path, toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(algorithm, changes) -> a config file beside its data; its run goes to the folder `run` there."""

    def write(algorithm: dict[str, Any], **changes: Any) -> Path:
        folder = tmp_path_factory.mktemp(algorithm["type"])
        prompts = [{"ask": f"Say {a} and {b}", "gold": a} for a, b in pairwise(WORDS)]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
        (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts[:2]))
        plain = {
            "name": "toy",
            "steps": 4,
            "out": str(folder / "run"),
            "model": {"path": str(tiny_model), "device": "cpu"},
            "adapter": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
            "data": {"train": "train.jsonl", "columns": {"prompt": "ask"}},
            "reward": {"type": "custom", "path": "rlft_toy_rewards:low"},
            "rollout": {
                "engine": {"type": "local"},
                "tasks_per_step": 2,
                "group_size": 4,
                "sampling": {"max_tokens": 6},
            },
            "algorithm": algorithm,
            "learner": {"lr": 1e-2},
            "show": {"every": 0},
        }
        for dotted, value in changes.items():
            *path, leaf = dotted.split("__")
            block: Any = plain
            for part in path:
                block = block.setdefault(part, {})
            block[leaf] = value
        (folder / "toy.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
        return folder / "toy.yaml"

    return write


def quiet() -> Terminal:
    return Terminal(Console(quiet=True))


def train(path: Path, *overrides: str) -> Path:
    """Run a config to its end; its folder."""
    config = load(path, overrides)
    assert begin(config, quiet()) == 0
    return Path(config.out or "")


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def trained(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:06d}/trained.safetensors")


@pytest.fixture(scope="module")
def finished(make: Make) -> Path:
    """A finished GRPO run of 4 steps with evaluations and a checkpoint at each step."""
    return train(
        make(
            {"type": "grpo", "kl": 0.01},
            data__eval="held.jsonl",
            eval__every=2,
            checkpoint__every=1,
            seed=3,
            learner__scheduler="linear",
            learner__warmup_steps=1,
            learner__minibatches=2,
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "algorithm", [{"type": "grpo"}, {"type": "rloo"}, {"type": "rejection", "k": 2, "at_least": 0.3}]
)
def test_it_learns_what_the_reward_likes(make: Make, algorithm: dict[str, Any]) -> None:
    run = train(make(algorithm, steps=14, learner__lr=0.05, rollout__tasks_per_step=4))
    rewards = [row["reward/mean"] for row in rows(run)]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 0.1, rewards


def test_sft_makes_the_demonstrations_likely(make: Make, tiny_model: Path) -> None:
    path = make({"type": "sft"}, data__columns={"prompt": "ask", "completion": "gold"}, reward=None, steps=8)
    chat = Chat(tiny_model)
    groups = recorded(read(str(path.parent / "train.jsonl")), {"prompt": "ask", "completion": "gold"}, "x", chat)
    batch = Batch.of(groups)

    def likelihood(checkpoint: Path | None) -> float:
        policy = Policy(tiny_model, load(path).adapter.settings(), device="cpu")
        learner = Learner(policy, Schedule(lr=1.0, steps=1))
        if checkpoint is not None:
            load_trained(checkpoint, learner)
        return float(learner.logprobs(batch)[batch.mask].mean())

    run = train(path)
    before, after = likelihood(None), likelihood(run / "checkpoints/step-000008")
    assert after > before + 1
    losses = [row["loss/total"] for row in rows(run)]
    assert losses[-1] < losses[0] - 1
    assert not (run / "engine.log").exists(), "nothing is sampled, so no engine starts"
    assert math.isclose(losses[0], -before, rel_tol=0.5)


def test_metrics_have_the_names_others_rely_on(finished: Path) -> None:
    table = rows(finished)
    assert [row["step"] for row in table] == [0, 1, 2, 3, 4]
    assert all(key == "step" or key.startswith("eval/") for key in table[0])
    assert "eval/accuracy" in table[0]
    for row in table[1:]:
        missing = [name for name in (*RUN_METRICS, "reward/custom", "kl/ref") if name not in row]
        assert not missing
        assert row["sync/version"] == row["step"]
        assert row["tokens/generated"] == row["completion/tokens_mean"] * 8
        named = sum(row[f"time/{phase}"] for phase in ("generate", "reward", "learn", "sync", "prove"))
        assert row["time/step"] >= named - 0.01
    assert ["eval/accuracy" in row for row in table] == [True, False, True, False, True]
    assert ["time/eval" in row for row in table[1:]] == [False, True, False, True]
    assert table[1]["kl/ref"] == pytest.approx(0, abs=1e-3)
    assert table[4]["kl/ref"] > 1e-3
    assert all(row["parity/logprob_max"] < 1e-3 for row in table[1:])


def test_the_first_learning_rates_follow_the_schedule(finished: Path) -> None:
    """Two optimizer steps a batch: one of warm-up, then down to zero over the other seven."""
    rates = [row["learner/lr"] for row in rows(finished)[1:]]
    assert rates == pytest.approx([1e-2 * x / 7 for x in (7, 5, 3, 1)])


def test_every_sample_is_a_row_of_the_rollouts(finished: Path, tiny_model: Path) -> None:
    chat = Chat(tiny_model)
    for step in (1, 4):
        table = pq.read_table(finished / f"rollouts/step-{step:06d}.parquet")
        assert table.schema.names == SCHEMA.names
        samples = table.to_pylist()
        assert [(s["group"], s["trajectory"]) for s in samples] == [(g, t) for g in range(2) for t in range(4)]
        for s in samples:
            said = [token for token, chosen in zip(s["tokens"], s["mask"], strict=True) if chosen]
            drawn = [x for x, chosen in zip(s["logprobs"], s["mask"], strict=True) if chosen]
            assert s["step"] == step
            assert s["version"] == step - 1, "step n trains on samples of version n - 1"
            assert s["completion"] == chat.decode(said)
            assert s["prompt"].startswith("Say ")
            assert s["task_id"].startswith("train:")
            assert all(x < 0 for x in drawn)
            assert dict(s["rewards"])["custom"] == s["score"]
            assert s["finish"] == ("length" if len(said) == 6 and said[-1] != chat.end else "stop")
        for g in range(2):
            scores = [s["score"] for s in samples if s["group"] == g]
            advantages = [s["advantage"] for s in samples if s["group"] == g]
            mean = sum(scores) / 4
            assert [a > 0 for a in advantages] == [x > mean for x in scores]
        logged = rows(finished)[step]
        assert logged["reward/mean"] == pytest.approx(sum(s["score"] for s in samples) / 8)


def test_held_out_answers_are_rows_too(finished: Path) -> None:
    assert sorted(p.name for p in (finished / "eval").iterdir()) == [f"step-{n:06d}.parquet" for n in (0, 2, 4)]
    samples = pq.read_table(finished / "eval/step-000004.parquet").to_pylist()
    assert [s["task_id"] for s in samples] == ["eval:1", "eval:2"]
    assert {s["version"] for s in samples} == {4}
    assert rows(finished)[4]["eval/reward"] == pytest.approx(sum(s["score"] for s in samples) / 2)


def test_the_config_in_the_run_is_the_config(finished: Path) -> None:
    assert of_run(finished) == load(finished.parent / "toy.yaml")
    written = yaml.safe_load((finished / "config.yaml").read_text())
    assert written["learner"]["optimizer"] == "adamw", "defaults are filled in"
    assert validate(written) == of_run(finished)


def test_the_newest_and_the_best_checkpoints_are_kept(finished: Path) -> None:
    assert sorted(p.name for p in (finished / "checkpoints").iterdir())[-2:] == ["step-000003", "step-000004"]
    best = json.loads((finished / "checkpoints/step-000004/state.json").read_text())["best"]
    accuracies = {row["step"]: row["eval/accuracy"] for row in rows(finished) if row["step"] and "eval/accuracy" in row}
    assert best == [max(accuracies.values()), min(s for s, a in accuracies.items() if a == max(accuracies.values()))]
    assert (finished / f"checkpoints/step-{best[1]:06d}").is_dir()


@pytest.mark.parametrize("threads", [1, 2])
def test_two_steps_and_a_resume_to_four_are_four_steps(make: Make, threads: int) -> None:
    """Same parameters bit for bit, same samples, same metrics but for the clock. Random states differ at the seam."""
    settings: dict[str, Any] = {
        "data__eval": "held.jsonl",
        "eval__every": 1,
        "checkpoint__every": 2,
        "learner__minibatches": 2,
        "learner__scheduler": "cosine",
    }
    path = make({"type": "grpo", "kl": 0.01}, **settings)
    torch.set_num_threads(threads)
    try:
        whole = train(path)
        half = whole.with_name("half")
        shutil.copytree(whole, half)
        for late in ("checkpoints/step-000004", "rollouts/step-000003.parquet", "rollouts/step-000004.parquet"):
            target = half / late
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        lines = (half / "metrics.jsonl").read_text().splitlines(keepends=True)
        (half / "metrics.jsonl").write_text("".join(lines[:3]))
        torch.manual_seed(random.randrange(2**31))
        assert resume(half, [], quiet()) == 0
    finally:
        torch.set_num_threads(1)
    for name, tensor in trained(whole, 4).items():
        assert torch.equal(tensor, trained(half, 4)[name]), name
    for file in ("optimizer.safetensors", "random.safetensors"):
        a, b = (load_file(run / "checkpoints/step-000004" / file) for run in (whole, half))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    for step in (3, 4):
        for kind in ("rollouts", "eval"):
            a, b = (pq.read_table(run / f"{kind}/step-{step:06d}.parquet") for run in (whole, half))
            assert str(a.to_pylist()) == str(b.to_pylist())
    assert [timeless(row) for row in rows(half)] == [timeless(row) for row in rows(whole)]


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.startswith("time/") and key != "sync/seconds"}


def test_two_runs_of_one_seed_are_the_same_and_of_another_are_not(make: Make) -> None:
    path = make({"type": "rloo"}, steps=2)
    folder = path.parent
    first, second, other = (
        train(path, f"out={folder / name}", f"seed={seed}") for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert [timeless(row) for row in rows(first)] == [timeless(row) for row in rows(second)]
    assert all(torch.equal(t, trained(second, 2)[name]) for name, t in trained(first, 2).items())
    assert rows(first)[0]["loss/total"] != rows(other)[0]["loss/total"]


def test_sft_resumes_bit_for_bit_with_dropout(make: Make) -> None:
    """The dropout draws from torch's own generator, whose state the checkpoint holds."""
    path = make(
        {"type": "sft"},
        data__columns={"prompt": "ask", "completion": "gold"},
        reward=None,
        adapter__lora_dropout=0.3,
        checkpoint__every=2,
    )
    whole = train(path)
    half = whole.with_name("half")
    shutil.copytree(whole, half)
    shutil.rmtree(half / "checkpoints/step-000004")
    torch.manual_seed(99)
    assert resume(half, [], quiet()) == 0
    assert all(torch.equal(t, trained(half, 4)[name]) for name, t in trained(whole, 4).items())
    assert [timeless(row) for row in rows(half)] == [timeless(row) for row in rows(whole)]


def test_a_finished_run_can_be_trained_longer(make: Make) -> None:
    run = train(make({"type": "grpo"}, steps=2))
    assert resume(run, [], quiet()) == 0
    assert len(rows(run)) == 2
    assert resume(run, ["steps=3"], quiet()) == 0
    assert [row["step"] for row in rows(run)] == [1, 2, 3]
    assert of_run(run).steps == 3


@pytest.mark.parametrize("killed", ["after step 2", "before any checkpoint"])
def test_steps_that_a_kill_undid_are_logged_once(make: Make, killed: str) -> None:
    run = train(make({"type": "grpo"}, data__eval="held.jsonl", checkpoint__every=2, checkpoint__keep=9, steps=4))
    whole = rows(run)
    for folder in (run / "checkpoints").iterdir():
        if killed == "before any checkpoint" or folder.name == "step-000004":
            shutil.rmtree(folder)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    assert resume(run, [], quiet()) == 0
    again = rows(run)
    assert [row["step"] for row in again] == [0, 1, 2, 3, 4]
    for name in ("reward/mean", "loss/total", "eval/accuracy"):
        assert [row.get(name) for row in again] == [row.get(name) for row in whole]


def test_a_disk_that_is_full_for_one_row_costs_no_row(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of a step is written before its checkpoint: a resumed run takes the step again, and logs it."""
    path = make({"type": "grpo"}, checkpoint__every=1, steps=3)
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        return write(descriptor, data[:9] if data.startswith(b'{"step": 2') else data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        train(path)
    monkeypatch.setattr(os, "write", write)
    (run,) = [folder.parent for folder in path.parent.rglob("checkpoints")]
    assert resume(run, [], quiet()) == 0
    assert [row["step"] for row in rows(run)] == [1, 2, 3]
    assert ["time/checkpoint" in row for row in rows(run)] == [False, False, True], "of the step before in this session"


def test_full_fine_tuning_runs_and_resumes(make: Make) -> None:
    run = train(make({"type": "grpo"}, steps=2, adapter={"type": "none"}, learner__lr=1e-3, checkpoint__every=1))
    before, after = trained(run, 1), trained(run, 2)
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    shutil.rmtree(run / "checkpoints/step-000002")
    assert resume(run, [], quiet()) == 0
    assert all(torch.equal(tensor, trained(run, 2)[name]) for name, tensor in after.items())


def test_a_reward_that_raises_stops_the_run_and_leaves_the_last_checkpoint(make: Make, tmp_path: Path) -> None:
    """16 calls are two steps of 8; the third step's first call raises, and mended, the run goes on."""
    options = {"calls": str(tmp_path / "calls"), "fail_at": 20}
    path = make(
        {"type": "grpo"},
        reward={"type": "custom", "path": "rlft_toy_rewards:brittle", "options": options, "threads": 1},
        checkpoint__every=1,
    )
    with pytest.raises(RunError, match=r"5 of 8 traj.*'custom' failed on task 'train:\d'.*fell over.*rlft resume"):
        begin(load(path), quiet())
    run = path.parent / "run"
    assert [row["step"] for row in rows(run)] == [1, 2]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
    assert resume(run, ["reward.options.fail_at=10000"], quiet()) == 0
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]


def test_steps_without_advantages_change_nothing(make: Make) -> None:
    """All samples of a group score alike, so there is nothing to learn; the run goes on and says so."""
    run = train(make({"type": "grpo"}, steps=2, reward={"type": "length", "limit": 100, "free": 99}))
    first, second = rows(run)
    assert first["advantage/zero_groups"] == second["advantage/zero_groups"] == 1
    assert (first["tokens/trained"], first["loss/grad_norm"]) == (0, 0)
    assert all(row["parity/logprob_max"] < 1e-3 and row["policy/entropy"] > 0 for row in (first, second)), "no gap"


def test_a_selection_of_nothing_is_a_step_too(make: Make) -> None:
    run = train(make({"type": "rejection", "at_least": 2.0}, steps=2))
    assert [row["tokens/trained"] for row in rows(run)] == [0, 0]


def test_no_steps_are_an_evaluation(make: Make) -> None:
    run = train(make({"type": "grpo"}, steps=0, data__eval="held.jsonl"))
    assert [row["step"] for row in rows(run)] == [0]
    assert not (run / "checkpoints").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"reward": {"type": "custom", "path": "rlft_toy_rewards:lo"}}, "has no function 'lo'.*'low'"),
        ({"adapter": {"type": "lora", "target_modules": ["nothing"]}}, "adapter: PEFT refuses"),
        ({"reward": {"type": "number"}}, "'answer'"),
        ({"track": ["mlflow"]}, "track: mlflow is not installed.*pip install mlflow"),
    ],
)
def test_a_mistake_found_late_leaves_no_folder_behind(make: Make, changes: dict[str, Any], said: str) -> None:
    path = make({"type": "grpo"}, **changes)
    with pytest.raises(InputError, match=said):
        begin(load(path), quiet())
    assert not (path.parent / "run").exists()


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({"type": "number"}, r"task 'train:1': column 'answer' is missing"),
        (
            {"type": "weighted", "terms": {"right": {"type": "exact", "key": "solution"}}},
            r"column 'solution' is missing",
        ),
    ],
)
def test_a_missing_column_of_right_answers_is_refused_before_a_model_is_loaded(
    make: Make, reward: dict[str, Any], said: str
) -> None:
    path = make({"type": "grpo"}, reward=reward)
    with pytest.raises(InputError, match=said):
        material(load(path))
    held = {"reward": {"type": "exact", "key": "gold"}, "data__eval": "held.jsonl"}
    path = make({"type": "grpo"}, **held)
    material(load(path))
    (path.parent / "held.jsonl").write_text('{"ask": "Say one", "gold": "one"}\n{"ask": "Say two"}\n')
    with pytest.raises(InputError, match=r"task 'eval:2': column 'gold' is missing"):
        material(load(path))


@pytest.mark.parametrize("refused", [False, 0])
def test_a_refused_answer_is_no_demonstration(make: Make, refused: Any) -> None:
    path = make({"type": "sft"}, data__columns={"prompt": "ask", "completion": "gold"}, reward=None)
    rows = [{"ask": f"Say {i}", "gold": "one", "label": i != 2 or refused} for i in range(4)]
    (path.parent / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"1 row\(s\) whose label is false.*algorithm.type=rejection.*Rows: train:3$"):
        material(load(path))
    assert len(material(load(path, ["algorithm.type=rejection"])).groups) == 4
    assert len(material(load(path, ["algorithm.targets=weighted"])).groups) == 4


def test_a_teacher_is_learned_from_without_a_reward(make: Make, tiny_model: Path) -> None:
    run = train(make({"type": "on_policy_distillation"}, reward=None, teacher={"path": str(tiny_model)}, steps=2))
    assert [row["reward/missing"] for row in rows(run)] == [0.0, 0.0]
    assert all(row["tokens/trained"] > 0 for row in rows(run))


def test_the_end_says_what_the_run_is_good_for(make: Make) -> None:
    """A policy is talked to; what only scores is used as a reward, by a line that works as it stands."""

    def said(algorithm: dict[str, Any], **changes: Any) -> tuple[str, Path]:
        path = make(algorithm, steps=1, **changes)
        console = Console(record=True, width=1000, file=io.StringIO())
        assert begin(load(path), Terminal(console)) == 0
        return console.export_text().splitlines()[-1], path.parent / "run"

    last, run = said({"type": "grpo"})
    assert last == f"done: 1 steps in {run}. Talk to it: rlft sample {run}"
    last, run = said({"type": "reward_model", "loss": "regression"})
    assert "rlft sample" not in last
    line = last.rpartition("Score with it: ")[2]
    assert load(make({"type": "grpo"}), [line]).reward.path == str(run)  # type: ignore[union-attr]


def test_another_adapter_cannot_resume_a_run(make: Make) -> None:
    run = train(make({"type": "grpo"}, steps=1))
    with pytest.raises(InputError, match=r"step-000001: its parameters are not those"):
        resume(run, ["steps=2", "adapter.r=2"], quiet())
    assert of_run(run).model_dump()["adapter"]["r"] == 4, "the run's config is as it was"


def test_a_number_in_the_folder_is_the_next_free_one(make: Make) -> None:
    path = make({"type": "grpo"}, steps=0)
    config = load(path, [f"out={path.parent}/run-N"])
    assert [begin(config, quiet()) for _ in range(2)] == [0, 0]
    assert sorted(p.name for p in path.parent.glob("run-*")) == ["run-1", "run-2"]


def test_the_material_says_what_fits(make: Make) -> None:
    path = make({"type": "grpo"})
    stuff = material(load(path))
    longest = max(len(stuff.chat.prompt(task.messages)) for task in stuff.tasks)
    assert longest + 6 <= stuff.context <= 512
    with pytest.raises(InputError, match=r"9 prompts are longer than 2 tokens.*train:\d"):
        material(load(path, ["rollout.engine.context=8"]))
    with pytest.raises(InputError, match=r"prompts are longer than"):
        material(load(path, ["rollout.sampling.max_tokens=500"]))
