"""Where environments run: plain methods in threads, episodes in processes, and what either may do to the others."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter

from rlft.asking import answered, ready
from rlft.envs.base import Action, EnvKnobs
from rlft.envs.catalog import EnvConfig
from rlft.envs.custom import CustomConfig
from rlft.envs.placed import placed
from rlft.envs.process import Died
from rlft.envs.retry import Retry
from rlft.episode import WorldFailed
from rlft.types import InputError, Message, Task, Turn

ROOT = Path(__file__).parents[2]
WORLDS = "tests.envs.worlds"
ASK: tuple[Message, ...] = ({"role": "user", "content": "hi"},)


def knobs(**plain: Any) -> EnvKnobs:
    return TypeAdapter(EnvConfig).validate_python({"type": "custom", **plain})


def world(name: str = "Plain", **more: Any) -> Callable[[Task], Any]:
    return placed(knobs(path=f"{WORLDS}:{name}", **more))


async def episode(
    make: Callable[[Task], Any], *said: str, opening: float = 60.0, call: float = 60.0, **info: Any
) -> list[Turn]:
    """What an environment answered, closed in any case as the player does. opening, call: seconds."""
    env = make(Task("t", ASK, info))
    try:
        assert await asyncio.wait_for(env.reset(), opening) == ASK
        return [await asyncio.wait_for(env.step(Action(text, "stop")), call) for text in said]
    finally:
        await env.close()


def at(turn: Turn) -> dict[str, int]:
    """Where the turn was made."""
    return turn.messages[0]["at"]


def test_a_class_with_async_methods_is_used_as_it_is() -> None:
    assert isinstance(placed(TypeAdapter(EnvConfig).validate_python({"type": "retry"}))(Task("t", ASK)), Retry)
    (turn,) = asyncio.run(episode(world("Async"), "a"))
    assert at(turn)["thread"] == at(turn)["made"] == threading.get_ident()


@pytest.mark.parametrize(("name", "made", "stepped"), [
    ("Plain", False, False), ("Mixed", False, True), ("made", False, True),
])  # fmt: skip
def test_what_is_plain_runs_in_threads(name: str, made: bool, stepped: bool) -> None:
    """A function may do anything before it returns an environment, so it is called in a thread too."""
    first, second = asyncio.run(episode(world(name), "a", "b"))
    here = threading.get_ident()
    assert (at(first)["made"] == here, at(first)["thread"] == here) == (made, stepped)
    assert first.messages[0]["content"] == "a!"
    assert (first.reward, first.done, first.said, first.metrics) == (
        0.5, False, {"role": "assistant", "content": "a"}, {"loud": 1.0},
    )  # fmt: skip
    assert at(second)["steps"] == 2, "the same object all along"


def test_tools_are_those_of_the_environment() -> None:
    async def tools(make: Callable[[Task], Any]) -> Any:
        env = make(Task("t", ASK))
        assert not env.tools
        await env.reset()
        shown = env.tools
        await env.close()
        return shown

    for place in ("here", "process"):
        assert asyncio.run(tools(world(place=place))) == ({"name": "shout"},)


def test_as_many_calls_as_there_are_threads_are_under_way_at_once() -> None:
    """8 calls of 0.2 s: together where there are 8 threads; with 2 the loop still turns."""

    async def seconds(threads: int) -> tuple[float, int]:
        make, beats = world(threads=threads, options={"sleep": 0.2}), 0

        async def beat() -> None:
            nonlocal beats
            while True:
                await asyncio.sleep(0.01)
                beats += 1

        beating, began = asyncio.create_task(beat()), time.monotonic()
        await asyncio.gather(*(episode(make, "a") for _ in range(8)))
        beating.cancel()
        return time.monotonic() - began, beats

    _, beats = asyncio.run(seconds(8))
    assert beats >= 5
    few, _ = asyncio.run(seconds(2))
    assert few >= 0.8


class Compiled(CustomConfig):
    """Each episode needs 0.1 s of work beforehand."""

    def prepare(self, task: Task) -> None:
        if task.info.get("does") == "raise":
            raise OSError("no compiler")
        if os.environ["PREPARES"] != str(os.getpid()):
            raise OSError("prepared in a child, within the limit of a call")
        PREPARED.append(f"begun {task.id}")
        time.sleep(0.1)
        PREPARED.append(f"done {task.id}")


PREPARED: list[str] = []


@pytest.mark.parametrize(("place", "name"), [("here", "Plain"), ("here", "Async"), ("process", "Plain")])
def test_the_wait_for_a_preparation_counts_towards_no_limit(
    place: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 episodes whose preparations take 1.2 s in a row, with 0.5 s for each call; and one whose preparation fails."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setenv("PREPARES", str(os.getpid()))
    PREPARED.clear()
    make = placed(Compiled(path=f"{WORLDS}:{name}", place=place, processes=2))

    async def one(task: int = 0, **info: Any) -> None:
        env = make(Task(f"t{task}", ASK, info))
        try:
            limit = await ready(env, 0.5 if place == "here" else 120.0)  # a process takes longer to start
            assert await answered(env.reset(), limit) == ASK
        finally:
            await env.close()

    async def all_of_them() -> list[BaseException | None]:
        return await asyncio.gather(*(one(i % 7) for i in range(12)), one(does="raise"), return_exceptions=True)

    *fine, failed = asyncio.run(all_of_them())
    assert [repr(one.__cause__) for one in fine if one] == []
    assert isinstance(failed, WorldFailed)
    assert str(failed.__cause__) == "no compiler"
    assert len(PREPARED) == 24, "each once"
    assert [word.split()[0] for word in PREPARED] == ["begun", "done"] * 12, "no more at once than half the cores"


def test_those_that_wait_for_another_of_their_task_take_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tasks of four episodes each, two threads: both are prepared at once, whatever the order."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setenv("PREPARES", str(os.getpid()))
    PREPARED.clear()
    make = placed(Compiled(path=f"{WORLDS}:Plain"))

    async def opened() -> None:
        await asyncio.gather(*(make(Task(name, ASK)).reset() for name in ("a", "a", "a", "a", "b", "b", "b", "b")))

    asyncio.run(opened())
    assert set(PREPARED[:2]) == {"begun a", "begun b"}
    assert len(PREPARED) == 16


def test_what_is_made_after_nobody_waits_any_more_is_closed(tmp_path: Path) -> None:
    closed = tmp_path / "closed"

    async def late() -> None:
        with pytest.raises(TimeoutError):
            await episode(world(options={"late": 0.3}), "a", opening=0.05, closed=str(closed))
        await asyncio.sleep(0.1)
        assert not closed.exists()
        for _ in range(100):
            await asyncio.sleep(0.05)
            if closed.exists():
                return

    asyncio.run(late())
    assert closed.read_text() == f"{os.getpid()}\n"


def test_a_process_plays_one_episode_after_another() -> None:
    make = world(place="process", processes=2)
    turns = [asyncio.run(episode(make, "a", "b")) for _ in range(3)]  # each on an event loop of its own
    pids = {at(turn)["pid"] for one in turns for turn in one}
    assert len(pids) == 1
    assert os.getpid() not in pids
    assert [at(turn)["steps"] for turn in turns[2]] == [1, 2], "each episode has an object of its own"
    here = asyncio.run(episode(world(), "a"))[0]
    for name in ("reward", "done", "rewrite", "role", "said", "metrics"):
        assert getattr(turns[0][0], name) == getattr(here, name)


def test_there_are_no_more_processes_than_there_may_be() -> None:
    """6 episodes of 0.3 s by 2 processes."""

    async def played() -> set[int]:
        make = world(place="process", processes=2, options={"sleep": 0.3})
        turns = await asyncio.gather(*(episode(make, "a") for _ in range(6)))
        return {at(turn)["pid"] for (turn,) in turns}

    assert len(asyncio.run(played())) == 2


@pytest.mark.parametrize(("name", "does", "kind", "message"), [
    ("Plain", "crash", Died, "ended with SIGSEGV"), ("Async", "crash", Died, "ended with SIGSEGV"),
    ("Plain", "leave", Died, "ended with exit code 3"), ("Async", "hang", TimeoutError, ""),
    ("Plain", "hang in C", TimeoutError, ""), ("Plain", "raise", Exception, "not in the parent"),
    ("Plain", "refuse", InputError, "lacks its world"),
])  # fmt: skip
def test_what_one_episode_does_costs_no_other(name: str, does: str, kind: type[Exception], message: str) -> None:
    make = world(name, place="process", processes=2)

    async def both() -> list[Any]:
        good = episode(make, "a", "b", "c")
        bad = episode(make, "a", does=does, call=1.0)
        return list(await asyncio.gather(good, bad, episode(make, "d"), return_exceptions=True))

    good, bad, after = asyncio.run(both())
    assert [turn.messages[0]["content"] for turn in (*good, *after)] == ["a!", "b!", "c!", "d!"]
    assert isinstance(bad, kind)
    assert re.search(message, str(bad))
    notes = "".join(getattr(bad, "__notes__", []))
    if does in ("crash", "raise", "refuse"):
        assert "worlds.py" in notes, "it says where"
    if does == "raise":
        assert type(bad).__name__ == "Odd"


def test_one_that_cannot_be_built_there_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make = placed(knobs(path="nowhere:Nothing", place="process"))
    for _ in range(2):
        with pytest.raises(InputError, match=r"env\.path: nowhere:Nothing cannot be had: ModuleNotFoundError"):
            asyncio.run(episode(make, "a"))


def test_what_cannot_be_pickled_costs_its_episode() -> None:
    make = world(place="process", processes=1)
    with pytest.raises((AttributeError, TypeError), match="pickle"):
        asyncio.run(episode(make, "a", odd=lambda: None))
    assert asyncio.run(episode(make, "a"))


def alive(pid: int) -> bool:
    """Whether it runs; one that ended but was not waited for does not, once all of its threads have ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z" or len(os.listdir(f"/proc/{pid}/task")) > 1
    except FileNotFoundError:
        return False


