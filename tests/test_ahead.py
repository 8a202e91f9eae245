"""Drawing ahead: a constant lag, learning and sampling side by side, and a resume that goes on bit for bit."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from rlft.ahead import Ahead
from rlft.chat import Chat
from rlft.config import Config
from rlft.engine.local import LocalEngine
from rlft.envs.single_turn import SingleTurn
from rlft.player import Player
from rlft.session import begin, resume
from rlft.settings import load
from rlft.source import Refilled, Rollouts, Still
from rlft.terminal import Terminal
from rlft.trainer import Run, beside, train
from rlft.types import Group, InputError, Sample, Sampling, Task, Trajectory

STEPS = 5
REWARD = '''
def odd(trajectory):
    """Whether the first sampled token's id is odd: half of all groups of two agree."""
    sample = trajectory.samples[0]
    return float(sample.tokens[sample.mask.index(True)] % 2)
'''


class Counting(Still):
    """Gives one group a step, drawn from version `served`, once it is `open`. A step in `broken` fails once."""

    online = True

    def __init__(self, broken: Sequence[int] = ()) -> None:
        self.metrics: dict[str, float] = {}
        self.selected: list[Group] | None = None
        self.position, self.served, self.under_way = 0, 0, 0
        self.open = asyncio.Event()
        self.open.set()
        self._broken = set(broken)

    async def next(self) -> list[Group]:
        version, number = self.served, self.position + 1
        self.under_way += 1
        try:
            if self.position:
                await self.open.wait()
        finally:
            self.under_way -= 1
        assert version == self.served, "the weights changed while it was drawn"
        if number in self._broken:
            self._broken.remove(number)
            raise ValueError(f"step {number} cannot be drawn")
        self.position, self.metrics = number, {"tokens/generated": float(number)}
        sample = Sample([1, 2], [False, True], [0.0, -1.0], [0.0, 0.0], version)
        return [tuple(Trajectory(Task(f"{number}-{i}", ()), (), [sample], score=float(i)) for i in range(2))]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


TASK = Task("t", ({"role": "user", "content": "Say it."},))


async def zero(group: Group) -> list[float | None]:
    return [0.0] * len(group)


@pytest.fixture(scope="module")
def player(tiny_model: Path) -> Player:
    engine = LocalEngine(tiny_model, torch.float32, torch.device("cpu"))
    return Player(engine, Chat(tiny_model), SingleTurn, Sampling(1.0, 3), 100)


async def steps(source: Ahead, inner: Counting, count: int, first: int = 1) -> list[tuple[str, int, float]]:
    """What each step trains on: its task, the version it is of, and a metric that came with it."""
    seen = []
    for step in range(first, first + count):
        (group,) = await source.next()
        seen.append((group[0].task.id, group[0].samples[0].version, source.metrics["tokens/generated"]))
        await source.settled()
        inner.served = step
    return seen


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_lag_is_the_depth_from_the_first_step_that_can_have_it(depth: int) -> None:
    inner = Counting()
    seen = asyncio.run(steps(Ahead(inner, depth), inner, 8))
    assert seen == [(f"{step}-0", max(step - 1 - depth, 0), float(step)) for step in range(1, 9)]
    assert inner.position == 8 + depth


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("done", [0, 1, 4])
def test_trap_37_a_resumed_source_goes_on_with_what_waits(depth: int, done: int) -> None:
    whole, first, second = Counting(), Counting(), Counting()
    expected = asyncio.run(steps(Ahead(whole, depth), whole, 7))
    ahead = Ahead(first, depth)
    asyncio.run(steps(ahead, first, done))
    resumed = Ahead(second, depth)
    resumed.load_state_dict(json.loads(json.dumps(ahead.state_dict())))
    second.served = done
    assert asyncio.run(steps(resumed, second, 7 - done, done + 1)) == expected[done:]


def test_the_state_of_a_source_alone_will_do() -> None:
    inner = Counting()
    source = Ahead(inner, 2)
    source.load_state_dict({"position": 4})
    assert [task for task, _, _ in asyncio.run(steps(source, inner, 2))] == ["5-0", "6-0"]


def test_a_drawing_that_fails_costs_no_step_but_its_own() -> None:
    async def run() -> None:
        inner = Counting(broken=[3])
        source = Ahead(inner, 1)
        assert [task for task, _, _ in await steps(source, inner, 2)] == ["1-0", "2-0"]
        with pytest.raises(ValueError, match="step 3 cannot be drawn"):
            await source.next()
        assert [task for task, _, _ in await steps(source, inner, 1)] == ["3-0"], "it is drawn again"

    asyncio.run(run())


def test_what_is_selected_stays_the_same_trajectories_after_a_resume() -> None:
    """By identity: their advantages are written beside the groups they come from."""

    async def taken() -> tuple[list[Group], list[Group] | None]:
        def second(groups: Sequence[Group]) -> list[Group]:
            return [group[1:] for group in groups]

        def made() -> Ahead:
            return Ahead(Refilled(Counting(), second, n=1, rounds=1), 1)

        source, again = made(), made()
        await source.next()
        await source.settled()
        again.load_state_dict(json.loads(json.dumps(source.state_dict())))
        return await again.next(), again.selected

    groups, selected = asyncio.run(taken())
    assert selected is not None
    assert selected[0] == groups[0][1:]
    assert selected[0][0] is groups[0][1]


def test_closing_ends_what_is_drawn() -> None:
    async def run() -> int:
        inner = Counting()
        source = Ahead(inner, 1)
        await source.next()
        inner.open.clear()
        await asyncio.sleep(0)
        assert inner.under_way == 1, "otherwise this proves little"
        await source.close()
        return inner.under_way

    assert asyncio.run(run()) == 0


def test_it_learns_while_it_draws_and_syncs_only_between() -> None:
    """The drawing of the next step waits for the learner, which would wait for ever if they took turns."""

    class Waiting:
        """Learns nothing; opens the source in the middle of it."""

        remembered: dict[str, float] = {}

        def update(self, batch: Any, algorithm: Any) -> dict[str, float]:
            asyncio.run_coroutine_threadsafe(self.let_go(), loop).result(timeout=30)
            return {}

        async def let_go(self) -> None:
            while inner.under_way == 0:
                await asyncio.sleep(0)
            inner.open.set()

    class Hooks:
        seen: list[tuple[str, int]] = []

        async def before(self, start: int) -> None: ...

        async def after(self, step: int, groups: list[Group], chosen: list[Group], metrics: dict[str, float]) -> None:
            assert inner.under_way == 0
            self.seen.append((groups[0][0].task.id, groups[0][0].samples[0].version))
            assert {"time/settle", "time/learn"} <= metrics.keys()
            inner.open.clear()

        async def finish(self, step: int, stopped: bool) -> None: ...

    async def sync(version: int) -> dict[str, float]:
        assert inner.under_way == 0, "nothing is sampled while the weights change"
        inner.served = version
        return {}

    async def run() -> None:
        nonlocal loop
        loop = asyncio.get_running_loop()
        source, learner = Ahead(inner, 1), Waiting()
        inner.open.clear()
        fixed: Any = type("Fixed", (), {"at": lambda self, numbers: self, "select": lambda self, groups: groups})()
        await train(Run(3, source, fixed, learner, sync, Hooks()))  # pyright: ignore[reportArgumentType]
        await source.close()

    loop: asyncio.AbstractEventLoop
    inner = Counting()
    asyncio.run(run())
    assert Hooks.seen == [("1-0", 0), ("2-0", 0), ("3-0", 1)]


def test_without_a_depth_what_waits_goes_first_and_nothing_is_drawn_beforehand() -> None:
    async def run() -> None:
        inner, later = Counting(), Counting()
        source, after = Ahead(inner, 2), Ahead(later, 0)
        await steps(source, inner, 3)
        after.load_state_dict(json.loads(json.dumps(source.state_dict())))
        later.served = 3
        assert not after.overlaps
        assert await steps(after, later, 4, 4) == [("4-0", 1, 4.0), ("5-0", 2, 5.0), ("6-0", 5, 6.0), ("7-0", 6, 7.0)]

    asyncio.run(run())


def test_what_waits_is_not_lost_to_a_source_that_draws_in_turn(player: Player) -> None:
    plain = Rollouts([TASK], player, zero, 1, 1, seed=0)
    plain.load_state_dict({"position": 3, "ahead": []})
    with pytest.raises(InputError, match=r"rollout\.ahead: .* of 2 steps .*rollout\.engine\.place=worker"):
        plain.load_state_dict({"position": 3, "ahead": [{}, {}]})


def test_it_says_for_which_step_it_draws() -> None:
    async def run() -> list[int]:
        seen: list[int] = []

        class Telling(Counting):
            async def next(self) -> list[Group]:
                seen.append(source.later)
                return await super().next()

        inner = Telling()
        source = Ahead(inner, 2)
        await steps(source, inner, 3)
        return seen

    assert asyncio.run(run()) == [0, 1, 2, 2, 2]


def test_a_drawing_that_fails_beside_a_step_puts_the_dice_back() -> None:
    async def run() -> list[float]:
        class Dicing(Counting):
            drawn: list[float] = []

            async def next(self) -> list[Group]:
                self.drawn.append(random.random())
                return await super().next()

        random.seed(7)
        inner = Dicing(broken=[2])
        source = Ahead(inner, 1)
        await source.next()
        await source.settled()
        with pytest.raises(ValueError, match="step 2"):
            await source.next()
        await source.next()
        await source.close()
        return inner.drawn[:3]

    first, second, again = asyncio.run(run())
    assert (second, first) == (again, random.Random(7).random())


def test_what_is_computed_beside_the_loop_raises_there_what_it_raised() -> None:
    async def run() -> int:
        def broken() -> int:
            raise ValueError("no")

        with pytest.raises(ValueError, match="no"):
            await beside(broken)
        return await beside(threading.get_ident)

    assert asyncio.run(run()) != threading.get_ident()


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rlft_ahead_reward.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"ask": f"Say {i}"}) + "\n" for i in range(7)))
    settings = {
        "name": "ahead",
        "steps": STEPS,
        "model": {"path": str(tiny_model), "device": "cpu"},
        "adapter": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "data": {"train": str(tmp_path / "train.jsonl"), "columns": {"prompt": "ask"}},
        "reward": {"type": "custom", "path": "rlft_ahead_reward:odd"},
        "rollout": {
            "engine": {"type": "local", "place": "worker"},
            "ahead": 1,
            "tasks_per_step": 3,
            "group_size": 2,
            "sampling": {"max_tokens": 3},
        },
        "algorithm": {"type": "dapo", "mask_truncated": False},
        "learner": {"lr": 1e-3},
        "checkpoint": {"every": 1, "keep": STEPS},
        "show": {"every": 0},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "run.yaml"


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_run_ahead_lags_by_a_step_and_a_resumed_one_is_the_whole_one(config: Path, tmp_path: Path) -> None:
    def run(name: str, *overrides: str) -> Path:
        out = tmp_path / name
        assert begin(load(config, [f"out={out}", *overrides]), Terminal(Console(quiet=True))) == 0
        return out

    whole = run("whole")
    metrics = rows(whole)
    assert yaml.safe_load((whole / "config.yaml").read_text())["algorithm"]["correction"] == "truncate"
    for step in range(1, STEPS + 1):
        table = pq.read_table(whole / f"rollouts/step-{step:06d}.parquet").to_pylist()
        fresh = max(row["version"] for row in table)
        assert fresh == max(step - 2, 0)
        assert any(row["advantage"] is not None for row in table)
    assert [row["rollout/lag"] >= (row["step"] > 1) for row in metrics] == [True] * STEPS
    part = run("part", "steps=2")
    assert resume(part, [f"steps={STEPS}"], Terminal(Console(quiet=True))) == 0
    for name in ("loss/total", "loss/grad_norm", "rollout/lag", "rollout/kept", "reward/mean", "tokens/trained"):
        assert [row[name] for row in rows(part)] == [row[name] for row in metrics], name
    ends = [load_file(folder / f"checkpoints/step-{STEPS:06d}/trained.safetensors") for folder in (whole, part)]
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


INTERRUPTED = """
import os, signal, sys, threading, time
import rlft.learner as learner
from rlft.cli import main

def slow(self, *given):
    def press():
        for _ in range(2):
            time.sleep(1)
            os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=press, daemon=True).start()
    end = time.time() + 40
    while time.time() < end:
        learner.torch.ones(64, 64) @ learner.torch.ones(64, 64)

learner.Learner.update = slow
main()
"""


@pytest.mark.slow
def test_a_second_interrupt_waits_for_nothing_and_ends_in_order(config: Path, tmp_path: Path) -> None:
    begun = time.monotonic()
    command = [sys.executable, "-c", INTERRUPTED, "train", str(config), f"out={tmp_path / 'run'}"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 130, done.stderr[-2000:]
    assert "stopped at once" in done.stderr
    assert time.monotonic() - begun < 38, "the update alone takes 40 s"


# --- its config -------------------------------------------------------------------------------------------------------


def made(config: Path, *overrides: str) -> Config:
    return load(config, list(overrides))


def test_samples_of_older_weights_are_corrected_for_unless_told_otherwise(config: Path) -> None:
    def correction(*overrides: str) -> str:
        knobs: Any = made(config, *overrides).algorithm
        return knobs.correction

    assert correction() == "truncate"
    assert correction("rollout.ahead=0") == "none"
    assert correction("algorithm.correction=none") == "none"
    assert correction("algorithm.correction=icepop") == "icepop"
    assert correction("algorithm.old=rollout") == "none", "the ratio is new / rollout already"
    assert made(config, "algorithm={type: rloo}").algorithm.type == "rloo"


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["rollout.engine.place=here"], "rollout.ahead: .* in this process.*set rollout.engine.place=worker"),
        (["rollout.ahead=-1"], "rollout.ahead"),
        (["algorithm={type: sft}"], "rollout.ahead: the data are recorded"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(config: Path, overrides: list[str], why: str) -> None:
    with pytest.raises(InputError, match=why):
        made(config, *overrides)
