"""Rewards for programs: the tests they pass, what they answer, how fast they are, what they are made of.

All run in `rlft.sandbox`, in threads, so that generation goes on meanwhile.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field, model_validator

from rlft.rewards.base import KEY_HELP, Config
from rlft.rewards.match import numbers_in, right_number
from rlft.rewards.pooled import Verdict as Judged
from rlft.rewards.pooled import pooled
from rlft.sandbox.cases import cases, program_in
from rlft.sandbox.programs import Limits, Outcome, Printed, SandboxError, Test, Verdict, parts, run
from rlft.types import InputError, Reward, Task, Trajectory

__all__ = ["Code", "Limits", "Outcome", "Printed", "Program", "SandboxError", "Syntax", "Test", "Verdict", "run"]

WAIT = 3600.0  # seconds; each test has a limit of its own, and this is one for all of them
TAIL = 1000  # characters of what is printed in which the last number is looked for
REASONS = ("wrong", "error", "crash", "compile", "timeout", "memory", "output")


class Sandboxed(Config):
    """What the rewards that run programs share."""

    seconds: float = Field(
        default=2.0,
        gt=0,
        allow_inf_nan=False,
        description="Processor time of one test; on the clock, 3 times that + 1.",
    )
    memory: int = Field(default=256, ge=64, description="Megabytes a program may have.")
    workers: int = Field(default=2, ge=1, description="Programs that run at the same time.")
    through: list[str] = Field(
        default_factory=list,
        description="Words put before the sandbox's command, such as those that start a container with this Python in "
        "it. Empty: it runs here, behind the walls that this system has.",
    )

    @property
    def limits(self) -> Limits:
        """What one test may take."""
        return Limits(seconds=self.seconds, memory=self.memory)

    def judging(self, verdict: Callable[[Trajectory], Judged], name: str) -> Reward:
        """A reward of one trajectory at a time, `workers` at once. Raises InputError where there is no sandbox."""
        if sys.platform != "linux":
            raise InputError(
                f"the reward `{self.type}` runs programs in a sandbox, which only Linux has; let `rlft serve-reward` "
                "judge on such a machine, with `type: remote` here"
            )
        if self.through and shutil.which(self.through[0]) is None:
            raise InputError(f"through: there is no command '{self.through[0]}' here; install it, or leave this empty")
        return pooled(verdict, name, self.workers, WAIT)


class Code(Sandboxed):
    """The part of its tests that a Python program passes: asserts on its functions, or what it prints for an input."""

    type: Literal["code"] = "code"
    key: str = Field(
        default="tests",
        description="Column with the tests: a list of Python texts such as `assert f(2) == 4`, or of {input, output}, "
        "or {inputs: [...], outputs: [...]}; or any of these as JSON.",
    )
    whole: bool = Field(default=False, description="1 if every test passes, else 0, in place of the part that does.")
    tolerance: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="For numbers in what is printed, relative above 1."
    )
    reference: str | None = Field(
        default=None, description="Column with a right program; it is run on the same tests to compare the time taken."
    )
    speed: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="Added where every test passes: this times 1 - time / the reference's, no less than -1 and no more "
        "than 1. Processor time.",
    )

    @model_validator(mode="after")
    def _has_reference(self) -> Code:
        if self.speed and not self.reference:
            raise ValueError("speed: it is told against a right program; set `reference` to the column that holds one")
        return self

    def check(self, task: Task) -> None:
        """As for every reward: the tests can be read, and there is a reference where one is named."""
        cases(task, self.key)
        if self.reference:
            self._right(task)

    def judge(self, name: str) -> Reward:
        known: dict[str, float] = {}

        def verdict(trajectory: Trajectory) -> tuple[float, dict[str, float]]:
            tests = cases(trajectory.task, self.key, self.tolerance)
            found = run(program_in(trajectory.completion), tests, self.limits, self.through)
            passed = found.passed / len(tests)
            value = float(passed == 1) if self.whole else passed
            logged = {"passed": passed, "all": float(passed == 1)} | _shares([found.reason])
            if self.reference and passed == 1:
                task = trajectory.task
                if task.id not in known:
                    known[task.id] = self._reference_seconds(task, tests)
                logged["time"] = found.seconds / known[task.id]
                value += self.speed * max(-1.0, 1 - logged["time"])
            return value, logged

        return self.judging(verdict, name)

    def _reference_seconds(self, task: Task, tests: Sequence[Test]) -> float:
        """What the right program takes. Raises InputError where it fails its own tests."""
        found = run(self._right(task), tests, self.limits, self.through)
        if found.failed:
            raise InputError(
                f"task '{task.id}': the program in column '{self.reference}' fails {found.failed} of the row's "
                f"{len(tests)} tests ({found.reason}). Repair that row."
            )
        return max(found.seconds, 1e-4)

    def _right(self, task: Task) -> str:
        """The right program. Raises InputError where there is none."""
        program = task.info.get(self.reference or "")
        if isinstance(program, str) and program.strip():
            return program
        raise InputError(
            f"task '{task.id}': column '{self.reference}' holds no program, and the reward compares times with it. Set "
            "the reward's `reference`, or repair that row."
        )


class Program(Sandboxed):
    """1 if the last number that the program in the completion prints is the right one, else 0: a program of thought."""

    type: Literal["program"] = "program"
    key: str = Field(default="answer", description=KEY_HELP)
    tolerance: float = Field(default=0.0, ge=0, allow_inf_nan=False, description="Largest absolute difference.")

    def judge(self, name: str) -> Reward:
        def verdict(trajectory: Trajectory) -> tuple[float, dict[str, float]]:
            gold = right_number(trajectory.task, self.key)
            found = run(program_in(trajectory.completion), [Printed("", "")], self.limits, self.through).outcomes[0]
            reason = None if found.reason == "wrong" else found.reason
            said = numbers_in(found.said[-TAIL:]) if reason is None else []
            right = bool(said) and float(abs(said[-1] - gold)) <= self.tolerance
            return float(right), {"printed": float(bool(said))} | _shares([reason or (None if right else "wrong")])

        return self.judging(verdict, name)


class Syntax(Sandboxed):
    """1 if the program is valid Python and made of what is asked for, else 0: it compiles, and a pattern is there."""

    type: Literal["syntax"] = "syntax"
    nodes: dict[str, int] = Field(
        default_factory=dict, description="How many of a syntax tree's nodes at least, such as FunctionDef: 2."
    )
    calls: list[str] = Field(default_factory=list, description="Functions it has to call, as written: math.sqrt.")
    absent: list[str] = Field(
        default_factory=list, description="Nodes, calls and imported modules that it must not have, such as eval."
    )

    @model_validator(mode="after")
    def _known(self) -> Syntax:
        import ast

        for name in self.nodes:
            if not hasattr(ast, name):
                raise ValueError(f"nodes: Python's syntax tree has no '{name}'; names are those of the module `ast`")
        return self

    def judge(self, name: str) -> Reward:
        def verdict(trajectory: Trajectory) -> tuple[float, dict[str, float]]:
            program = program_in(trajectory.completion)
            found = parts(program, self.limits, self.through) if program.strip() else None
            if found is None:
                return 0.0, {"compiles": 0.0}
            there = found["nodes"] | found["calls"] | found["imports"]
            has = all(found["nodes"].get(node, 0) >= count for node, count in self.nodes.items())
            called = all(call in found["calls"] for call in self.calls)
            clean = not any(name in there for name in self.absent)
            return float(has and called and clean), {"compiles": 1.0}

        return self.judging(verdict, name)


def _shares(reasons: Sequence[str | None]) -> dict[str, float]:
    return {reason: float(reason in reasons) for reason in REASONS}
