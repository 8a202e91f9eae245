"""Mathematical equality, by the library math-verify: 1/2 is 0.5 is \\frac{1}{2}, and {1, 2} is {2, 1}.

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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

from pydantic import Field

from rlft.rewards.base import KEY_HELP, Config, answer
from rlft.types import Group, InputError, Reward

WORKER = Path(__file__).with_name("math_worker.py")


class Math(Config):
    """1 if the completion's final answer (boxed, or else the last formula) equals the right one, else 0.

    No score where comparing takes too long; the share of those is logged as reward/<name>/timeout.
    """

    type: Literal["math"] = "math"
    key: str = Field(default="answer", description=KEY_HELP + " Plain numbers or LaTeX, with or without $ signs.")
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
        judges = Judges(self.seconds, self.workers)

        async def judge(group: Group) -> list[float | None]:
            task = group[0].task
            gold = answer(task, self.key)
            replies = await asyncio.gather(*(judges.ask(gold, trajectory.completion) for trajectory in group))
            if "unreadable" in replies:
                raise InputError(
                    f"task '{task.id}': column '{self.key}' holds {gold!r}, in which math-verify finds no mathematics. "
                    "Repair that row, or set the reward's `key` to the column that holds the final answer."
                )
            for trajectory, reply in zip(group, replies, strict=True):
                trajectory.metrics[f"reward/{name}/timeout"] = float(reply == "timeout")
            return [None if reply == "timeout" else float(reply == "equal") for reply in replies]

        return judge


class Judges:
    """A few worker processes, started when first needed and ended with this object or with Python.

    seconds: processor time for one question. workers: how many processes at most.
    """

    def __init__(self, seconds: float, workers: int) -> None:
        made = [_Worker(seconds) for _ in range(workers)]
        # As many threads as workers, so that a thread always finds one; last in, first out, so that few are started.
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="rlft-math")
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for worker in made:
            self._idle.put(worker)
        weakref.finalize(self, _stop_all, made)

    async def ask(self, gold: str, completion: str) -> str:
        """`equal`, `different`, `timeout`, or `unreadable` where the gold answer holds no mathematics.

        Raises RuntimeError where a worker cannot start or dies of something else than its time limit.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._ask, gold, completion)

    def _ask(self, gold: str, completion: str) -> str:
        worker = self._idle.get()
        try:
            return worker.ask(gold, completion)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process and the two pipes to it. Used by one thread at a time."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None

    def ask(self, gold: str, completion: str) -> str:
        process = self._process
        if process is None or process.poll() is not None:
            self.stop()
            process = self._process = _start(self._seconds)
        reply = _exchange(process, json.dumps({"gold": gold, "completion": completion}))
        if reply:
            return reply
        code = process.wait()  # its end of the pipes is closed, so it has ended
        self.stop()
        if code == -signal.SIGPROF:
            return "timeout"
        raise RuntimeError(f"the process that judges mathematics ended with code {code} over {completion[-200:]!r}")

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
    greeting = _exchange(process, None)
    if greeting != "ready":
        process.kill()
        _close(process)
        raise RuntimeError(f"the process that judges mathematics did not start: {greeting or 'it ended at once'}")
    return process


def _exchange(process: subprocess.Popen[str], request: str | None) -> str:
    """Writes a line, if there is one to write, and reads one; an empty string where the process has ended."""
    assert process.stdin is not None
    assert process.stdout is not None
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
