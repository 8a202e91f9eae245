"""Mathematical equality, and the processes that decide it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from rlft.rewards import math as maths
from rlft.rewards.catalog import Weighted
from rlft.rewards.math import Judges, Math
from rlft.rewards.math_text import said_answer
from rlft.types import InputError

TOWER = "$9^{9^{9^9}}$"  # Python works on it in C code, where no Python signal is seen


@pytest.fixture(scope="module")
def judges():
    return Judges(seconds=5.0, workers=2)


@pytest.mark.parametrize(
    ("gold", "said", "reply"),
    [
        ("1/2", r"So it is \boxed{\frac{2}{4}}.", "equal"),
        (r"\frac{1}{2}", "The answer is 0.5", "equal"),
        ("0.5", "1/2", "equal"),
        ("1/2", r"\boxed{\frac{1}{3}}", "different"),
        ("1,234", r"\boxed{1234}", "equal"),
        (12, "7+5=12", "equal"),
        (r"\boxed{12}", "$12$", "equal"),
        ("$12$", r"$5$ and $7$ make \boxed{12}", "equal"),
        (r"3\sqrt{2}", r"\boxed{3\sqrt{2}}", "equal"),
        (r"3\sqrt{2}", r"\boxed{3}", "different"),  # a bare gold answer is read whole
        (r"3\sqrt{2}", r"$\sqrt{18}$", "equal"),
        ("x^2+1", "$1 + x^2$", "equal"),
        ("x^2+1", "$x^2-1$", "different"),
        ("[0,1)", "$[0,1)$", "equal"),
        ("[0,1)", "$[0,1]$", "different"),
        ("{1,2,3}", r"$\{3,2,1\}$", "equal"),
        ("{1,2,3}", r"$\{1,2\}$", "different"),
        ("-3", "\\boxed{3}", "different"),
        ("50%", r"$50\%$", "equal"),
        ("x=3", r"\boxed{3}", "equal"),
        ("48+24 = <<48+24=72>>72 clips.\n#### 72", "\\boxed{72}", "equal"),  # as GSM8K writes it
        ("48+24 = <<48+24=72>>72 clips.\n#### 72", "\\boxed{48}", "different"),
        ("Hence it is $\\boxed{\\frac{1}{2}}$.", "\\boxed{0.5}", "equal"),  # as MATH writes it
        ("12", "no mathematics at all", "nothing"),
        ("12", "", "nothing"),
        ("12", "\\boxed{}", "nothing"),
        ("12", "$1/0$", "different"),
        ("12", "\ud800 12", "equal"),  # a lone surrogate, as byte-level tokens may leave one
        ("12", "\\boxed{" * 500, "nothing"),
        ("", "12", "unreadable"),
        ("$ $", "12", "unreadable"),
    ],
)
def test_equality(judges, gold, said, reply):
    assert asyncio.run(judges.ask(str(gold), said)) == reply


def test_values_and_components(play, judge):
    group = [play(text, answer="1/2") for text in ("0.5", r"\boxed{\frac{1}{3}}")]
    assert judge({"type": "math"}, *group) == [1.0, 0.0]
    assert group[0].metrics == {
        "reward/math": 1.0,
        "reward/math/timeout": 0.0,
        "reward/math/unread": 0.0,
        "reward/math/boxed": 0.0,
        "reward/missing": 0.0,
    }
    assert group[1].metrics["reward/math/boxed"] == 1.0


def test_what_holds_no_answer_is_counted(play, judge):
    group = [play(text, answer="12") for text in ("I do not know.", "12")]
    assert judge({"type": "math"}, *group) == [0.0, 1.0]
    assert [one.metrics["reward/math/unread"] for one in group] == [1.0, 0.0]


def test_a_gold_answer_without_mathematics_names_task_and_column(play, judge):
    with pytest.raises(InputError, match=r"task 'row-7': column 'answer' holds .*no mathematics"):
        judge({"type": "math"}, play("12", answer=r"\boxed"))
    with pytest.raises(InputError, match="is missing"):
        judge({"type": "math"}, play("12"))


def test_a_timeout_is_no_score_is_counted_and_stops_nobody_else(play):
    """The others of the group are judged, within one event loop that stays free, and again in the next one."""
    reward = Weighted.model_validate(
        {"terms": {"right": {"type": "math", "seconds": 0.4, "workers": 1}, "short": {"type": "length", "limit": 6}}}
    ).build()
    group = tuple(play(text, answer="12") for text in ("12", TOWER, r"\boxed{12}"))
    ticks = []

    async def main():
        async def clock():
            while True:
                ticks.append(time.monotonic())
                await asyncio.sleep(0.02)

        task = asyncio.ensure_future(clock())
        verdicts = await reward(group)
        task.cancel()
        return verdicts

    for _ in range(2):
        assert asyncio.run(main()) == [1.5, None, 1.5]
    assert [one.metrics["reward/right/timeout"] for one in group] == [0.0, 1.0, 0.0]
    assert [one.metrics["reward/missing"] for one in group] == [0.0, 1.0, 0.0]
    assert "reward/right" not in group[1].metrics
    assert len(ticks) > 10


def test_it_works_off_the_main_thread(play):
    reward, got = Math(workers=1).build(), []
    thread = threading.Thread(target=lambda: got.extend(asyncio.run(reward((play("0.5", answer="1/2"),)))))
    thread.start()
    thread.join(timeout=20)
    assert got == [1.0]


def test_a_worker_that_dies_of_something_else_is_a_failure_that_names_the_reward(play, monkeypatch, tmp_path):
    dying = tmp_path / "dies.py"
    dying.write_text("import os\nprint('ready', flush=True)\ninput()\nos.abort()\n")
    monkeypatch.setattr(maths, "WORKER", dying)
    one = play("$x+1$", answer="1+x")
    assert asyncio.run(Math().build()((one,))) == [None]
    assert one.failures[0].reward == "math"
    assert f"ended with code -{signal.SIGABRT.value}" in one.failures[0].said
    dying.write_text("raise SystemExit(3)\n")
    assert asyncio.run(Math().build()((one,))) == [None]
    assert "did not start" in one.failures[0].said


def test_an_idle_worker_that_was_ended_is_replaced():
    judges = Judges(seconds=5.0, workers=1)
    assert asyncio.run(judges.ask("1+x", "$x+1$")) == "equal"
    worker = judges._idle.queue[0]
    assert worker._process is not None
    os.kill(worker._process.pid, signal.SIGKILL)
    worker._process.wait()
    assert asyncio.run(judges.ask("1+x", "$x+1$")) == "equal"


def test_ctrl_c_of_the_run_does_not_reach_a_worker_and_a_dropped_reward_ends_its_own():
    judges = Judges(seconds=5.0, workers=1)
    asyncio.run(judges.ask("1+x", "$x+1$"))
    process = judges._idle.queue[0]._process
    assert process is not None
    assert os.getpgid(process.pid) != os.getpgid(0)
    del judges
    gc.collect()
    assert process.wait(timeout=5) == -signal.SIGKILL


PROGRAM = """
import asyncio, os, signal, sys, threading, time
from rlft.rewards.math import Judges

