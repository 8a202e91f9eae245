"""What an answer and a task say of programs: the program in a completion, and the tests in a column."""

from __future__ import annotations

import json
import re
from typing import Any

from rlft.sandbox.programs import Printed, Test
from rlft.types import InputError, Task

FENCE = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)(?:^```|\Z)", re.DOTALL | re.IGNORECASE | re.MULTILINE)


def program_in(completion: str) -> str:
    """The last block in code fences, marked as Python or not at all; the whole completion where there is none."""
    blocks = FENCE.findall(completion)
    return blocks[-1] if blocks else completion


def cases(task: Task, key: str, tolerance: float = 0.0) -> list[Test]:
    """The tests in a task's column. Raises InputError where there are none, or something else."""
    value = task.info.get(key)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
    if (
        isinstance(value, dict)
        and {"inputs", "outputs"} <= set(value)
        and len(value["inputs"]) == len(value["outputs"])
    ):
        value = [{"input": i, "output": o} for i, o in zip(value["inputs"], value["outputs"], strict=True)]
    tests = [_case(one, tolerance) for one in value] if isinstance(value, list) else []
    if not tests or None in tests:
        reason = "is missing" if key not in task.info else "holds no tests, or some that cannot be read"
        raise InputError(
            f"task '{task.id}': column '{key}' {reason}, and programs are run on them. Give a list of Python texts "
            "such as `assert f(2) == 4`, or of {input, output}, or name another column in `key`."
        )
    return [test for test in tests if test is not None]


def _case(one: Any, tolerance: float) -> Test | None:
    if isinstance(one, str) and one.strip():
        return one
    if isinstance(one, dict) and {"input", "output"} <= set(one):
        return Printed(_text(one["input"]), _text(one["output"]), tolerance)
    return None


def _text(value: Any) -> str:
    """A list is its lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)
