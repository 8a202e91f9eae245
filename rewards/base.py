"""What every reward shares: a closed config, and one place where verdicts are checked and recorded.

A verdict is a finite number, or None for "no score". Whatever else a reward does, raise, hang, return NaN or a list of
the wrong length, is a failure, and no score either. That is handled here once, so that a broken grader can never pass
for a zero in a group's mean; the run counts failures, and stops where there are too many.
"""

from __future__ import annotations

import math
import numbers
import re
import reprlib
import traceback
from collections.abc import Awaitable, Callable, Hashable, Sequence
from decimal import Decimal
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from rlft.types import Failure, Group, InputError, Reward, RunError, Task, Trajectory

TRACE = 2000  # characters of a traceback that are kept, from its end
FINAL_LINE = re.compile(r"(?:^|\n)[ \t]*####[ \t]*([^\s#][^\n]*?)\s*$")
KEY_HELP = "Column of the task that holds the right answer (after `data.columns` has renamed it)."


class Config(BaseModel):
    """The knobs of one reward. Unknown keys are refused. Subclasses say how to judge; `build` does the rest."""

    model_config = ConfigDict(extra="forbid")

    type: str = Field(description="Which reward this is.")
    weight: float = Field(
        default=1.0,
        allow_inf_nan=False,
        description="What the value is multiplied by in the score. What is logged is the value without it.",
    )

    def judge(self, name: str) -> Reward:
        """The bare reward, neither checked nor recorded. name: under which it may log numbers of its own."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to judge")

    def build(self, name: str | None = None) -> Reward:
        """The reward that a run uses: `weight` times the verdict.

        name: the component, logged as `reward/<name>`; the type unless given. Raises InputError where the reward
        cannot be made on this machine.
        """
        name = name or self.type
        return scored(self.judge(name), name, self.weight)

    def components(self, name: str | None = None) -> list[str]:
        """Names of the values that will be logged as `reward/<name>`, in order. `eval.accuracy` names one of them.

        name: as for `build`.
        """
        return [name or self.type]

    def called(self, name: str | None) -> list[tuple[str | None, Config]]:
        """The rewards that it holds, each with the name under which it is built. name: as for `build`."""
        return []

    def reader(self, component: str, name: str | None = None) -> Config:
        """The reward inside that reads the answer of which `component` is the verdict. name: as for `build`.

        A reward around one other has no answer of its own: it is the other's.
        """
        for own, inner in self.called(name):
            known = inner.components(own)
            if component in known or inner is getattr(self, "of", None):
                return inner.reader(component if component in known else known[0], own)
        return self

    def said(self, trajectory: Trajectory) -> Hashable | None:
        """The final answer as this reward reads it, None where there is none: what samples of a task vote for.

        The text itself, unless a reward knows better.
        """
        return trajectory.completion.strip() or None

    def same(self) -> Callable[[Any, Any], Awaitable[bool | None]]:
        """A function that says whether two of these are one answer, the first taken for the right one; None where that
        could not be found out."""
        return _equal

    @property
    def by_turn(self) -> bool:
        """It pays for every turn where that turn ends."""
        return False

    @property
    def pays(self) -> bool:
        """It puts a part of its verdict where that is earned, at tokens of the samples, past whatever is around it."""
        return self.by_turn

    @property
    def directed(self) -> bool:
        """It needs the direction that a task asks for: see `directed`."""
        return False

    @property
    def inside(self) -> list[Config]:
        """The rewards that it holds, by which it judges."""
        return [part for value in vars(self).values() for part in _configs(value)]

    def shown(self, task: Task) -> list[Config]:
        """Those of them that may be asked about the answers to this task. Raises InputError where a task names none."""
        return self.inside

    def check(self, task: Task) -> None:
        """Raises InputError where the task lacks what this reward, or one asked inside it, compares with."""
        key = getattr(self, "key", None)
        if key:
            answer(task, key)
            return
        for part in self.shown(task):
            part.check(task)

    @property
    def by_step(self) -> bool:
        """What it says depends on the step of the run: see `scheduled`."""
        return any(part.by_step for part in self.inside)

    @property
    def explored(self) -> int:
        """Tokens sampled at most beside an answer in training, to find out what it is worth: by the rewards inside."""
        return sum(part.explored for part in self.inside)

    def judged(self, size: int, turns: int, sampling: bool) -> list[tuple[Config, int, int]]:
        """The rewards in it that hold no others, each with the answers of a group that it is shown, and how many such
        groups, at most: for one group of `size` episodes with `turns` answers each.

        sampling: as in training, where a reward may let the policy go on.
        """
        parts = [part.judged(size, turns, sampling) for part in self.inside]
        return [one for part in parts for one in part] if parts else [(self, size, 1)]


async def _equal(one: Any, other: Any) -> bool:
    return one == other


def _configs(value: Any) -> list[Config]:
    """The rewards in a field's value."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
    return [part for part in inside if isinstance(part, Config)]


