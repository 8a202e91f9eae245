"""The verdict of reasoning-gym's own scorer on an answer to one of its questions (arXiv:2505.24760).

Some scorers `eval` the answer, so the text of the policy is run as Python. It is judged in a process of its own that
closes itself in first: see `reasoning_gym_worker`. What it makes of the answer is the library's affair, a policy that
writes Python may fool such a scorer into any value from 0 to 1 for its own answer, and no more than that.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import weakref
from typing import Any, Literal

from pydantic import Field

from rlft.reasoning import library, surroundings
from rlft.rewards.base import Config
from rlft.rewards.math_text import last_box, tagged
from rlft.rewards.patience import patient
from rlft.rewards.pooled import Verdict, pooled
from rlft.types import InputError, Reward, Task, Trajectory

WAIT = 600.0  # seconds for one answer; the worker's own limits end it long before
STILL = 120.0  # seconds on the clock, for the start and for an answer beside ten times its processor time
WORN = 10000  # answers of one worker, which remembers datasets


class ReasoningGym(Config):
    """What the dataset's own `score_answer` says of the completion, from 0 to 1.

    Logged: reward/<name>/timeout, 1 where it took too long and there is no value; reward/<name>/raised, 1 where the
    scorer raised on this answer and not on the right one, or ended without a value, which makes the value 0.
    """

    type: Literal["reasoning_gym"] = "reasoning_gym"
    key: str = Field(default="entry", description="Column that `data: {type: reasoning_gym}` wrote for the scorer.")
    extract: Literal["whole", "tag", "box"] = Field(
        default="whole",
        description="What of the completion is the answer: all of it, the last <answer> tag, or the last box. Where "
        "there is no such place, there is no answer.",
    )
    seconds: float = Field(
        default=2.0,
        gt=0,
        allow_inf_nan=False,
        description="Processor time of one verdict; on the clock, 3 times that + 1.",
    )

    def check(self, task: Task) -> None:
        """Raises InputError where the task is no question of reasoning-gym's."""
        try:
            kept = json.loads(task.info[self.key])
            if {"dataset", "options", "entry"} <= set(kept):
                return
        except (KeyError, TypeError, ValueError):
            pass
        raise InputError(
            f"task '{task.id}': column '{self.key}' holds no question of reasoning-gym's. Use the reward with `data: "
            "{type: reasoning_gym}`, or rows that were written from it"
        )

    def judge(self, name: str) -> Reward:
        if sys.platform != "linux":
            raise InputError(
                "the reward `reasoning_gym` may run answers as Python, and closes that in by what only Linux has; let "
                "`rlft serve-reward` judge on such a machine, with `type: remote` here"
            )
        library()
        worker = Worker(self.seconds)

        def verdict(trajectory: Trajectory) -> Verdict:
            self.check(trajectory.task)
            reply = worker.ask({"kept": trajectory.task.info[self.key], "answer": self.said(trajectory)})
            if "error" in reply:
                raise RuntimeError(f"the scorer raised, also on the right answer: {reply['error']}")
            logged = {key: float(reply.get(key, False)) for key in ("timeout", "raised")}
            return reply["value"], logged

        return pooled(verdict, name, seconds=WAIT)

    def said(self, trajectory: Trajectory) -> str | None:
        text = trajectory.completion
        found = {"whole": lambda: text, "tag": lambda: tagged(text), "box": lambda: last_box(text)[0]}[self.extract]()
        return found.strip() if found is not None else None


class Worker:
    """The process that scores; used by one thread, started when first needed."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._asked = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """What it answers. Raises RuntimeError where it ended, and TimeoutError where it stands still."""
        if self._process is None or self._process.poll() is not None or self._asked >= WORN:
            self._start()
        self._asked += 1
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with patient(process, STILL + 10 * self._seconds, "the process of reasoning-gym's scorers"):
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request | {"number": self._asked}) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        if not line:
            code = process.wait()
            raise RuntimeError(f"the process of reasoning-gym's scorers ended with code {code}")
        reply = json.loads(line)
        if reply.pop("number") != self._asked:  # no verdict may be taken for that of another answer
            _end(process)
            raise RuntimeError("the process of reasoning-gym's scorers answered another request")
        return reply

    def _start(self) -> None:
        if self._process is not None:
            _end(self._process)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rlft.rewards.reasoning_gym_worker", str(self._seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries warn there about every answer they cannot read
            encoding="utf-8",
            env=surroundings(),
            process_group=0,  # Ctrl-C is for the run, which may want to finish its step
        )
        self._asked = 0
        weakref.finalize(self, _end, self._process)


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError), process:  # leaving the block closes the pipes and waits
        pass
