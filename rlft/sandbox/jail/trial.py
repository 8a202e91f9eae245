"""One test: the program's process is started, watched and ended, and what came out of it is told.

Whoever watches is outside the program's reach: it is the first process of the namespace, which no signal from inside
ends, it reads no more than it must, and waits no longer than it may.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import time
from collections.abc import Callable
from typing import Any

from . import candidate, wire
from .examiner import keep_only
from .walls import Cell

ERRORS = 1 << 13  # bytes of error output that are kept, from the end


class Watched:
    """A program's process. run: what it does; keep: the files it may use beside the standard three."""

    def __init__(self, run: Callable[[], int], given: str, keep: list[int], cell: Cell, limits: dict[str, Any]) -> None:
        self._limits = limits
        self._ends = time.monotonic() + limits["wall"]
        self.said, self.errors = bytearray(), bytearray()
        self.stopped: str | None = None
        output, output_in = os.pipe()
        errors, errors_in = os.pipe()
        text = _file(given)
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                for standard, file in enumerate((text, output_in, errors_in)):
                    os.dup2(file, standard)
                keep_only(keep)
                cell.close(limits)
                code = run()
            except BaseException as error:
                with contextlib.suppress(OSError):
                    os.write(2, f"\n{type(error).__name__}: {error}".encode(errors="replace")[:ERRORS])
            finally:
                os._exit(code)
        for file in (text, output_in, errors_in):
            os.close(file)
        self.open = {output: self.said, errors: self.errors}

    def watch(self, others: list[int], heard: Callable[[], bool]) -> None:
        """Read what it says until it is silent for good, or until `heard`, called when `others` speak, is true."""
        while self.open or others:
            left = self._ends - time.monotonic()
            if left <= 0 and self.stopped is None:
                self.stop("timeout")
            ready, _, _ = select.select([*self.open, *others], [], [], max(0.01, left))
            for file in ready:
                if file in self.open:
                    self._read(file)
                elif heard():
                    return

    def stop(self, reason: str | None) -> None:
        """End it now. reason: why, if it is the program's fault; the first one counts."""
        self.stopped = self.stopped or reason
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> tuple[int, float]:
        """Wait for it. Its exit code, less than zero for a signal, and the processor seconds it took."""
        while (waited := os.wait4(self.pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > self._ends:
                self.stop("timeout")
            time.sleep(0.001)
        for file in self.open:
            os.close(file)
        self.open.clear()
        return os.waitstatus_to_exitcode(waited[1]), waited[2].ru_utime + waited[2].ru_stime

    def _read(self, file: int) -> None:
        part = os.read(file, 1 << 16)
        if not part:
            os.close(file)
            del self.open[file]
            return
        kept = self.open[file]
        kept += part
        if kept is self.errors:
            del kept[:-ERRORS]
        elif len(kept) > self._limits["output"]:
            del kept[self._limits["output"] :]
            self.stop("output")


def alone(run: Callable[[], int], given: str, cell: Cell, limits: dict[str, Any]) -> dict[str, Any]:
    """What a program prints that gets this text to read."""
    watched = Watched(run, given, [], cell, limits)
    watched.watch([], lambda: False)
    return _told(watched, watched.end(), limits)


def examined(program: str, number: int, files: dict[str, Any], cell: Cell, limits: dict[str, Any]) -> dict[str, Any]:
    """Whether the test of this number passes. files: `pipe` to the test, `commands` and `replies` of the examiner."""
    read, write = files["pipe"]
    told: list[Any] = []
    watched = Watched(lambda: candidate.module(program, read, write), "", [read, write], cell, limits)
    os.close(read)
    os.close(write)

    def heard() -> bool:
        message = wire.receive(files["replies"])
        if message[0] != "done":
            told.extend(message)
        return message[0] == "done"

    with contextlib.suppress(wire.Ended):  # the examiner itself is gone: no test passes
        wire.send(files["commands"], number)
        watched.watch([files["replies"]], heard)
    passed = told[:1] == ["passed"]
    error = str(told[1]) if len(told) > 1 else "the test ended without a verdict"
    gone = error == wire.GONE
    if not gone:  # it waits for more questions, or is busy with what nobody waits for any more
        with contextlib.suppress(ProcessLookupError):
            os.kill(watched.pid, signal.SIGKILL)
    code, seconds = watched.end()
    found = _told(watched, (code if gone else 0, seconds), limits)
    passed = passed and found["reason"] is None
    reason = found["reason"] or _kind(error)
    return found | {"passed": passed, "reason": None if passed else reason, "error": "" if passed else error}


def _kind(error: str) -> str:
    for sign, reason in (("AssertionError", "wrong"), ("raised SyntaxError", "compile"), ("raised IndentationError",
                         "compile"), ("MemoryError", "memory")):  # fmt: skip
        if error.startswith(sign) or f" {sign}" in error[:80]:
            return reason
    return "error"


def _told(watched: Watched, end: tuple[int, float], limits: dict[str, Any]) -> dict[str, Any]:
    code, seconds = end
    errors = watched.errors.decode(errors="replace")
    reason = watched.stopped
    if reason is None and (seconds > limits["seconds"] or code == -signal.SIGXCPU):
        reason = "timeout"
    if reason is None and code:
        last = errors.strip().rpartition("\n")[2]
        kinds = (
            ("MemoryError", "memory"),
            ("SyntaxError", "compile"),
            ("IndentationError", "compile"),
            ("TabError", "compile"),
        )
        reason = next((kind for name, kind in kinds if last.startswith(name)), "error" if code > 0 else "crash")
    return {"said": watched.said.decode(errors="replace"), "error": errors, "reason": reason, "seconds": seconds}


def _file(text: str) -> int:
    """An open file that holds the text."""
    file = os.memfd_create("input")
    body = text.encode()
    while body:
        body = body[os.write(file, body) :]
    os.lseek(file, 0, os.SEEK_SET)
    return file