judges = Judges(seconds=1.0, workers=2)
print(asyncio.run(judges.ask("1+x", "$x+1$")), judges._idle.queue[-1]._process.pid, flush=True)
if sys.argv[1] == "killed":
    threading.Thread(target=lambda: asyncio.run(judges.ask("1", sys.argv[2])), daemon=True).start()
    time.sleep(0.3)  # it is deep in C code by now, and does not read its pipe
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("ending", ["ordinary", "killed"])
def test_no_process_is_left_behind(ending):
    """Neither by a run that ends, nor by one that is killed while a worker is at work on something endless."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ending, TOWER], stdout=subprocess.PIPE, text=True, timeout=30, check=False
    )
    word, pid = done.stdout.split()
    assert word == "equal"
    deadline = time.monotonic() + 15
    while _runs(int(pid)):
        assert time.monotonic() < deadline, f"process {pid} is left behind"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether a process is there and is not merely waiting to be reaped by a parent that is not ours."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_nothing_heavy_is_imported_by_the_catalog():
    code = "import sys, rlft.rewards.catalog; print({'torch', 'sympy', 'math_verify', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def ask(judges: Judges, gold: str, said: str) -> str:
    return asyncio.run(judges.ask(gold, said))


@pytest.mark.parametrize(
    "said",
    [r"[10,20]\%", r"(1,2)\%", r"\{1,2\}\%", r"\mathbb{R}\%", r"12 \pm 5\%", "i>0", "[0,i]", r"\max(i,1)"],
)
def test_what_cannot_be_compared_is_different_and_nobody_elses_loss(said, play, judge):
    group = [play(text, answer="12") for text in (r"\boxed{12}", rf"\boxed{{{said}}}", r"\boxed{13}")]
    assert judge({"type": "math"}, *group) == [1.0, 0.0, 0.0]
    assert not [failure for one in group for failure in one.failures]


@pytest.mark.parametrize(
    ("gold", "said"),
    [
        ("12", r"12\text{ or 13}"), ("1", "1 or 2 or 3"), ("12", r"12\text{, 13 or 14}"), ("12", r"12\text{ is wrong}"),
        ("12", "12 not sure"), ("12", "12 million"), ("12", "12 dozen"), ("12", "12 squared"), ("12", "12 plus 3"),
        ("12", "12 times x"), ("12", "12 theta"), ("12", r"12\mathrm{xy}"), ("3", "1 2"), ("10", "A_{12}"),
        ("2\\pi", r"2\pi \text{ or 3}"),
    ],
)  # fmt: skip
def test_what_is_said_behind_a_number_counts(gold, said, judges):
    assert ask(judges, gold, rf"\boxed{{{said}}}") == "different"


@pytest.mark.parametrize("said", ["The final answer is 12 or 13.", r"\boxed{99} final answer: 12, 13, 14"])
def test_several_final_answers_are_not_the_first(said, judges):
    assert ask(judges, "12", said) == "different"


@pytest.mark.parametrize(("gold", "said"), [("1.5", "1 1/2"), ("1 1/2", "1.5"), ("1.5", r"1\frac{1}{2}")])
def test_mixed_numbers(gold, said, judges):
    assert ask(judges, gold, rf"\boxed{{{said}}}") == "equal"


def test_a_worn_process_is_replaced(monkeypatch):
    monkeypatch.setattr(maths, "WORN", 2)
    judges = Judges(5.0, 1)
    pids = []
    for n in range(4):
        assert ask(judges, f"x+{n}", f"$ {n} + x$") == "equal"
        [worker] = judges._idle.queue
        assert worker._process is not None
        pids.append(worker._process.pid)
    assert pids[0] == pids[1] != pids[2] == pids[3]


def test_degenerate_texts_are_read_at_once():
    begun = time.process_time()
    for text in (
        r"\boxed{1}" + " " * 50_000 + "x",
        r"\boxed{1} final answer" + " " * 50_000 + "x",
        "<answer>" * 50_000,
        "<answer>" + "a" * 50_000 + "</answer>",
        "final answer: " + "1, " * 20_000 + "x",
    ):
        said_answer(text)
    assert time.process_time() - begun < 5
