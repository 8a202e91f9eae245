"""A user's own function as a reward."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
import time

import pytest

from rlft.rewards.custom import Custom
from rlft.types import InputError

MINE = """
import asyncio, threading, time
threads = set()

def plain(trajectory, bonus=0.0):
    threads.add(threading.current_thread())
    return len(trajectory.completion) + bonus

async def waits(trajectory, bonus=0.0):
    threads.add(threading.current_thread())
    await asyncio.sleep(0)
    return len(trajectory.completion) + bonus

def group(group, bonus=0.0):
    longest = max(len(t.completion) for t in group)
    return [float(len(t.completion) == longest) for t in group]

async def async_group(g):
    return group(g)

def returns_awaitable(trajectory):
    return waits(trajectory)

def crashes(trajectory):
    return trajectory.task.info["nothing"]

def empty_next(trajectory):
    return next(iter([]))

def sleeps(trajectory):
    time.sleep(trajectory.task.info["wait"])
    return 1.0

async def sleeps_async(trajectory):
    await asyncio.sleep(trajectory.task.info["wait"])
    return 1.0

def sleeps_later(trajectory):
    return sleeps_async(trajectory)

def exits(trajectory):
    raise SystemExit(3)

def short(group):
    return [1.0]

number = 3
"""


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_rewards.py").write_text(MINE)
    (tmp_path / "mine_broken.py").write_text("import not_a_package\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # which building a custom reward may lengthen


def config(name, **more):
    return {"type": "custom", "path": f"mine_rewards:{name}", **more}


@pytest.mark.parametrize("name", ["plain", "waits"])
def test_a_function_of_a_trajectory_is_given_its_options(play, judge, name):
    assert judge(config(name, options={"bonus": 0.5}), play("a"), play("bcd")) == [1.5, 3.5]


@pytest.mark.parametrize("name", ["group", "async_group"])
def test_a_function_of_a_group_may_compare(play, judge, name):
    assert judge(config(name, per="group"), play("a"), play("bcd")) == [0.0, 1.0]


def test_a_plain_function_that_returns_an_awaitable_is_awaited(play, judge):
    assert judge(config("returns_awaitable"), play("abc")) == [3.0]


def test_a_plain_function_runs_off_the_event_loop_and_an_async_one_on_it(play, judge):
    import mine_rewards  # pyright: ignore[reportMissingImports]

    here = threading.current_thread()
    mine_rewards.threads.clear()
    judge(config("plain"), play("a"))
    assert here not in mine_rewards.threads
    assert mine_rewards.threads
    judge(config("waits"), play("a"))
    assert here in mine_rewards.threads


def test_a_slow_plain_function_does_not_block_the_loop(play, tmp_path):
    (tmp_path / "mine_slow.py").write_text(
        "import threading\ngate = threading.Event()\ndef score(t): return float(gate.wait(timeout=5))\n"
    )
    reward = Custom(path="mine_slow:score").build()

    async def main():
        import mine_slow  # pyright: ignore[reportMissingImports]

        verdict = asyncio.ensure_future(reward((play("x"),)))
        await asyncio.sleep(0.05)  # the loop is free while the function waits
        mine_slow.gate.set()
        return await verdict

    assert asyncio.run(main()) == [1.0]


def test_one_thread_means_one_call_at_a_time(play, judge, tmp_path):
    (tmp_path / "mine_alone.py").write_text(
        "import threading, time\nlock = threading.Lock()\n"
        "def score(t):\n    alone = lock.acquire(blocking=False)\n    time.sleep(0.02)\n"
        "    if alone: lock.release()\n    return float(alone)\n"
    )
    group = [play("x") for _ in range(4)]
    assert judge({"type": "custom", "path": "mine_alone:score", "threads": 1}, *group) == [1.0] * 4
    assert 0.0 in judge({"type": "custom", "path": "mine_alone:score", "threads": 4}, *group)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("crashes", "KeyError: 'nothing'"),
        ("empty_next", "StopIteration"),
        ("short", "1 values"),
        ("exits", r"exit\(3\)"),
    ],
)
def test_a_crash_surfaces_with_the_name_of_the_term(play, judge, name, reason):
    term = config(name, per="group" if name == "short" else "trajectory")
    group = (play("a"), play("b"))
    assert judge({"type": "weighted", "terms": {"taste": term}}, *group) == [None, None]
    for one in group:
        assert one.failures[0].reward == "taste"
        assert re.search(reason, one.failures[0].said)


def test_one_that_crashes_says_nothing_about_the_others(play, judge):
    group = (play("a"), play("b", nothing=0.5))
    assert judge(config("crashes"), *group) == [None, 0.5]
    assert [len(one.failures) for one in group] == [1, 0]


@pytest.mark.parametrize("name", ["sleeps", "sleeps_async", "sleeps_later"])
def test_a_call_that_takes_too_long_is_a_failure_and_holds_up_nobody(play, judge, name):
    """Two threads, and both hang: the quick ones after them are judged all the same."""
    group = [play("a", wait=30.0), play("a", wait=30.0), *(play("a", wait=0.0) for _ in range(4))]
    begun = time.monotonic()
    assert judge(config(name, seconds=0.3, threads=2), *group) == [None, None, 1.0, 1.0, 1.0, 1.0]
    assert time.monotonic() - begun < 5
    assert [[failure.kind for failure in one.failures] for one in group[:3]] == [["timeout"], ["timeout"], []]
    assert "longer than 0.3 s" in group[0].failures[0].said


def test_the_wait_for_a_thread_is_not_counted(play, judge):
    group = [play("a", wait=0.15) for _ in range(6)]
    assert judge(config("sleeps", seconds=0.5, threads=1), *group) == [1.0] * 6


def test_a_thread_that_hangs_does_not_keep_the_process(tmp_path):
    code = (
        "import asyncio\nfrom rlft.rewards.custom import Custom\nfrom rlft.types import Task, Trajectory\n"
        "one = Trajectory(Task('t', (), {'wait': 600.0}), (), [])\n"
        "print(asyncio.run(Custom(path='mine_rewards:sleeps', seconds=0.2).build()((one,))))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[None]\n", done.stderr


@pytest.mark.parametrize(
    ("path", "options", "reason"),
    [
        ("no_such_package.mine:f", {}, "No module named 'no_such_package'.*start rlft in the folder"),
        ("mine_broken:f", {}, "No module named 'not_a_package'"),
        ("mine_rewards:plane", {}, "no function 'plane'. Did you mean 'plain'"),
        ("mine_rewards:number", {}, "no function 'number'"),
        ("mine_rewards:plain", {"bonuss": 1}, "unexpected keyword argument 'bonuss'"),
    ],
)
def test_what_cannot_be_called_is_refused_when_the_reward_is_built(path, options, reason):
    with pytest.raises(InputError, match=reason) as caught:
        Custom(path=path, options=options).build()
    assert path in str(caught.value)
