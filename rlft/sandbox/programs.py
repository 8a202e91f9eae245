"""Programs that nobody trusts, run against tests: what they print, or what their functions return.

Each program gets an interpreter of its own behind as many walls as the system has: namespaces of its own (no network,
no other processes), a root of its own (the standard library, read-only, and a scratch folder in memory), no rights, a
filter of system calls, Landlock, and limits of processor time, memory, files and output. The verdict says which stood.

The right answers never enter its process. What a program prints is compared here. A test that is Python code runs in a
second process and uses the program's functions from there: see `jail`. Linux only; elsewhere limits alone would stand.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlft.sandbox import forge

AT_ONCE = 100  # tests of one job; each takes four files
START = 20.0  # seconds that a job may take beside its tests


class SandboxError(RuntimeError):
    """The sandbox itself failed, and the program was not judged."""


@dataclass(frozen=True)
class Limits:
    """What one program may take for one test.

    seconds: processor time. wall: seconds on the clock, three times that and one more unless given; a program that
    sleeps meets it. memory, disk: megabytes. output: bytes.
    """

    seconds: float = 2.0
    wall: float | None = None
    memory: int = 256
    disk: int = 16
    output: int = 1 << 20

    def told(self) -> dict[str, Any]:
        """As the sandbox reads them."""
        wall = 3 * self.seconds + 1 if self.wall is None else self.wall
        return vars(self) | {"wall": wall}


@dataclass(frozen=True)
class Printed:
    """A test of a script: what it reads, and what it has to print."""

    given: str
    expected: str
    tolerance: float = 0.0

    def equals(self, said: str) -> bool:
        """White space at the ends of lines and of the whole does not count. tolerance: for numbers, relative to 1 or
        to the expected number, whichever is larger."""
        ours, theirs = _lines(self.expected), _lines(said)
        if ours == theirs:
            return True
        if not self.tolerance or [len(line) for line in ours] != [len(line) for line in theirs]:
            return False
        return all(
            _near(a, b, self.tolerance)
            for one, other in zip(ours, theirs, strict=True)
            for a, b in zip(one, other, strict=True)
        )


Test = str | Printed


@dataclass(frozen=True)
class Outcome:
    """Of one test. reason: None where it passed, else `wrong`, `error`, `crash`, `compile`, `timeout`, `memory` or
    `output`. error: what the program or the test said, its end. seconds: processor time of the program."""

    passed: bool
    reason: str | None
    error: str
    said: str
    seconds: float


@dataclass(frozen=True)
class Verdict:
    """Of one program. reason: that of the first test that failed. walls: what stood around it."""

    passed: int
    failed: int
    reason: str | None
    outcomes: tuple[Outcome, ...] = field(repr=False, default=())
    walls: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        """Processor time over all tests."""
        return math.fsum(outcome.seconds for outcome in self.outcomes)


def run(program: str, tests: Sequence[Test], limits: Limits | None = None, through: Sequence[str] = ()) -> Verdict:
    """Run a Python program against tests, each in a fresh process.

    tests: Python code that uses what the program defines (an `assert` that fails, or any error, fails the test), or
    `Printed`. through: words put before the sandbox's command, to run it inside something else.
    Raises SandboxError where the sandbox does not work, and ValueError where there is no test.
    """
    if not tests:
        raise ValueError("there is no test, so nothing could be said about the program")
    limits = limits or Limits()
    outcomes: list[Outcome] = []
    walls: tuple[str, ...] = ()
    for first in range(0, len(tests), AT_ONCE):
        some = tests[first : first + AT_ONCE]
        kinds = ["test" if isinstance(test, str) else "script" for test in some]
        walls, found = _job(program, kinds, some, limits, through)
        outcomes += map(_outcome, some, found)
    failed = [outcome for outcome in outcomes if not outcome.passed]
    return Verdict(
        len(outcomes) - len(failed), len(failed), failed[0].reason if failed else None, tuple(outcomes), walls
    )


def parts(program: str, limits: Limits | None = None, through: Sequence[str] = ()) -> dict[str, dict[str, int]] | None:
    """How often which node, call and import stands in a Python program; None where it is not valid Python.

    Parsed in the sandbox: there are texts on which a parser takes for ever, or all memory, or falls over.
    """
    _, [found] = _job(program, ["syntax"], [""], limits or Limits(), through)
    return None if found["reason"] else json.loads(found["said"])


def _job(
    program: str, kinds: list[str], tests: Sequence[Test], limits: Limits, through: Sequence[str]
) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """The walls, and what was found for each test."""
    home = tempfile.mkdtemp(prefix="sandbox-")
    os.chmod(home, 0o777)
    told = limits.told()
    given = [test.given if isinstance(test, Printed) else "" for test in tests]
    head = json.dumps({"program": program, "kinds": kinds, "given": given, "home": home, "limits": told}).encode()
    sent = _framed(head)
    if "test" in kinds:
        sent += _framed(json.dumps([test if isinstance(test, str) else None for test in tests]).encode())
    try:
        found, why = forge.ask(through, sent, len(tests) + 1, START + len(tests) * (told["wall"] + 4))
    except OSError as error:
        raise SandboxError(f"the sandbox did not start, {error}") from error
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if not found:
        raise SandboxError(f"the sandbox did not start, {why}")
    if len(found) != len(tests) + 1:
        raise SandboxError(f"the sandbox ended early, {why}")
    lines = [json.loads(line) for line in found]
    return tuple(lines[0]["ready"]), lines[1:]


def _framed(part: bytes) -> bytes:
    return b"%012d" % len(part) + part


def _outcome(test: Test, found: dict[str, Any]) -> Outcome:
    reason = found["reason"]
    if isinstance(test, Printed) and reason is None and not test.equals(found["said"]):
        reason = "wrong"
    return Outcome(reason is None, reason, found["error"], found["said"], found["seconds"])


def _lines(text: str) -> list[list[str]]:
    return [line.split(" ") for line in "\n".join(map(str.rstrip, text.splitlines())).strip("\n").split("\n")]


def _near(ours: str, theirs: str, tolerance: float) -> bool:
    if ours == theirs:
        return True
    try:
        right, said = float(ours), float(theirs)
    except ValueError:
        return False
    return abs(right - said) <= tolerance * max(1.0, abs(right))
