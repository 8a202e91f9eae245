"""A run's steps again: the same numbers with its own config, the right difference with another; and its environment."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

import rlft.environment as environment
from rlft.build import make_policy
from rlft.doctor import examine
from rlft.explain import explain
from rlft.material import material
from rlft.replay import Bench, replay
from rlft.session import begin, of_run, resume
from rlft.settings import load
from rlft.tables import show_explained, show_replay
from rlft.terminal import Terminal
from rlft.track import Record, read_groups
from rlft.types import Group, InputError, Task

pytestmark = pytest.mark.usefixtures("one_thread")

Train = Callable[..., Path]
LOW, EVEN = "rlft_replay_rewards:low", "rlft_replay_rewards:even"
REWARDS = '''
def _share(trajectory, good):
    said = [t for s in trajectory.samples for t, chosen in zip(s.tokens, s.mask) if chosen]
    return sum(map(good, said)) / len(said)


def low(trajectory):
    """The share of sampled tokens whose id is small."""
    return _share(trajectory, lambda token: token < 100)


def even(trajectory):
    """The share of sampled tokens whose id is even."""
    return _share(trajectory, lambda token: token % 2 == 0)
'''


@pytest.fixture(scope="module")
def train(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """train(changes) -> the folder of a finished run of 3 steps with plain SGD and every checkpoint kept."""
    modules = tmp_path_factory.mktemp("rewards")
    (modules / "rlft_replay_rewards.py").write_text(REWARDS)

    def run(**changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("replayed")
        asked = [{"ask": f"Say {word}", "answer": word} for word in ("one", "two", "three", "four")]
        (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
        plain = {
            "name": "toy",
            "steps": 3,
            "out": str(folder / "run"),
            "model": {"path": str(tiny_model), "device": "cpu"},
            "adapter": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
            "data": {"train": str(folder / "train.jsonl"), "columns": {"prompt": "ask"}},
            "reward": {"type": "weighted", "terms": {
                "low": {"type": "custom", "path": LOW}, "even": {"type": "custom", "path": EVEN, "weight": 0.5}}},
            "rollout": {"engine": {"type": "local"}, "tasks_per_step": 2, "group_size": 4,
                        "sampling": {"max_tokens": 6}},
            "algorithm": {"type": "grpo"},
            "learner": {"lr": 0.5, "optimizer": "sgd", "max_grad_norm": 0},
            "checkpoint": {"every": 1, "keep": 9},
            "show": {"every": 0},
        }  # fmt: skip
        path = folder / "toy.yaml"
        path.write_text(yaml.safe_dump(plain | changes))
        assert begin(load(path), Terminal(Console(quiet=True))) == 0
        return folder / "run"

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(modules)
        yield run


@pytest.fixture(scope="module")
def finished(train: Train) -> Path:
    return train()


def rows(run: Path, step: int) -> list[dict[str, Any]]:
    return pq.read_table(run / f"rollouts/step-{step:06d}.parquet").to_pylist()


def parameters(run: Path, version: int) -> dict[str, torch.Tensor]:
    """Of a version; 0 is made anew from the config."""
    if version:
        return load_file(run / f"checkpoints/step-{version:06d}/trained.safetensors")
    config = of_run(run)
    return {name: p.detach() for name, p in make_policy(config, material(config).model).trainable()}


def one(report: dict[str, Any], name: str, step: int = 0) -> dict[str, Any]:
    return next(part for part in report["steps"][step]["rewards"] if part["name"] == name)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_its_own_config_gives_the_gradient_that_the_run_took(finished: Path, step: int) -> None:
    """With SGD the step is -lr times the gradient, so the checkpoints hold it."""
    bench = Bench(finished, of_run(finished))
    bench.bring(bench.nearest(step - 1))
    taken = bench.take(read_groups(finished / f"rollouts/step-{step:06d}.parquet", bench.tasks()))
    before, after = parameters(finished, step - 1), parameters(finished, step)
    moved = {name: (before[name] - after[name]) / 0.5 for name in before}
    assert max(float(g.abs().max()) for g in moved.values()) > 1e-3
    for name, gradient in taken.gradients.items():
        torch.testing.assert_close(gradient, moved[name], rtol=0, atol=1e-6)
    logged = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert taken.norm == pytest.approx(logged[step - 1]["loss/grad_norm"], abs=1e-6)
    assert taken.loss == pytest.approx(logged[step - 1]["loss/total"], abs=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="group-relative"),
        pytest.param({"algorithm": {"type": "grpo", "kl": 0.1}, "reference": {"every": 1, "mix": 0.5}}, id="reference"),
        pytest.param({"algorithm": {"type": "dapo", "mask_truncated": False}}, id="refilled"),
        pytest.param({"algorithm": {"type": "ppo"}}, id="critic"),
    ],
)
def test_its_own_config_reproduces_scores_advantages_and_norms(train: Train, changes: dict[str, Any]) -> None:
    run = train(**changes)
    report = replay(run, [], None)
    assert report["scored_anew"]
    assert [found["step"] for found in report["steps"]] == [1, 2, 3]
    for found in report["steps"]:
        assert found["exact"]
        assert all((part["changed"], part["largest"]) == (0, 0.0) for part in found["rewards"])
        assert found["advantages"]["recorded_rows"] == found["advantages"]["replayed_rows"] > 0
        assert found["advantages"]["reproduced"] < 1e-6
        assert found["advantages"]["changed"] == 0
        assert found["gradient"]["cosine"] == pytest.approx(1.0, abs=1e-9)
        if changes.get("algorithm", {}).get("type") != "ppo":  # its norm in the log is that of the critic, too
            assert found["gradient"]["norm"] == pytest.approx(found["gradient"]["recorded_norm"], abs=1e-6)


def test_another_weight_changes_the_scores_by_what_it_says(finished: Path) -> None:
    report = replay(finished, ["reward.terms.even.weight=-2"], "1-2")
    for i, step in enumerate((1, 2)):
        parts = [dict(row["rewards"]) for row in rows(finished, step)]
        assert one(report, "even", i)["changed"] == one(report, "low", i)["changed"] == 0
        expected = [part["low"] - 2 * part["even"] for part in parts]
        assert one(report, "score", i)["replayed"] == pytest.approx(sum(expected) / len(expected), abs=1e-9)
        assert report["steps"][i]["gradient"]["cosine"] < 0.999


def test_a_reward_turned_round_turns_the_gradient_round(finished: Path) -> None:
    """GRPO's advantages change their sign, and at ratio 1 the gradient is linear in them."""
    report = replay(finished, ["reward.terms.low.weight=-1", "reward.terms.even.weight=-0.5"], "1")
    (found,) = report["steps"]
    assert found["gradient"]["cosine"] == pytest.approx(-1, abs=1e-5)
    assert found["gradient"]["norm"] == pytest.approx(found["gradient"]["own_norm"], rel=1e-4)
    nonzero = sum(row["advantage"] != 0 for row in rows(finished, 1))
    assert found["advantages"]["flipped"] == nonzero > 0


