"""Faults that happen for real: graders that break, gradients that are not finite, engines that are killed or stopped,
disks that may not be written, trackers that are gone. What the run survives, and what it stops at.
"""

from __future__ import annotations

import asyncio
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import rlft.session as session
from rlft.engine.local import LocalEngine
from rlft.engine.worker import WorkerEngine
from rlft.engine.worker import in_worker as engine_in_worker
from rlft.faults import FILE
from rlft.session import begin, resume
from rlft.settings import validate
from rlft.terminal import Terminal
from rlft.trainer import Run
from rlft.types import Completion, EngineLost, RunError, Sampling

REWARDS = '''
"""Graders with faults. `calls` is a file that counts, so that a fault comes at a certain call."""
import pathlib, subprocess, time


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


def turns_read_only(trajectory, calls, at, disk):
    if count(calls) == at:
        subprocess.run(["mount", "--bind", disk, disk], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)
    return low(trajectory)
'''
Make = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # workers inherit it
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


# A draw that ends early.


@pytest.mark.parametrize("asked", [False, True])
def test_what_is_drawn_again_is_drawn_by_the_same_dice(asked: bool) -> None:
    """A reward of the user's may draw from Python's and NumPy's random states; a failed or abandoned draw is undone."""

    class Dice:
        online, metrics, selected = True, {}, None

        async def next(self) -> list[Any]:
            thrown.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
            if not asked:
                raise RunError("the reward failed")
            going.stop()
            await asyncio.sleep(60)
            return []

    async def draw() -> None:
        if asked:
            assert await going.draw() == []
            going.stopping = False
        else:
            with pytest.raises(RunError):
                await going.draw()

    thrown: list[tuple[float, float, float]] = []
    nothing: Any = None
    going = Run(1, cast(Any, Dice()), nothing, nothing, nothing, nothing)
    asyncio.run(draw())
    asyncio.run(draw())
    assert thrown[0] == thrown[1]


# Loss and gradient.


@pytest.mark.parametrize("kind", ["rloo", "loo_ppo"])
def test_a_step_that_is_not_finite_is_skipped_and_kept(make: Make, tmp_path: Path, kind: str) -> None:
    """Calls 9 to 12 are the first group of step 2. With a ratio, the rollout's log-probs stand for the old ones too."""
    folder, said = run(make({"type": kind}, reward=grader("huge", calls=str(tmp_path / "calls"), first=9, last=12)))
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


# Engines.


@pytest.fixture
def strike(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int, int], list[int]]:
    """strike(method, number, signal): the worker is sent it 20 ms after the so-many-th call of that method went out.

    -> the processes that were struck. number 0: every call.
    """

    def arm(method: str, number: int, what: int) -> list[int]:
        plain, seen, struck = WorkerEngine._call, [], []

        async def call(self: WorkerEngine, name: str, *arguments: Any) -> Any:
            if name == method:
                seen.append(name)
                if number in (0, len(seen)):
                    pid = self._process.pid
                    assert pid is not None
                    struck.append(pid)
                    asyncio.get_running_loop().call_later(0.02, os.kill, pid, what)
                    if number == 0 or method != "generate":  # an answer must not be faster
                        os.kill(pid, signal.SIGSTOP if what == signal.SIGSTOP else what)
            return await plain(self, name, *arguments)

        monkeypatch.setattr(WorkerEngine, "_call", call)
        return struck

    return arm


LOST = {"type": "local", "place": "worker"}