def gone(pid: int) -> bool:
    """Within a few seconds."""
    end = time.monotonic() + 10
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_what_a_killed_process_started_is_killed_too() -> None:
    make = world(place="process", processes=1)

    async def hanging() -> list[int]:
        (first,) = await episode(make, "a")
        pid = at(first)["pid"]
        bad = asyncio.create_task(episode(make, "a", does="spawn", call=1.0))
        started: list[int] = []
        while not started:
            await asyncio.sleep(0.05)
            tasks = Path(f"/proc/{pid}/task").iterdir()
            started = [int(c) for task in tasks for c in (task / "children").read_text().split()]
        with pytest.raises(TimeoutError):
            await bad
        return [pid, *started]

    family = asyncio.run(hanging())
    assert len(family) == 2
    assert all(map(gone, family))


def test_a_process_that_was_killed_while_it_was_idle_costs_nothing() -> None:
    make = world(place="process", processes=1)
    (turn,) = asyncio.run(episode(make, "a"))
    os.kill(at(turn)["pid"], signal.SIGKILL)
    assert gone(at(turn)["pid"])
    (again,) = asyncio.run(episode(make, "b"))
    assert at(again)["pid"] != at(turn)["pid"]


def test_processes_end_with_what_made_them() -> None:
    gc.collect()  # what other tests have left
    make = world(place="process", processes=3)

    async def played() -> list[int]:
        turns = await asyncio.gather(*(episode(make, "a") for _ in range(3)))
        return [at(turn)["pid"] for (turn,) in turns]

    before = len(os.listdir("/proc/self/fd"))
    pids = asyncio.run(played())
    assert len(set(pids)) == 3
    assert all(map(alive, pids))
    del make
    gc.collect()
    assert all(map(gone, pids))
    assert len(os.listdir("/proc/self/fd")) < before, "the pool's pipe is closed too, and what other tests have left"


