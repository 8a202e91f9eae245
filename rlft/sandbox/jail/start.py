"""The sandbox's first process: it waits for jobs, and forks a process for each before it reads a byte of it.

That one reads the job from standard input: the program, the limits and what each test gives it to read; behind it the
tests that know right answers, which only the examiner reads. It closes itself in, runs the tests, and writes lines of
JSON to standard output: `ready` with the walls that stand, and one for each outcome. A job may be a session instead:
pieces of a program come one by one, and each is answered by a line.
"""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from . import candidate, examiner, kernel, session, trial, wire
from .walls import Cell


def main() -> None:
    while True:
        job = os.fork()
        if job == 0:
            _job()
            os._exit(0)
        if os.waitpid(job, 0)[1]:
            raise SystemExit(1)  # who knows what of the job is still to be read


def _job() -> None:
    kernel.die_with_parent()
    told = wire.framed(0)
    if told is None:
        os._exit(1)
    job = json.loads(told)
    cell = Cell(job["home"])
    cell.separate()
    first = os.fork()
    if first == 0:
        _first(job, cell)
        os._exit(0)
    if os.waitpid(first, 0)[1]:
        os._exit(1)


def _first(job: dict[str, Any], cell: Cell) -> None:
    """The first process of its namespace: whoever is inside ends with it, and it with the one that made it."""
    kernel.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    results = os.dup(1)
    limits = job["limits"]
    cell.furnish(limits["disk"])
    if job.get("session"):
        _say(results, {"ready": cell.standing()})
        session.serve(cell, limits, lambda found: _say(results, found))
        return
    program = job["program"]
    wire_up = _examiner(job, cell) if "test" in job["kinds"] else None
    os.close(0)
    os.open(os.devnull, os.O_RDWR)
    os.dup2(0, 1)
    _say(results, {"ready": cell.standing()})
    for number, kind in enumerate(job["kinds"]):
        if kind == "test" and wire_up is not None:
            pipes, commands, replies = wire_up
            files = {"pipe": pipes[number], "commands": commands, "replies": replies}
            outcome = trial.examined(program, number, files, cell, limits)
        elif kind == "syntax":
            outcome = trial.alone(lambda: candidate.syntax(program), "", cell, limits)
        else:
            outcome = trial.alone(lambda: candidate.script(program), job["given"][number], cell, limits)
        cell.sweep()  # before it is told: after the last one, the folder may be gone
        _say(results, outcome)


def _examiner(job: dict[str, Any], cell: Cell) -> tuple[list[tuple[int, int]], int, int]:
    """The process that holds the tests, forked off before anything of them was read here.

    The program's ends of the pipes, one pair for each test; where to send a test's number; where its outcome comes.
    """
    ours, theirs = [], []
    for _ in job["kinds"]:
        asked, asks = os.pipe()
        told, tells = os.pipe()
        ours.append((asked, tells))
        theirs.append((told, asks))
    commands_out, commands = os.pipe()
    replies, replies_in = os.pipe()
    if os.fork() == 0:
        os.close(1)
        examiner.keep_only([commands_out, replies_in, *(end for pair in theirs for end in pair)])
        examiner.wait_for_tests(0, commands_out, replies_in, theirs, cell, job["limits"])
        os._exit(0)
    for file in (commands_out, replies_in, *(end for pair in theirs for end in pair)):
        os.close(file)
    return ours, commands, replies


def _say(results: int, message: Any) -> None:
    body = json.dumps(message).encode() + b"\n"
    while body:
        body = body[os.write(results, body) :]
