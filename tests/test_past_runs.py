"""Whole runs against the past: what is played, learned and kept, resumed and refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from rlft.after import evaluate
from rlft.build import assemble
from rlft.checkpoint import Checkpoints
from rlft.earlier import PAID, PLAYED, Earlier
from rlft.engine.worker import WorkerEngine
from rlft.envs.base import Action
from rlft.forecast import Forecast
from rlft.material import material
from rlft.plan import describe
from rlft.player import derive_seed
from rlft.replay import replay
from rlft.session import begin, resume
from rlft.settings import load, validate
from rlft.terminal import Terminal
from rlft.types import (
    InputError,
    Message,
    Task,
    Turn,
)
from tests.test_past import LORA

pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = Terminal(Console(quiet=True))


class Duel:
    """Two roles in turn, two answers each; whoever says more early letters wins, and the other loses."""

    def __init__(self, task: Task) -> None:
        self.said: list[str] = []

    async def reset(self) -> tuple[Message, ...]:
        return ({"role": "user", "content": "Say."},)

    async def step(self, action: Action) -> Turn:
        self.said.append(action.text)
        if len(self.said) < 4:
            told: Message = {"role": "user", "content": f"Say more, {len(self.said)}."}
            return Turn((told,), done=False, rewrite=True, role=len(self.said) % 2)
        early = [sum(letter in "abcdefgh" for text in self.said[i::2] for letter in text) for i in (0, 1)]
        lead = (early[0] > early[1]) - (early[0] < early[1])
        return Turn(pays={0: float(lead), 1: -float(lead)}, metrics={"0/success": lead > 0, "1/success": lead < 0})

    async def close(self) -> None: ...


PLAIN: dict[str, Any] = {
    "name": "past",
    "steps": 5,
    "model": {"path": "tiny-random", "device": "cpu"},
    "adapter": LORA,
    "data": {"train": {"type": "seeds", "count": 8}},
    "env": {"type": "custom", "path": "tests.test_past_runs:Duel", "roles": 2, "paid_apart": True, "most_answers": 4},
    "agents": {"past": 2, "every": 2, "against": 0.5},
    "reward": {"type": "outcome", "weight": 0},
    "rollout": {"engine": {"type": "local"}, "tasks_per_step": 3, "group_size": 6, "sampling": {"max_tokens": 8}},
    "algorithm": {"type": "grpo"},
    "learner": {"lr": 1e-2},
    "checkpoint": {"every": 1, "keep": 9},
    "show": {"every": 0},
}


SHARED: dict[str, Any] = {
    "env": {"type": "pioneer_observer"},
    "agents": {"past": 1, "every": 1, "against": 1.0},
    "data": {"train": {"type": "generated", "limit": 8}},
    "reward": {"type": "per_turn", "of": {"type": "format", "pattern": "[a-m]", "full": False}},
}


def trained(folder: Path, **changes: Any) -> Path:
    """A run into `folder`."""
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**PLAIN, **changes, "out": str(folder)}))
    assert begin(load(path), QUIET) == 0
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "whole")


def rows_of(run: Path, step: int) -> list[dict[str, Any]]:
    return pq.read_table(run / f"rollouts/step-{step:06d}.parquet").to_pylist()


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def kept_at(run: Path, step: int) -> dict[int, dict[str, torch.Tensor]]:
    """By version, what a checkpoint holds of the past."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(Checkpoints(run / "checkpoints", 9).path(step) / "past.safetensors").items():
        version, _, name = key.partition("|")
        found.setdefault(int(version), {})[name] = tensor
    return found


def met_at(earlier: Earlier, step: int, tasks: list[str]) -> list[int]:
    """The opponents of a step's episodes, by the seeds that they are played from."""
    seed = derive_seed(0, "rollout", 3 * (step - 1))
    seeds = [derive_seed(seed, i, task, j) for i, task in enumerate(tasks) for j in range(6)]
    return [met[1] for one in seeds if (met := earlier.opponent(one, step - 1))]


def test_a_run_plays_its_past_and_learns_from_itself_alone(whole: Path) -> None:
    """Every row is the current policy's own, parity holds, and episodes, opponents and their share are told."""
    earlier = Earlier(2, 2, 0.5, 2)
    for step, line in enumerate(lines_of(whole), 1):
        rows = rows_of(whole, step)
        assert {row["agent"] for row in rows} == {0}
        assert {row["version"] for row in rows} == {step - 1}
        assert max(line["sync/gap"], line["parity/logprob_max"]) < 1e-4
        met = met_at(earlier, step, list(dict.fromkeys(row["task_id"] for row in rows)))
        assert 0 < line["past/episodes"] == len(met) < 18
        assert line[PLAYED] == pytest.approx(sum(met) / len(met))
        trajectories = {(row["group"], row["trajectory"]) for row in rows}
        assert len(trajectories) == 2 * 18 - len(met), "an episode against itself is two trajectories"
        assert -1 <= line[PAID] <= 1
        assert line["tokens/trained"] == sum(sum(row["mask"]) for row in rows if row["advantage"])
        assert line["tokens/generated"] == pytest.approx(18 * 4 * 8, rel=0.5)
        assert line["tokens/generated"] > sum(sum(row["mask"]) for row in rows)


