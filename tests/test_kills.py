"""kill -9 at any moment: nothing kept is lost, nothing half written stays, and the end is the same, bit for bit.

A few kills here; RLFT_CAMPAIGN=1 makes it 90 with the local engine and 10 with vLLM, and prints a table (CONTRIBUTING).
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from rlft.checkpoint import Checkpoints
from rlft.lock import FILE
from rlft.whole import scraps
from tests.killing import PHASES, UNKNOWN, Life, Server, assert_same, family, rows
from tests.test_resume import CASES, write

LONG = bool(os.environ.get("RLFT_CAMPAIGN"))
IN_A_ROW = 3  # kills of one run before it may go on to its end
KINDS = ("dapo, groups wait", "ppo", "grpo", "online dpo", "sft, dropout")
VLLM = {"tasks_per_step": 2, "group_size": 4, "sampling": {"max_tokens": 6}}
ENGINES = {place: {"type": "vllm", "place": place, "cache_gb": 0.05} for place in ("here", "worker")}
Start = Callable[..., Life]


@dataclass
class Tally:
    """What a campaign found."""

    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    scraps: int = 0  # kills that left something half written, until the resume
    lost: list[str] = field(default_factory=list)
    half: list[str] = field(default_factory=list)
    processes: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    unequal: list[str] = field(default_factory=list)

    def show(self) -> None:
        print(f"\n{self.kills.total()} kills of {self.runs} runs; {self.scraps} left something half written")
        for phase, count in self.kills.most_common():
            print(f"  {phase:12} {count}")
        for name in ("lost", "half", "processes", "leftovers", "unequal"):
            found = getattr(self, name)
            print(f"  {name:12} {len(found)} {found or ''}")

    def check(self) -> None:
        self.show()
        assert [self.lost, self.half, self.processes, self.leftovers, self.unequal] == [[]] * 5


class Campaign:
    """Kills runs of one config until there were enough."""

    def __init__(self, server: Server, folder: Path, model: Path, start: Start, tally: Tally, seed: int) -> None:
        self._server, self._folder, self._model, self._start, self.tally = server, folder, model, start, tally
        self._chance = random.Random(seed)

    def run(self, name: str, kills: int, **changes: Any) -> None:
        """One config: the whole run, then others that are killed."""
        config = write(self._folder / name, self._model, **changes)
        whole = config.with_name("whole")
        life = self._start("train", config, f"out={whole}")
        begun = _when_begun(whole, life)
        assert life.end() == 0, self._server.log()
        lasts, number, target = time.monotonic() - begun, 0, self.tally.kills.total() + kills
        while self.tally.kills.total() < target:
            number += 1
            self._killed_run(config, whole, config.with_name(f"killed-{number}"), lasts, target)

    def _killed_run(self, config: Path, whole: Path, run: Path, lasts: float, target: int) -> None:
        self.tally.runs += 1
        for _ in range(IN_A_ROW):
            if self.tally.kills.total() == target or not self._kill(config, run, lasts):
                break
        assert self._go_on(config, run).end() == 0, self._server.log()
        self.tally.half += map(str, scraps(run))
        self.tally.leftovers += map(str, _orphans(Path(self._server.environment["TMPDIR"]), Path("/dev/shm")))
        try:
            assert_same(run, whole)
        except AssertionError as error:
            self.tally.unequal.append(f"{run}: {error}")

    def _go_on(self, config: Path, run: Path) -> Life:
        """As the messages say: what has no config did not begin."""
        if (run / "config.yaml").exists():
            return self._start("resume", run)
        return self._start("train", config, f"out={run}")

    def _kill(self, config: Path, run: Path, lasts: float) -> bool:
        """At a moment drawn evenly from the run's time, or after it in a phase, or when something is half written."""
        before = Checkpoints(run / "checkpoints", 2).latest() or 0
        life = self._go_on(config, run)
        begun = _when_begun(run, life)
        aims = [None, "checkpoints", "anywhere", self._chance.choice(PHASES)]
        aim = self._chance.choice(aims[:3] if self._server.phase() == UNKNOWN else aims)
        moment = begun + self._chance.random() * lasts * (1.0 if aim is None else 0.8)
        after = self._chance.random() * 0.003

        def now() -> bool:
            nonlocal before
            before = max(before, _newest(run))
            if time.monotonic() < moment:
                return False
            if aim is None:
                return True
            there = {self._server.phase()} | {name for path in scraps(run) for name in ("anywhere", path.parent.name)}
            if aim not in there:
                return False
            time.sleep(after)
            return True

        if not life.kill(now, 300):
            return False
        self.tally.kills[self._server.phase()] += 1
        self._look(run, life, before)
        return True

    def _look(self, run: Path, life: Life, before: int) -> None:
        """What the kill left."""
        deadline = time.monotonic() + 20  # a worker notices that its pipe is closed
        while (left := family(life.pid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.tally.processes += [f"{run}: {pid}" for pid in left]
        self.tally.scraps += bool(scraps(run))
        newest = Checkpoints(run / "checkpoints", 2).latest() or 0
        if newest < before:
            self.tally.lost.append(f"{run}: step {before}")
        for step in Checkpoints(run / "checkpoints", 2).steps():
            self._load(run / f"checkpoints/step-{step:06d}")
        if newest:
            best = json.loads((run / f"checkpoints/step-{newest:06d}/state.json").read_text())["best"]
            if best and not (run / f"checkpoints/step-{best[1]:06d}").is_dir():
                self.tally.lost.append(f"{run}: the best, step {best[1]}")
        self._read_records(run, newest)

    def _load(self, folder: Path) -> None:
        try:
            json.loads((folder / "state.json").read_text())
            files = sorted(folder.rglob("*.safetensors"))
            assert {"optimizer", "random", "trained"} <= {file.stem for file in files}
            assert all(load_file(file) is not None for file in files)
        except Exception as error:  # whatever it is, the checkpoint is not whole
            self.tally.lost.append(f"{folder}: {error}")

    def _read_records(self, run: Path, newest: int) -> None:
        """All that belongs to the steps up to the newest checkpoint is there, and no file is half."""
        for file in run.glob("*/step-*.parquet"):
            try:
                pq.read_table(file)
            except Exception as error:  # see above
                self.tally.half.append(f"{file}: {error}")
        there = [int(file.stem.removeprefix("step-")) for file in run.glob("rollouts/step-*.parquet")]
        self.tally.half += [f"{run}: no rollouts {step}" for step in range(1, newest + 1) if step not in there]
        logged = [row["step"] for row in rows(run)] if (run / "metrics.jsonl").exists() else []
        self.tally.half += [f"{run}: no metrics {step}" for step in range(1, newest + 1) if step not in logged]


def _when_begun(run: Path, life: Life) -> float:
    """When the process took the run's lock, which is after it imported everything."""
    while not (run / FILE).exists() and life.alive():
        time.sleep(0.0005)
    return time.monotonic()


def _newest(run: Path) -> int:
    folder = run / "checkpoints"
    return (
        max((int(name[5:]) for name in os.listdir(folder) if name[:5] == "step-"), default=0) if folder.is_dir() else 0
    )


def _orphans(*places: Path) -> list[Path]:
    """Temporary folders of rlft whose process is dead: their lock is free."""
    found = []
    for path in [path for place in places for path in place.glob("rlft-*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found.append(path)
        except BlockingIOError:
            pass
        finally:
            os.close(descriptor)
    return found


@pytest.mark.slow
def test_local_runs_survive(server: Server, tmp_path: Path, tiny_model: Path) -> None:
    """Forked, so that a life takes a second."""
    tally = Tally()
    campaign = Campaign(server, tmp_path, tiny_model, server.start, tally, seed=time.time_ns() if LONG else 1)
    for name in KINDS if LONG else KINDS[:2]:
        campaign.run(name, 17 if LONG else 2, **CASES[name])
    tally.check()


@pytest.mark.skipif(not LONG, reason="RLFT_CAMPAIGN=1")
def test_the_command_line_survives(server: Server, tmp_path: Path, tiny_model: Path) -> None:
    tally = Tally()
    start = lambda *arguments: server.program(*arguments, noting=False)  # noqa: E731
    Campaign(server, tmp_path, tiny_model, start, tally, time.time_ns()).run("dapo", 5, **CASES["dapo, groups wait"])
    tally.check()


@pytest.mark.skipif(not LONG, reason="RLFT_CAMPAIGN=1")
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("place", ENGINES)
def test_vllm_runs_survive(server: Server, tmp_path: Path, tiny_model: Path, place: str) -> None:
    """In process, and as a process of its own, which must not live on."""
    tally = Tally()
    start = lambda *arguments: server.program(*arguments, noting=True)  # noqa: E731
    campaign = Campaign(server, tmp_path, tiny_model, start, tally, time.time_ns())
    campaign.run(place, 5, **{**CASES["grpo"], "rollout": {"engine": ENGINES[place], **VLLM}})
    tally.check()