def left_behind() -> set[str]:
    """Folders of syncs, and processes of engines."""
    kept = {path.name for place in ("/dev/shm", tempfile.gettempdir()) for path in Path(place).glob("rlft-*")}
    return kept | {str(child.pid) for child in multiprocessing.active_children()}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The run that nothing happens to; made when first asked for."""
    return []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "number", "what"),
    [
        pytest.param("generate", 4, signal.SIGSTOP, id="stopped in an evaluation"),
        pytest.param("generate", 13, signal.SIGKILL, id="killed while a step is sampled"),
        pytest.param("load_files", 2, signal.SIGKILL, id="killed while weights are loaded"),
        pytest.param("read_back", 2, signal.SIGKILL, id="killed in a proof"),
    ],
)
def test_a_lost_engine_is_replaced_and_the_run_is_the_undisturbed_one(
    make: Make, tmp_path: Path, undisturbed: list[Path], strike: Any, method: str, number: int, what: int
) -> None:
    before = left_behind()
    plain: dict[str, Any] = {"rollout__sampling__max_tokens": 60, "steps": 2, "eval__every": 1}
    plain["data__eval"] = str(tmp_path / "train.jsonl")
    if not undisturbed:
        undisturbed.append(run(make(out=str(tmp_path / "undisturbed"), **plain))[0])
    plain["rollout__engine"] = {"type": "local", "place": "worker", "patience": 3.0}
    struck = strike(method, number, what)
    folder, said = run(make(**plain))
    assert len(struck) == 1
    for part in ("trained", "optimizer"):
        assert same(trained(folder, 2, part), trained(undisturbed[0], 2, part))
    for kind in ("rollouts", "eval"):
        for file in sorted((folder / kind).iterdir()):
            other = pq.read_table(undisturbed[0] / kind / file.name)
            assert repr(pq.read_table(file).to_pylist()) == repr(other.to_pylist())  # where NaN equals NaN
    (line,) = failures(folder)
    assert line["fault"] == "engine"
    reason = "gave no sign of life for 3 s and was ended" if what == signal.SIGSTOP else "ended (exit code -9)"
    assert f"the engine's process {reason}" in line["said"]
    assert f"the engine's process {reason}: another is started" in said
    assert left_behind() == before


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [0, 1])
def test_an_engine_that_is_lost_while_another_is_filled_is_replaced_too(make: Make, strike: Any, ahead: int) -> None:
    """The first is killed while it samples, the second while the weights come in."""
    before = left_behind()
    config = make(rollout__engine=LOST, rollout__ahead=ahead, rollout__sampling__max_tokens=60, steps=2)
    struck = [strike("generate", 2, signal.SIGKILL), strike("load_files", 2, signal.SIGKILL)]
    folder, _ = run(config)
    assert [len(pids) for pids in struck] == [1, 1]
    assert [line["fault"] for line in failures(folder)] == ["engine", "engine"]
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert left_behind() == before


@pytest.mark.slow
def test_an_engine_that_is_lost_again_and_again_ends_the_run(make: Make, strike: Any) -> None:
    before = left_behind()
    config = make(rollout__engine=LOST, faults__restarts=1)
    struck = strike("load_files", 0, signal.SIGKILL)
    with pytest.raises(RunError, match=r"exit code -9.*started again 1 times, and faults.restarts allows no more"):
        run(config)
    assert len(set(struck)) == 2
    assert len(failures(Path(config.out))) == 1
    assert left_behind() == before


@pytest.mark.slow
def test_a_long_generation_is_no_hang(tiny_model: Path) -> None:
    """Many times the patience in one go, in which the worker's event loop never has its turn."""
    settings = {"model": tiny_model, "dtype": torch.float32, "device": torch.device("cpu"), "max_sequences": 120}
    engine = engine_in_worker(LocalEngine, patience=2.5, **settings)

    async def ask() -> float:
        samplings = [Sampling(max_tokens=480, seed=i) for i in range(120)]
        begun = time.monotonic()
        await asyncio.gather(*(engine.generate([5, 6, 7], sampling) for sampling in samplings))
        seconds = time.monotonic() - begun
        await engine.close()
        return seconds

    assert asyncio.run(ask()) > 5