def scored(judge: Reward, name: str, weight: float = 1.0, record: bool = True) -> Reward:
    """A reward whose verdicts are checked, written to the trajectories' metrics, and multiplied by `weight`.

    Writes `reward/<name>` (only if record, and only where there is a value) and `reward/missing` (1 where there is
    none). Where the judge raised, or gave for a trajectory something else than a finite number or None, that is no
    score and stands in the trajectory's failures; an exception in place of a verdict is one too. InputError and
    RunError pass as they are: whoever raises them means the run.
    """

    async def reward(group: Group) -> list[float | None]:
        if not group:
            return []
        try:
            values = _counted(await judge(group), group, name)
        except (InputError, RunError):
            raise
        except Exception as error:
            values = [error] * len(group)
        verdicts = [_number(value) for value in values]
        for trajectory, value, verdict in zip(group, values, verdicts, strict=True):
            trajectory.metrics.pop(f"reward/{name}", None)  # of an earlier judgement, as are its failures
            trajectory.failures = [failure for failure in trajectory.failures if failure.reward != name]
            if record and verdict is not None:
                trajectory.metrics[f"reward/{name}"] = verdict
            if verdict is None and value is not None:
                trajectory.failures.append(_failure(name, value))
            # Terms of a sum write this too; the total writes last, and is None if any of them is.
            trajectory.metrics["reward/missing"] = float(verdict is None)
        return [None if verdict is None else weight * verdict for verdict in verdicts]

    return reward


def pay(trajectory: Trajectory, name: str, payments: Sequence[tuple[int, int, float]]) -> None:
    """Put amounts into the samples' rewards, each at a sample and token, in place of what was paid under this name."""
    for sign, some in ((-1, trajectory.paid.pop(name, ())), (1, payments)):
        for sample, token, amount in some:
            trajectory.samples[sample].rewards[token] += sign * amount
    if payments:
        trajectory.paid[name] = list(payments)


def each(verdict: Callable[[Trajectory], float | None]) -> Reward:
    """A reward from a quick function of one trajectory. It runs on the event loop, so it must not wait for anything."""

    async def judge(group: Group) -> list[float | None]:
        return [verdict(trajectory) for trajectory in group]

    return judge


def answer(task: Task, key: str) -> str:
    """The right answer as text. A number is written out without an exponent.

    Raises InputError where the task has no such column, or nothing in it that is text or a number.
    """
    value = task.info.get(key)
    if isinstance(value, float) and math.isfinite(value):
        return format(Decimal(repr(float(value))), "f")
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, numbers.Number) and not isinstance(value, bool) and value == value:
        return str(value)
    if key not in task.info:
        reason = f"is missing (there is: {', '.join(map(str, task.info)) or 'no column at all'})"
    elif value is None or isinstance(value, (str, float)):
        reason = "is empty"
    else:
        reason = f"holds a {type(value).__name__}, not text or a number"
    raise InputError(
        f"task '{task.id}': column '{key}' {reason}, and the reward compares with it. Set the reward's `key` to the "
        "column that holds the right answer, or repair that row."
    )


def final(text: str) -> str:
    """What stands behind the `####` in the last line of a worked solution, as GSM8K writes it; else the text."""
    worked = FINAL_LINE.search(text)
    return worked[1] if worked else text


class Miscounted(Exception):
    """Something else than one verdict for each trajectory."""


def _counted(values: Any, group: Group, name: str) -> Sequence[Any]:
    """The verdicts, if they are as many as the trajectories."""
    if not isinstance(values, Sequence) or isinstance(values, (str, bytes)):
        raise Miscounted(
            f"it returned {reprlib.repr(values)} ({type(values).__name__}). Return a list with one number or None for "
            f"each of the {len(group)} trajectories."
        )
    if len(values) != len(group):
        raise Miscounted(
            f"it returned {len(values)} values for the {len(group)} trajectories of the task: {reprlib.repr(values)}. "
            "Return one for each, in their order, and None where there is no score."
        )
    return values


def _number(value: Any) -> float | None:
    """The value as a finite number; None for anything else. Raises InputError and RunError that stand in its place."""
    if isinstance(value, (InputError, RunError)):
        raise value
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _failure(name: str, value: Any) -> Failure:
    """What to call a value that is no verdict."""
    if isinstance(value, Miscounted):
        return Failure(name, "count", str(value))
    if isinstance(value, Exception):
        kind = "timeout" if isinstance(value, TimeoutError) else "raised"
        trace = "".join(traceback.format_exception(value))[-TRACE:]
        return Failure(name, kind, f"{type(value).__name__}: {value}", trace)
    kind = "nan" if isinstance(value, numbers.Real) and value != value else "value"
    said = f"the value is {reprlib.repr(value)} ({type(value).__name__}), not a finite number. "
    return Failure(name, kind, said + "Return a float, or None for 'no score'.")
