"""Hundreds of episodes at once: they overlap, what one does costs no other, and nothing is left of them.

How busy the engine is kept is measured by `benchmarks/episodes.py`; here are counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft.chat import Chat
from rlft.engine.base import Engine
from rlft.engine.local import LocalEngine
from rlft.engine.vllm import VllmEngine
from rlft.engine.worker import in_worker
from rlft.envs.base import Action
from rlft.envs.custom import CustomConfig
from rlft.envs.placed import Threaded, placed
from rlft.player import Limits, Player, derive_seed
from rlft.threads import Threads
from rlft.types import WORLD, Completion, Message, Sampling, Task, Trajectory, Turn
from tests.envs.worlds import Once

TURNS = 3
MIB = 2**20


@pytest.fixture(scope="module", autouse=True)
def alone(one_thread: None) -> None:
    """The model is tiny."""


@dataclass
class Watched:
    """An engine and its requests: how many, and at most at once. during: begun while some world took its time."""

    inner: Engine
    worlds: Worlds
    version: int = 0
    open: int = 0
    most: int = 0
    count: int = 0
    during: int = 0

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        self.count += 1
        self.open += 1
        self.most = max(self.most, self.open)
        self.during += self.worlds.busy > 0
        try:
            return await self.inner.generate(prompt, sampling)
        finally:
            self.open -= 1


class Worlds:
    """What all environments of a test have done. busy: that take their time now; most: at once."""

    def __init__(self, longest: float = 1.0) -> None:
        self.longest = longest
        self.busy = self.most = 0
        self.opened: Counter[str] = Counter()
        self.closed: Counter[str] = Counter()
        self.heard: dict[str, list[str]] = {}
        self.released = threading.Event()  # lets go of threads that hang

    def delay(self, task: Task, turn: int) -> float:
        """Random, and the same in every run."""
        return self.longest * (derive_seed(task.id, turn) % 1000) / 1000


class Slow:
    """Takes up to a second for each reply. Some raise, some never reply."""

    def __init__(self, task: Task, worlds: Worlds) -> None:
        self.task, self.worlds, self.turn = task, worlds, 0
        worlds.opened[task.id] += 1

    async def reset(self) -> tuple[Message, ...]:
        return self.task.messages

    async def step(self, action: Action) -> Turn:
        self.turn += 1
        self.worlds.heard.setdefault(self.task.id, []).append(action.text)
        if self.turn == 2 and self.task.info.get("does") == "raise":
            raise ValueError("this world fell over")
        self.worlds.busy += 1
        self.worlds.most = max(self.worlds.most, self.worlds.busy)
        try:
            forever = self.turn == 2 and self.task.info.get("does") == "hang"
            await asyncio.sleep(600 if forever else self.worlds.delay(self.task, self.turn))
        finally:
            self.worlds.busy -= 1
        return Turn(({"role": "user", "content": f"{self.task.id}, again."},), 1.0, self.turn == TURNS)

    async def close(self) -> None:
        self.worlds.closed[self.task.id] += 1


class Blocking:
    """The same in a plain way: it holds its thread, some for ever."""

    def __init__(self, task: Task, worlds: Worlds) -> None:
        self.slow, self.worlds = Slow(task, worlds), worlds

    def reset(self) -> tuple[Message, ...]:
        return self.slow.task.messages

    def step(self, action: Action) -> Turn:
        if self.slow.turn == 1 and self.slow.task.info.get("does") == "hang":
            self.worlds.released.wait(600)
        return asyncio.run(self.slow.step(action))

    def close(self) -> None:
        asyncio.run(self.slow.close())


def tasks(count: int, **does: str) -> list[Task]:
    """does: what some of them do, by their numbers: t3="hang"."""
    asked = [f"t{i}" for i in range(count)]
    return [Task(t, ({"role": "user", "content": f"Say {t}."},), {"does": does.get(t)}) for t in asked]


def player(engine: Any, chat: Chat, make: Callable[[Task], Any], call: float = 60.0, tokens: int = 4) -> Player:
    return Player(engine, chat, make, Sampling(max_tokens=tokens, stop=("e",)), 400, limits=Limits(call=call))


async def played(one: Player, some: Sequence[Task]) -> list[Trajectory]:
    return await asyncio.gather(*(one.play(task, derive_seed(task.id)) for task in some))


def rewriting(make: Callable[..., Any], worlds: Worlds) -> Callable[[Task], Any]:
    """With a new history for each turn, so that an answer cut at its limit ends no episode."""

    class Rewriting(make):  # type: ignore[misc, valid-type]
        async def step(self, action: Action) -> Turn:
            return replace(await super().step(action), rewrite=True)

    return lambda task: Rewriting(task, worlds)


def fine(trajectory: Trajectory, worlds: Worlds) -> bool:
    """It was played to its end, and its world heard what its policy said, and no other's."""
    said = [turn.text for turn in trajectory.said]
    name = trajectory.task.id
    others = [m for turn in trajectory.said for m in turn.messages[:-1] if f"Say {name}." not in m["content"]]
    return (
        not trajectory.failures
        and len(said) == TURNS
        and worlds.heard[name] == said
        and all(message["content"] == f"{name}, again." for message in others if message["role"] == "user")
        and sum(sum(sample.rewards) for sample in trajectory.samples) == TURNS
        and worlds.opened[name] == worlds.closed[name] == 1
    )