def test_another_objective_keeps_the_recorded_scores(finished: Path) -> None:
    report = replay(finished, ["algorithm.type=rloo"], "2")
    assert not report["scored_anew"]
    assert one(report, "score")["changed"] == 0
    assert report["steps"][0]["advantages"]["changed"] > 0
    assert 0 < report["steps"][0]["gradient"]["cosine"] <= 1 + 1e-9
    critic = replay(finished, ["algorithm.type=ppo"], "2")["steps"][0]
    assert critic["gradient"]["norm"] > 0, "a critic that the run has not begins as it does in a new run"


def test_a_missing_checkpoint_is_said(train: Train) -> None:
    run = train(checkpoint={"every": 0})
    found = {part["step"]: part for part in replay(run, [], None)["steps"]}
    assert [(found[step]["used"], found[step]["exact"]) for step in (1, 2, 3)] == [(0, True), (0, False), (3, False)]
    console = Console(width=200, record=True)
    show_replay(replay(run, [], "2"), console)
    assert "step 2: there is no checkpoint of version 1" in console.export_text()


@pytest.mark.parametrize(
    ("overrides", "steps", "said"),
    [
        (["rollout.group_size=2"], None, "rollout: the trajectories are recorded"),
        (["algorithm.type=sft"], None, "do not learn from the same"),
        (["reward.terms.odd.weight=1"], None, "reward"),
        ([], "7-9", "rollouts of steps 1 to 3, none in 7-9"),
        ([], "few", "'few' is neither a step nor a range"),
    ],
)
def test_what_cannot_be_replayed_is_refused(finished: Path, overrides: list[str], steps: str | None, said: str) -> None:
    with pytest.raises(InputError, match=said):
        replay(finished, overrides, steps)


def test_changed_data_is_refused(train: Train) -> None:
    run = train(steps=1)
    data = run.parent / "train.jsonl"
    text = data.read_text()
    data.write_text(text.replace("Say ", "Shout "))
    with pytest.raises(InputError, match=r"has another prompt in data\.train, which has changed since the run"):
        replay(run, [], None)
    with pytest.raises(InputError, match="has changed since the run"):
        explain(run, 1, 0)


