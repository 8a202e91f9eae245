"""A user's own function as a reward."""

from __future__ import annotations

import asyncio
import sys
import threading

import pytest

from rlft.rewards.custom import Custom
from rlft.types import InputError, RunError

MINE = """
import asyncio, threading
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
    ("name", "reason"), [("crashes", "KeyError: 'nothing'"), ("empty_next", "StopIteration"), ("short", "1 values")]
)
def test_a_crash_surfaces_with_the_name_of_the_term(play, judge, name, reason):
    term = config(name, per="group" if name == "short" else "trajectory")
    with pytest.raises(RunError, match=reason) as caught:
        judge({"type": "weighted", "terms": {"taste": term}}, play("a"), play("b"))
    assert "reward 'taste'" in str(caught.value)
    assert "task 'row-7'" in str(caught.value)


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