def test_checkpoints_hold_the_versions_as_they_were(whole: Path) -> None:
    for step in range(1, 6):
        kept = kept_at(whole, step)
        assert sorted(kept) == Earlier(2, 2, 0.5, 2).kept(step)
        for version, values in kept.items():
            if version:
                now = load_file(whole / f"checkpoints/step-{version:06d}/trained.safetensors")
                assert all(torch.equal(tensor, now[name]) for name, tensor in values.items())


def same(one: Path, other: Path, steps: tuple[int, ...]) -> None:
    """Bit for bit: what is sampled, and all that the last checkpoint holds."""
    for step in steps:
        assert repr(rows_of(one, step)) == repr(rows_of(other, step))  # where NaN equals NaN
    ends = [Checkpoints(run / "checkpoints", 9).path(steps[-1]) for run in (one, other)]
    files = sorted(path.relative_to(ends[0]) for path in ends[0].rglob("*.safetensors"))
    assert Path("past.safetensors") in files
    for file in files:
        first, second = (load_file(end / file) for end in ends)
        assert first.keys() == second.keys()
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("stop", [3, 4], ids=["between snapshots", "at a snapshot"])
def test_a_resumed_run_is_the_uninterrupted_one(whole: Path, tmp_path: Path, stop: int) -> None:
    cut = trained(tmp_path / "cut", steps=stop)
    assert resume(cut, ["steps=5"], QUIET) == 0
    same(whole, cut, tuple(range(stop + 1, 6)))