@pytest.mark.slow
def test_an_engine_that_stands_still_in_one_call_is_ended() -> None:
    """The process is alive, and says so; its main thread waits for something that never comes."""
    stuck: Any = Stuck
    engine = WorkerEngine(stuck, patience=2.0)

    async def ask() -> None:
        assert (await engine.generate([1], Sampling(max_tokens=1))).tokens == [1], "it works"
        begun = time.monotonic()
        with pytest.raises(EngineLost, match=r"stood still in one call for 2 s and was ended"):
            await engine.generate([1], Sampling(max_tokens=2))
        assert time.monotonic() - begun < 10
        await engine.close()

    asyncio.run(ask())
    assert not engine._process.is_alive()


class Stuck:
    """An engine whose second kind of request waits for ever."""

    version = 0

    async def generate(self, prompt: list[int], sampling: Sampling) -> Completion:
        if sampling.max_tokens > 1:
            threading.Event().wait()
        return Completion([1], [0.0], "stop", 0)

    async def close(self) -> None:
        pass


@pytest.mark.slow
def test_a_lost_vllm_is_replaced_too(make: Make, tmp_path: Path, strike: Any) -> None:
    before = left_behind()
    plain = {"rollout__engine": {"type": "vllm", "place": "worker", "max_sequences": 8, "cache_gb": 0.1}, "steps": 2}
    plain["rollout__sampling__max_tokens"] = 30
    whole, _ = run(make(out=str(tmp_path / "undisturbed"), **plain))
    struck = strike("generate", 14, signal.SIGKILL)
    folder, _ = run(make(**plain))
    assert len(struck) == 1
    assert same(trained(folder, 2), trained(whole, 2))
    assert [line["fault"] for line in failures(folder)] == ["engine"]
    assert left_behind() == before


# Trackers and disks.


def test_a_tracker_that_fails_never_costs_the_run(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose server goes away at step 2, beside a tensorboard that stays."""
    real = session.trackers

    class Vanishing:
        name = "vanishing"

        def __init__(self, inner: Any) -> None:
            self.inner, self.logged, self.finished = inner, [], False

        def log(self, values: dict[str, float], step: int) -> None:
            self.logged.append(step)
            if step == 2:
                raise ConnectionError("the server is gone")
            self.inner.log(values, step=step)

        def finish(self) -> None:
            self.finished = True

    made: list[Any] = []

    def trackers(*arguments: Any) -> list[Any]:
        found = real(*arguments)
        made.extend([Vanishing(found[0]), *found])
        return made

    monkeypatch.setattr(session, "trackers", trackers)
    folder, said = run(make(track=["tensorboard"]))
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4]
    assert made[0].logged == [1, 2]
    assert not made[0].finished
    (line,) = failures(folder)
    assert (line["step"], line["fault"], line["tracker"]) == (2, "tracker", "vanishing")
    assert said.count("track: vanishing failed (ConnectionError: the server is gone); the run goes on without it") == 1


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(disk: str, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)


def test_a_folder_that_turns_read_only_ends_the_run_whole(make: Make, disk: Path, tmp_path: Path) -> None:
    """In the reward's 20th call, in step 3; made writable again, the run goes on to its end.

    The rollouts' folder alone: no file in it is open, as the system demands of what is to be read-only.
    """
    reward = grader("turns_read_only", calls=str(tmp_path / "calls"), at=20, disk=str(disk / "run/rollouts"))
    with pytest.raises(OSError, match="Read-only file system"):
        run(make(out=str(disk / "run"), reward=reward))
    folder = disk / "run"
    assert [row["step"] for row in rows(folder)] == [1, 2]
    subprocess.run(["umount", "-l", str(folder / "rollouts")], check=True)
    assert not scraps(folder)
    assert resume(folder, [], Terminal(Console(quiet=True))) == 0
    assert [row["step"] for row in rows(folder)] == [1, 2, 3, 4]
    assert same(trained(folder, 4), trained(run(make(out=str(tmp_path / "undisturbed")))[0], 4))


def test_a_read_only_disk_is_refused_at_the_start(make: Make, disk: Path) -> None:
    remount(str(disk), "ro")
    with pytest.raises(OSError, match="Read-only file system"):
        run(make(out=str(disk / "run")))
