"""A program, its tests, and repairs: after each answer the task's tests run, and the first that fails is shown.

Self-repair with execution feedback, as in Self-Debug (Chen et al. 2023, arXiv:2304.05128) and RLEF (Gehring et al.
2024, arXiv:2410.02089). The programs run in `rlft.sandbox`, on threads of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field, field_validator

from rlft.envs.base import Action, Env, EnvKnobs, fill, with_place
from rlft.envs.tools.base import cut
from rlft.envs.tools.python import Sandboxed
from rlft.sandbox.cases import cases, program_in
from rlft.sandbox.programs import START, Printed, Test, Verdict, run
from rlft.threads import Threads
from rlft.types import Message, Task, Turn

MESSAGE = "{report}\nRepair the program, and write the whole of it again."
CUT = 40  # tokens of the note that something is left out, and of which test failed


class Code:
    """One task. It reports `success`, `passed` (the share of the tests), `first` (the first answer passed all) and
    `repairs`, the answers after the first.
    """

    def __init__(self, task: Task, knobs: CodeConfig, threads: Threads) -> None:
        self._task, self._knobs, self._threads = task, knobs, threads
        self._tests = cases(task, knobs.key, knobs.tolerance)
        self._answers, self._first = 0, 0.0

    async def reset(self) -> tuple[Message, ...]:
        """The task's own messages."""
        return self._task.messages

    async def step(self, action: Action) -> Turn:
        """The first test that fails, until all pass, or no repairs are left."""
        found = await self._threads.run(self._judge, program_in(action.text), self._longest)
        whole = float(not found.failed)
        self._first = whole if self._answers == 0 else self._first
        metrics = {
            "success": whole,
            "passed": found.passed / len(self._tests),
            "first": self._first,
            "repairs": float(self._answers),
        }
        self._answers += 1
        if whole or self._answers == self._knobs.answers:
            return Turn(metrics=metrics)
        told = cut(report(found, self._tests, self._knobs.show == "test"), self._knobs.longest)
        content = fill(self._knobs.message, {"report": told})
        return Turn(({"role": "user", "content": content},), done=False, metrics=metrics)

    async def close(self) -> None:
        """Every program has ended with its verdict."""

    def _judge(self, program: str) -> Verdict:
        return run(program, self._tests, self._knobs.limits(), self._knobs.through)

    @property
    def _longest(self) -> float:
        return START + len(self._tests) * (self._knobs.limits().told()["wall"] + 1)


def report(found: Verdict, tests: Sequence[Test], whole: bool) -> str:
    """Which test failed first, and what it said. whole: with the test itself."""
    at, outcome = next((i, one) for i, one in enumerate(found.outcomes) if not one.passed)
    lines = [f"{found.passed} of {len(tests)} tests pass. Test {at + 1} fails: {outcome.reason}."]
    test = tests[at]
    if whole and isinstance(test, Printed):
        lines.append(f"Input:\n{test.given}\nExpected:\n{test.expected}\nPrinted:\n{outcome.said.rstrip()}")
    elif whole:
        lines.append(str(test))
    return "\n".join([*lines, outcome.error.strip()] if outcome.error.strip() else lines)


class CodeConfig(EnvKnobs, Sandboxed):
    """Run the tests of each program, show the first that fails, and ask for a repair."""

    type: Literal["code"] = "code"
    repairs: int = Field(default=2, ge=0, description="answers after the first")
    key: str = Field(default="tests", description="column with the tests, as the reward `code` reads them")
    tolerance: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="for printed numbers, relative above 1"
    )
    show: Literal["test", "reason"] = Field(
        default="test", description="the failing test itself, or only why it fails, so that no answer is given away"
    )
    longest: int = Field(default=600, ge=20, description="characters of the report")
    message: str = Field(default=MESSAGE, description="how it is shown; {report} is which test failed, and why")

    @field_validator("message")
    @classmethod
    def _shows(cls, value: str) -> str:
        return with_place(value, "report")

    @property
    def several(self) -> bool:
        return True

    @property
    def answers(self) -> int:
        return self.repairs + 1

    def room(self, asked: int, count: Callable[[str], int]) -> int:
        return self.repairs * (count(fill(self.message, {"report": "0" * self.longest})) + CUT)

    def build(self) -> Callable[[Task], Env]:
        self.limits()
        threads = Threads(self.workers)
        return lambda task: Code(task, self, threads)