def test_a_run_is_resumed_with_its_own_past(whole: Path, tmp_path: Path) -> None:
    alone = trained(tmp_path / "alone", steps=1, agents={})
    for run, changes, why in (
        (whole, ["agents.past=0"], "was written with past versions"),
        (alone, ["agents.past=2"], "was written without past versions"),
        (whole, ["agents.every=1"], "with past=2 and every=1 it would be that of 4, 5"),
    ):
        with pytest.raises(InputError, match=rf"agents\.past: .*{why}"):
            resume(run, [*changes, "steps=7"], QUIET)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One request at a time, since what it is batched with shows in the last bit, and hangs on timing in a worker."""
    return trained(tmp_path_factory.mktemp("runs") / "undisturbed", **one_by_one("here"))


def one_by_one(place: str) -> dict[str, Any]:
    """A short run that keeps every version."""
    engine = {"type": "local", "place": place, "max_sequences": 1}
    rollout = {**PLAIN["rollout"], "engine": engine, "tasks_per_step": 1, "group_size": 4}
    return {"steps": 3, "agents": {"past": 2, "every": 1, "against": 0.5}, "rollout": rollout}


@pytest.mark.parametrize(("method", "number"), [
    pytest.param("load_files", 4, id="while the current one is loaded"),
    pytest.param("load_files", 3, id="while an earlier one is", marks=pytest.mark.slow),
    pytest.param("read_back", 5, id="in an earlier one's proof", marks=pytest.mark.slow),
    pytest.param("generate", 25, id="while a step is sampled", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_lost_engine_gets_every_version_again(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, number: int
) -> None:
    """Each sync here loads, proves and asks twice: for the version that is kept, and for the current one, the same."""
    plain, seen = WorkerEngine._call, []

    async def call(self: WorkerEngine, name: str, *arguments: Any) -> Any:
        if name == method:
            seen.append(name)
            if len(seen) == number:
                assert self._process.pid is not None
                os.kill(self._process.pid, signal.SIGKILL)
        return await plain(self, name, *arguments)

    monkeypatch.setattr(WorkerEngine, "_call", call)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the worker inherits it
    run = trained(tmp_path / "struck", **one_by_one("worker"))
    assert len((run / "failures.jsonl").read_text().splitlines()) == 1
    same(undisturbed, run, (1, 2, 3))


def test_what_two_earn_together_is_learned_by_the_one_who_is_trained(tmp_path: Path) -> None:
    """An environment that pays both: a trajectory keeps the samples of one role, and counts what both were paid."""
    shared = trained(tmp_path / "shared", **SHARED, steps=2)
    for step in (1, 2):
        rows = rows_of(shared, step)
        assert {row["agent"] for row in rows} == {0}
        ids = [(row["group"], row["trajectory"]) for row in rows]
        assert len(ids) == len(set(ids)), "of two samples one is left"
        assert {row["score"] for row in rows} <= {0.0, 1.0, 2.0}
        assert any(sum(row["token_rewards"]) != row["score"] for row in rows)
    with pytest.raises(InputError, match=r"agents\.past: a step is not computed again"):
        replay(shared, [], None)


def test_a_step_against_the_past_is_computed_again(whole: Path) -> None:
    """Where roles are paid each for itself, all that was learned from is recorded."""
    for step in replay(whole, [], "2-3")["steps"]:
        assert step["gradient"]["norm"] == pytest.approx(step["gradient"]["recorded_norm"], rel=1e-5)


def test_evaluation_never_meets_the_past(tmp_path: Path) -> None:
    held = {"train": {"type": "generated", "limit": 8}, "eval": {"type": "generated", "limit": 3}}
    run = trained(tmp_path / "seen", **{**SHARED, "data": held}, steps=1, eval={"accuracy": "format/first"})
    rows = pq.read_table(run / "eval/step-000001.parquet").to_pylist()
    assert {row["agent"] for row in rows} == {0}
    assert [row["sample"] for row in rows] == [0, 1] * 3, "both roles of each"
    assert "past" not in evaluate(run, [], None)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    def refused(**changes: Any) -> str:
        with pytest.raises(InputError, match=r"^agents\.past: ") as error:
            material(validate({**PLAIN, **changes}))
        return str(error.value)

    vllm = {**PLAIN["rollout"], "engine": {"type": "vllm"}}
    generated = {"data": {"train": {"type": "generated", "limit": 4}}, "reward": {"type": "number"}}
    assert "single_turn has 1 role, which leaves none to the past" in refused(env={"type": "single_turn"}, **generated)
    assert "is kept of one policy, and there are several" in refused(agents={"count": 2, "past": 1})
    assert "without an adapter" in refused(adapter={"type": "none"})
    assert "one set of merged weights" in refused(rollout=vllm, sync={"type": "merged"})
    shared = {"env": {"type": "pioneer_observer"}, **generated}
    assert "draws further members" in refused(algorithm={"type": "remax"}, **shared)
    assert "units of 2" in refused(algorithm={"type": "dpo"}, **shared)
    for wrong in ({"past": -1}, {"past": 1, "every": 0}, {"past": 1, "against": 0.0}, {"past": 1, "against": 1.5}):
        with pytest.raises(InputError, match=r"agents\.(past|every|against)"):
            validate({**PLAIN, "agents": wrong})
    with pytest.raises(InputError, match=r"agents\.past: vLLM serves several agents as hot-loaded adapters only, and "):
        assemble(material(validate({**PLAIN, "rollout": vllm, "adapter": {**LORA, "use_dora": True}})), None)


def test_the_plan_says_so() -> None:
    text = describe(validate(PLAIN))
    assert "one policy, and 2 of its past, one more after every 2 steps" in text
    assert "in a share of 0.5 of the episodes it plays one role" in text
    assert "past" not in describe(validate({**PLAIN, "agents": {}, "name": "alone"}))
    found = []
    for past in (0, 2):
        config = validate({**PLAIN, "agents": {"past": past}})
        (process,) = Forecast(material(config)).footprint(config, rough=True).processes
        found.append({term.name: term.bytes for term in process.terms})
    assert found[1].pop("past adapters") == 2 * found[0]["adapter"]
    (more,) = {name: size - found[0][name] for name, size in found[1].items() if size != found[0][name]}.items()
    assert more[0] == "engine's weights"
    assert more[1] > 0


@pytest.mark.slow
def test_a_run_on_vllm(tmp_path: Path) -> None:
    """Past adapters are hot-loaded beside the current one, and replaced."""
    rollout = {**PLAIN["rollout"], "engine": {"type": "vllm", "cache_gb": 0.05}}
    run = trained(tmp_path / "vllm", steps=4, rollout=rollout, agents={"past": 2, "every": 1, "against": 1.0})
    for step, line in enumerate(lines_of(run), 1):
        assert max(line["parity/logprob_max"], line["sync/gap"]) < 1e-3
        assert line["past/episodes"] > 9
        assert {row["agent"] for row in rows_of(run, step)} == {0}
        assert max(0, step - 2) <= line[PLAYED] <= step - 1
    assert sorted(kept_at(run, 4)) == [3, 4]