KILLED = """
import asyncio, sys
from tests.envs.test_placed import episode, world, at
async def main():
    make = world(place="process", processes=2)
    (turn,) = await episode(make, "a")
    print(at(turn)["pid"], flush=True)
    await episode(make, "a", does="hang in C", call=500)
asyncio.run(main())
"""


def test_processes_end_with_a_run_that_is_killed() -> None:
    """Also one that is in C code which lets no thread of its process have a turn."""
    run = subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, cwd=ROOT, text=True,
                           env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert run.stdout is not None
    pid = int(run.stdout.readline())
    time.sleep(0.5)
    assert alive(pid)
    run.kill()
    run.wait()
    run.stdout.close()
    assert gone(pid)


@pytest.mark.parametrize("place", ["here", "process"])
def test_the_example_of_the_page_is_played(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/envs-placing.md").read_text()
    (tmp_path / "my_envs.py").write_text(re.findall(r"```python\n(.*?)```", page, re.S)[0])
    block, apart = (yaml.safe_load(text)["env"] for text in re.findall(r"```yaml\n(.*?)```", page, re.S)[:2])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "my_envs", raising=False)
    assert (block, apart) == (block, block | {"place": "process", "processes": 16})
    make = placed(knobs(**block | {"place": place}))
    turns = asyncio.run(episode(make, "2", " 1 ", "0", answer="2"))
    assert [(turn.reward, turn.done) for turn in turns] == [(1.0, False), (1.0, False), (1.0, True)]
    assert turns[2].metrics == {"success": 1.0}
    (wrong,) = asyncio.run(episode(make, "3", answer="2"))
    assert (wrong.reward, wrong.done, wrong.metrics) == (0.0, True, {"success": 0.0})