def test_what_is_written_is_read_back(tmp_path: Path, make_groups: Callable[..., list[Group]]) -> None:
    """Two samples in one trajectory, an environment's rewards, turns, and what a reward paid."""
    from dataclasses import replace

    from rlft.types import Said, Sample

    (group,) = make_groups(1, 2)
    asked = {"role": "user", "content": "a"}
    task = Task("task", (asked,))
    spoken = (asked, {"role": "assistant", "content": "b"})
    other = ({"role": "user", "content": "again"}, {"role": "assistant", "content": "c"})
    first = replace(group[0], task=task, messages=other, score=0.1 + 0.2)
    first.samples[0].rewards[-1] = 0.25
    first.samples.append(Sample([5, 6], [False, True], [math.nan, -0.5], [0.0, 1 / 3], 4))
    first.said = (Said(spoken, 0, len(first.samples[0].tokens) - 1), Said(other, 1, 1))
    first.paid = {"x": [(0, 4, 0.0), (1, 1, 1 / 3)]}
    first.metrics = {"reward/x": 0.1}
    second = replace(group[1], task=task, messages=spoken, score=None, drawn=2, finish="length")
    Record(tmp_path).trajectories("rollouts", 1, [(first, second)])
    ((one, two),) = read_groups(tmp_path / "rollouts/step-000001.parquet", {"task": task})
    for read, wrote in ((one, first), (two, second)):
        for name in ("task", "messages", "score", "finish", "drawn", "said", "paid", "metrics", "total"):
            assert getattr(read, name) == getattr(wrote, name), name
        for a, b in zip(read.samples, wrote.samples, strict=True):
            assert (a.tokens, a.mask, a.rewards, a.version) == (b.tokens, b.mask, b.rewards, b.version)
            assert a.logprobs == pytest.approx(b.logprobs, nan_ok=True)


def test_several_turns_that_a_reward_pays_for(train: Train) -> None:
    """What was paid turn by turn is taken back before it is paid again, and no other reward inherits it."""
    paying = {"type": "per_turn", "of": {"type": "custom", "path": LOW}}
    run = train(env={"type": "retry"}, reward=paying, steps=1)
    report = replay(run, [], None)
    assert one(report, "score")["largest"] == pytest.approx(0, abs=1e-9)
    assert report["steps"][0]["advantages"]["reproduced"] < 1e-6
    plain = replay(run, ["reward={type: custom, path: '" + LOW + "'}"], None)
    assert one(plain, "score")["replayed"] == pytest.approx(one(plain, "custom")["replayed"])


def test_the_environment_is_noted_and_compared(train: Train) -> None:
    run = train(steps=1)
    (noted,) = environment.read(run)
    assert noted["start"] == 0
    assert noted["packages"]["torch"] == torch.__version__
    assert {"data.train.path", "model.path/config.json"} <= set(noted["files"])
    assert environment.differences(noted, environment.facts(of_run(run))) == []
    text, _ = examine(run)
    assert "this machine, its packages and the run's files are as they were" in text
    (run.parent / "train.jsonl").write_text('{"ask": "?", "answer": "!"}\n')
    noted["machine"]["threads"] = 77
    noted["packages"]["torch"] = "0.1"
    noted["lock"] = "0" * 64
    (run / environment.FILE).write_text(json.dumps([noted]))
    text, _ = examine(run)
    assert "threads: 77 then, 1 now" in text
    assert f"package torch: 0.1 then, {torch.__version__} now" in text
    assert "lock: 000000000000 then" in text
    assert "1 package(s) differ" in text
    assert "file data.train.path: its content is another" in text


def test_a_resumed_run_notes_every_session(train: Train) -> None:
    run = train(steps=1)
    assert resume(run, ["steps=2"], Terminal(Console(quiet=True))) == 0
    assert [session["start"] for session in environment.read(run)] == [0, 1]


def test_a_run_comes_out_the_same_from_its_own_config(finished: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert begin(load(finished / "config.yaml", [f"out={again}"]), Terminal(Console(quiet=True))) == 0
    first, second = parameters(finished, 3), parameters(again, 3)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_explained_text_stands_in_the_table(finished: Path) -> None:
    console = Console(width=200, record=True)
    show_explained(explain(finished, 1, 0), console)
    text = console.export_text()
    assert "step 1, row 0: group 0, trajectory 0, sample 0 of task" in text
    assert "the step's loss is" in text