def test_256_episodes_are_played_at_once(engine: LocalEngine, chat: Chat) -> None:
    """All wait at the same time where they have to, and the engine speaks to some while others wait."""
    worlds = Worlds()
    watched = Watched(engine, worlds)
    some = tasks(256)
    done = asyncio.run(played(player(watched, chat, rewriting(Slow, worlds)), some))
    assert all(fine(trajectory, worlds) for trajectory in done)
    assert watched.count == 256 * TURNS
    assert watched.most == 256, "all opened at once"
    assert worlds.most > 128, "most worlds took their time at once"
    assert watched.during >= 256, "and those that were done before did not wait for them"
    assert worlds.busy == watched.open == 0


BROKEN = {"t17": "raise", "t180": "hang"}  # 1% of 200


def only_those_failed(done: list[Trajectory], worlds: Worlds, kinds: dict[str, str]) -> None:
    failed = {t.task.id: t.failures[0] for t in done if t.failures}
    assert {name: (one.reward, one.kind) for name, one in failed.items()} == {n: (WORLD, k) for n, k in kinds.items()}
    assert all(fine(trajectory, worlds) for trajectory in done if trajectory.task.id not in kinds)
    for trajectory in done:
        if trajectory.task.id in kinds:
            assert (trajectory.cut, len(trajectory.said), trajectory.score) == ("failed", 2, None)
            assert worlds.closed[trajectory.task.id] == 1, "closed all the same"


def test_worlds_that_fail_cost_their_own_episodes(engine: LocalEngine, chat: Chat) -> None:
    worlds = Worlds(longest=0.2)
    one = player(engine, chat, rewriting(Slow, worlds), call=5.0)
    done = asyncio.run(played(one, tasks(200, **BROKEN)))
    only_those_failed(done, worlds, {"t17": "raised", "t180": "timeout"})


def test_worlds_that_fail_in_threads_cost_their_own_episodes(engine: LocalEngine, chat: Chat) -> None:
    """Four threads; the one that hangs is left behind, and its place is free again."""
    worlds, threads = Worlds(longest=0.01), Threads(4)

    class Plain(Blocking):
        def step(self, action: Action) -> Turn:
            return replace(super().step(action), rewrite=True)

    one = player(engine, chat, partial(Threaded, partial(Plain, worlds=worlds), threads), call=5.0)
    try:
        done = asyncio.run(played(one, tasks(200, **BROKEN)))
        assert worlds.most <= 4
        only_those_failed(done, worlds, {"t17": "raised", "t180": "timeout"})
    finally:
        worlds.released.set()


