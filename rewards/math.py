"""Mathematical equality, by the library math-verify: 1/2 is 0.5 is \\frac{1}{2}, and {1, 2} is {2, 1}.

What it is asked about is the answer that `math_text` finds, by the rules of `math_rules`, which settle plain numbers.
Deciding it can take for ever (9^{9^{9^9}} is a short completion), inside C code that no Python signal interrupts, and
math-verify's own time limit works on a main thread only. So the judging is done by a few processes of our own
(`math_worker`), which the kernel ends when one question has taken more than its share of processor time.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rlft.rewards.base import KEY_HELP, Config, answer
from rlft.rewards.math_rules import Pairs, Rules
from rlft.rewards.math_text import Answer
from rlft.rewards.patience import patient
from rlft.types import Group, InputError, Reward, Trajectory

REMEMBERED = 4096  # verdicts
WORN = 2000  # questions to one process; its parser remembers some 70 kB of each and lets go of nothing
WORKER = Path(__file__).with_name("math_worker.py")
START = 60.0  # seconds on the clock that a process may take to begin, or to answer beside ten times its processor time


class Math(Config):
    """1 if the completion's final answer (boxed, or else the last formula) equals the right one, else 0.

    No score where comparing takes too long. Logged as reward/<name>/...: timeout, the share of those; unread, of
    completions in which no answer was found; boxed, of those whose answer stood in a box.
    """

    type: Literal["math"] = "math"
    key: str = Field(default="answer", description=KEY_HELP + " Plain numbers or LaTeX, with or without $ signs.")
    boxed: Literal["prefer", "only", "ignore"] = Field(
        default="prefer",
        description="`prefer`: the last box, and without one whatever the text ends on. `only`: no box is 0. `ignore`: "
        "the last formula, box or not.",
    )
    extract: list[Literal["latex", "expression"]] = Field(
        default=["latex", "expression"],
        min_length=1,
        description="What counts as mathematics: `latex` in boxes and between signs, `expression` in plain text.",
    )
    strict: bool = Field(
        default=True,
        description="Names of variables matter. false: x+1 is y+1.",
    )
    rounding: int = Field(
        default=6, ge=0, le=15, description="Decimals that a number with a decimal point is compared to."
    )
    units: Literal["agree", "ignore", "require"] = Field(
        default="agree",
        description="`agree`: of two known units of one kind the sizes are compared, of two kinds the answer is wrong, "
        "and one that is left out does not matter. `require`: it does. `ignore`: 5 cm is 5 m.",
    )
    percent: Literal["either", "value"] = Field(
        default="either", description="25% is 0.25; with `either` it is 25 as well, where only one side has the sign."
    )
    relations: bool = Field(
        default=False,
        description="-2<=x<=7 may stand for the right answer [-2,7]. The other way round it always may.",
    )
    seconds: float = Field(
        default=5.0,
        gt=0,
        allow_inf_nan=False,
        description="Processor time for one completion. Not wall-clock time: a busy machine changes no verdict.",
    )
    workers: int = Field(default=2, ge=1, description="Processes that judge at the same time, about 60 MB each.")

    def judge(self, name: str) -> Reward:
        if importlib.util.find_spec("math_verify") is None:
            raise InputError("the reward `math` needs the package math-verify: pip install math-verify[antlr4_9_3]")
        rules = self._rules()
        judges = Judges(self.seconds, self.workers, rules)

        async def judge(group: Group) -> list[float | None]:
            task = group[0].task
            gold = answer(task, self.key)
            said = [rules.said(trajectory.completion) for trajectory in group]
            replies = await asyncio.gather(*(judges.compare(gold, one) for one in said), return_exceptions=True)
            if "unreadable" in replies:
                raise InputError(
                    f"task '{task.id}': column '{self.key}' holds {gold!r}, in which math-verify finds no mathematics. "
                    "Repair that row, or set the reward's `key` to the column that holds the final answer."
                )
            for trajectory, one, reply in zip(group, said, replies, strict=True):
                trajectory.metrics |= {
                    f"reward/{name}/timeout": float(reply == "timeout"),
                    f"reward/{name}/unread": float(reply == "nothing"),
                    f"reward/{name}/boxed": float(one.place == "box"),
                }
            return [_value(reply) for reply in replies]

        return judge

    def said(self, trajectory: Trajectory) -> Answer | None:
        found = self._rules().said(trajectory.completion)
        boxed = self.boxed != "only" or found.place == "box"
        return found if boxed and found.latex.strip() else None

    def same(self) -> Callable[[Answer, Answer], Awaitable[bool | None]]:
        """By the same rules, and processes of its own. None where it takes too long or a process dies."""
        judges = Judges(self.seconds, self.workers, self._rules())

        async def same(one: Answer, other: Answer) -> bool | None:
            try:
                reply = await judges.between(one, other)
            except (RuntimeError, TimeoutError):
                return None
            return None if reply == "timeout" else reply == "equal"

        return same

    def _rules(self) -> Rules:
        return Rules(
            *(tuple(self.extract), self.boxed, self.strict, self.rounding, self.units, self.percent, self.relations)
        )


def _value(reply: str | BaseException) -> Any:
    """A verdict for a reply; an exception stands for itself, and says nothing about the others of the group."""
    return reply if isinstance(reply, BaseException) else None if reply == "timeout" else float(reply == "equal")


class Judges:
    """A few worker processes, started when first needed and ended with this object or with Python.

    seconds: processor time for one question. workers: how many processes at most. rules: what is read and compared.
    """

    def __init__(self, seconds: float, workers: int, rules: Rules | None = None) -> None:
        self._rules = rules or Rules()
        self._known: dict[tuple[tuple[str, str], ...], str] = {}  # a group says the same thing again and again
        made = [_Worker(seconds) for _ in range(workers)]
        # As many threads as workers, so that a thread always finds one; last in, first out, so that few are started.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="rlft-math")
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in made:
            self._idle.put(worker)
        weakref.finalize(self, _stop_all, made)

    async def ask(self, gold: str, completion: str) -> str:
        """`equal`, `different`, `nothing` where the completion holds no mathematics, `unreadable` where the gold answer
        holds none, or `timeout`. What needs no algebra is said at once, without a worker.

        Raises RuntimeError where a worker cannot start or dies of something else than its time limit; TimeoutError
        where it stands still, neither answering nor spending its processor time.
        """
        return await self.compare(gold, self._rules.said(completion))

    async def compare(self, gold: str, said: Answer) -> str:
        """The same, where the answer has been found already."""
        return await self.between(self._rules.right(gold), said)

    async def between(self, right: Answer, said: Answer) -> str:
        """The same, where both have been found."""
        found = self._rules.decide(right, said)
        if isinstance(found, str):
            return found
        key = tuple(found)
        if key not in self._known:
            reply = await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, found)
            if reply == "timeout":
                return reply
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[key] = reply
        return self._known[key]

    def _ask(self, pairs: Pairs) -> str:
        worker = self._idle.get()
        try:
            return worker.ask({"pairs": pairs, "options": self._rules.options()})
        finally:
            self._idle.put(worker)


class _Worker:
    """One process and the two pipes to it. Used by one thread at a time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._asked = 0

    def ask(self, request: dict[str, Any]) -> str:
        process = self._process
        if process is None or process.poll() is not None or self._asked >= WORN:
            self.stop()
            process, self._asked = _start(self._seconds), 0
            self._process = process
        self._asked += 1
        reply = _exchange(process, json.dumps(request), START + 10 * self._seconds)
        if reply:
            return reply
        code = process.wait()  # its end of the pipes is closed, so it has ended
        self.stop()
        if code == -signal.SIGPROF:
            return "timeout"
        raise RuntimeError(f"the process that judges mathematics ended with code {code} over {str(request)[-200:]}")

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            _close(process)


def _start(seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        # -P: this folder holds a math.py, which must not come before the standard library's.
        [sys.executable, "-P", str(WORKER), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # parsers write a line there for every formula they cannot read
        encoding="utf-8",
        env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy's order of terms follows the hashes
        process_group=0,  # Ctrl-C is for the run, which may want to finish its step
    )
    greeting = _exchange(process, None, START)
    if greeting != "ready":
        process.kill()
        _close(process)
        raise RuntimeError(f"the process that judges mathematics did not start: {greeting or 'it ended at once'}")
    return process


def _exchange(process: subprocess.Popen[str], request: str | None, wall: float) -> str:
    """Writes a line, if there is one to write, and reads one; an empty string where the process has ended.

    Raises TimeoutError where that takes more than `wall` seconds on the clock; the process has been ended then.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    with patient(process, wall, "the process that judges mathematics"):
        try:
            if request is not None:
                process.stdin.write(request + "\n")
                process.stdin.flush()
            return process.stdout.readline().rstrip("\n")
        except BrokenPipeError:
            return ""


def _close(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(BrokenPipeError), process:  # leaving the block closes the pipes and waits
        pass


def _stop_all(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.stop()