@pytest.mark.slow
def test_worlds_that_crash_in_processes_cost_their_own_episodes(engine: LocalEngine, chat: Chat) -> None:
    """Two segmentation faults and an endless loop in C in 300 episodes, 4 processes."""
    does = {"t40": "crash", "t133": "hang in C", "t250": "crash"}
    knobs = CustomConfig(path="tests.envs.worlds:Plain", place="process", processes=4)
    one = replace(player(engine, chat, placed(knobs)), limits=Limits(turns=2, call=12.0))
    done = asyncio.run(played(one, tasks(300, **does)))
    failed = {t.task.id: (t.failures[0].kind, t.failures[0].said) for t in done if t.failures}
    died = ("raised", "Died: the process of the environment ended with SIGSEGV")
    assert failed == {"t40": died, "t250": died, "t133": ("timeout", "TimeoutError: it took longer than 12 s")}
    assert all(t.metrics["env/loud"] == 1.0 for t in done if t.task.id not in does)


@dataclass
class Left:
    """What this process and its children hold. resident: bytes of the process, and of each child, in all."""

    threads: int
    files: int
    children: int
    resident: int

    @classmethod
    def now(cls, others: frozenset[int]) -> Left:
        """others: children of earlier tests, which grow and end as they like."""
        gc.collect()
        family = descendants(others)
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in family)
        resident = pages * os.sysconf("SC_PAGE_SIZE")
        return cls(threading.active_count(), len(os.listdir("/proc/self/fd")), len(family) - 1, resident)


def descendants(others: frozenset[int]) -> list[int]:
    """This process and all below it but others."""
    family = [os.getpid()]
    for member in family:  # which grows
        family += [pid for pid, parent in parents().items() if parent == member and pid not in others]
    return family


def parents() -> dict[int, int]:
    """The parent of every process."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    return found


async def rounds(one: Player, count: int, size: int) -> list[str]:
    """Play so many episodes, `size` at a time; the failures."""
    failed = []
    for _ in range(count // size):
        done = await played(one, tasks(size))
        assert all(len(trajectory.said) == 1 for trajectory in done)
        failed += [failure.said for trajectory in done for failure in trajectory.failures]
    return failed


@pytest.fixture(scope="module")
def others() -> frozenset[int]:
    """Processes that were there before, of which there are dozens after a long run of tests."""
    return frozenset(descendants(frozenset())[1:])


def nothing_left(one: Player, others: frozenset[int], count: int, size: int, mib: float, first: int = 2) -> None:
    """After so many first rounds, which fill caches and start threads."""

    async def both() -> tuple[Left, Left]:
        await rounds(one, first * size, size)
        before = Left.now(others)
        assert await rounds(one, count, size) == []
        return before, Left.now(others)

    before, after = asyncio.run(both())
    assert after.threads <= before.threads  # fewer where an earlier test's were still ending
    assert (after.files, after.children) == (before.files, before.children)
    assert after.resident - before.resident < mib * MIB


@pytest.mark.slow
@pytest.mark.parametrize("place", ["here", "process"])
def test_nothing_is_left_of_10000_episodes(place: str, engine: LocalEngine, chat: Chat, others: frozenset[int]) -> None:
    """Threads and processes are used again. With a kilobyte kept of each, 10 MiB would be there."""
    knobs = CustomConfig(path="tests.envs.worlds:Once", place=place, threads=16, processes=4)  # type: ignore[arg-type]
    make = placed(knobs) if place == "process" else partial(Threaded, Once, Threads(16))
    nothing_left(player(engine, chat, make, tokens=1), others, 10_000, 250, 8)


@pytest.fixture(scope="module")
def vllm(others: frozenset[int], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    log = tmp_path_factory.mktemp("log") / "engine.log"
    with pytest.MonkeyPatch.context() as patch:
        # It keeps kernels for every shape of a batch, up to 1024, and so would grow for thousands of episodes.
        patch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
        engine = in_worker(
            VllmEngine, model=tiny_model, dtype=torch.float32, context=400, max_sequences=64, cache_gb=0.01, log=log
        )
    yield engine
    asyncio.run(engine.close())


@pytest.mark.slow
def test_nothing_is_left_of_500_episodes_on_vllm(vllm: Any, chat: Chat, others: frozenset[int]) -> None:
    """Its own process counts too. The first rounds touch its cache, whose memory is taken only then; with 20 kilobytes
    kept of each episode, 10 MiB would be there.
    """
    nothing_left(player(vllm, chat, partial(Threaded, Once, Threads(16)), tokens=4), others, 500, 50, 8, first=10)
