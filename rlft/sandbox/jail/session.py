"""A program in pieces: each is run in what the earlier ones left behind, by a process that waits for the next.

Between two pieces that process is stopped, so that no thread of it goes on. A piece that takes too long is interrupted
first, as by Ctrl-C, which leaves what was defined before; a process that does not heed that is ended, and the next
piece begins anew.
"""

from __future__ import annotations

import ast
import contextlib
import os
import select
import signal
import sys
import time
import traceback
import types
from typing import Any

from . import kernel, wire
from .examiner import keep_only
from .walls import Cell

RAISED = b"!"  # told in place of a dot
GRACE = 0.5  # seconds between the interrupt and the end
LOOK = 0.02  # seconds between two looks at the processor time
MOST = 64  # parts of the output that are read before the clock is looked at again
FOREVER = 1 << 20  # seconds of processor time over all pieces; each has its own limit


def serve(cell: Cell, limits: dict[str, Any], say: Any) -> None:
    """Run each piece that comes on standard input, and say what came of it. An empty one is the end of a program, of
    which nothing is left for the next one's pieces.
    """
    program: Program | None = None
    while (piece := wire.framed(0)) is not None:
        fresh = program is None
        if not piece:
            if program is not None:
                program.end()
                program = None
            cell.sweep()
            say({"ended": True})
            continue
        program = program or Program(cell, limits)
        found = program.run(piece)
        if found["ended"]:
            program.end()
            program = None
        say(found | {"fresh": fresh})


class Program:
    """The process that keeps the state, seen by the one that watches it."""

    def __init__(self, cell: Cell, limits: dict[str, Any]) -> None:
        self._limits = limits
        pieces, self._pieces = os.pipe()
        self._output, output = os.pipe()
        self._done, done = os.pipe()
        self._files = [self._done, self._output]
        os.set_blocking(self._output, False)
        self._pid = os.fork()
        if self._pid == 0:
            code = 1
            try:
                for standard, file in enumerate((os.open(os.devnull, os.O_RDONLY), output, output)):
                    os.dup2(file, standard)
                keep_only([pieces, done])
                cell.close(limits | {"seconds": FOREVER})
                kernel.die_with_parent()
                _work(pieces, done)
                code = 0
            finally:
                os._exit(code)
        for file in (pieces, output, done):
            os.close(file)
        os.read(self._done, 1)  # it stands behind its walls; the first piece's time begins afterwards

    def run(self, piece: bytes) -> dict[str, Any]:
        """What it says to one piece, why it was stopped, if it was, and whether the process has ended."""
        self._said, self._reason, self._gone = bytearray(), "", False
        self._raised = False
        os.kill(self._pid, signal.SIGCONT)
        used, ends = self._used(), time.monotonic() + self._limits["wall"]
        with contextlib.suppress(BrokenPipeError):
            self._send(piece)
        while not self._heard():
            late = time.monotonic() > ends or self._used() - used > self._limits["seconds"]
            reason = "output" if len(self._said) > self._limits["output"] else "timeout" if late else ""
            if reason and not self._reason:
                self._reason, ends = reason, time.monotonic() + GRACE
                os.kill(self._pid, signal.SIGINT)
            elif self._reason and time.monotonic() > ends:
                os.kill(self._pid, signal.SIGKILL)
        if not self._gone:
            os.kill(self._pid, signal.SIGSTOP)
        self._read()
        said = bytes(self._said[: self._limits["output"]]).decode(errors="replace")
        if len(self._said) > self._limits["output"]:
            self._reason = self._reason or "output"
        return {
            "said": said,
            "reason": self._reason,
            "raised": self._raised,
            "ended": self._gone,
            "seconds": max(0.0, self._used() - used),
        }

    def end(self) -> None:
        """Whatever it does."""
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        for file in (self._pieces, self._output, self._done):
            os.close(file)

    def _send(self, piece: bytes) -> None:
        body = b"%012d" % len(piece) + piece
        while body:
            body = body[os.write(self._pieces, body) :]

    def _heard(self) -> bool:
        """Read what it says for a moment. Whether it has done with the piece, or has ended."""
        ready, _, _ = select.select(self._files, [], [], LOOK)
        if self._output in ready:
            self._read()
        if self._done not in ready:
            return False
        told = os.read(self._done, 1)
        self._gone, self._raised = not told, told == RAISED
        return True

    def _read(self) -> None:
        """All that is there now, of which no more than a piece's limit is kept."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(MOST):
                part = os.read(self._output, 1 << 16)
                if not part:  # it has closed its output
                    self._files = [self._done]
                    return
                if len(self._said) <= self._limits["output"]:
                    self._said += part

    def _used(self) -> float:
        """Its processor seconds so far: the clock that belongs to a process by its number."""
        try:
            return time.clock_gettime((~self._pid << 3) | 2)
        except OSError:
            return 0.0


def _work(pieces: int, done: int) -> None:
    """Run pieces as they come, until there are no more."""
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    os.write(done, b".")
    while True:
        piece = wire.framed(pieces)
        if piece is None:
            return
        fine = False
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            fine = _run(piece.decode(errors="replace"), module.__dict__)
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        except BaseException:  # an interrupt that came while the error was told
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.suppress(Exception):  # the program may have closed them, or put something else there
            sys.stdout.flush()
            sys.stderr.flush()
        os.write(done, b"." if fine else RAISED)


def _run(piece: str, names: dict[str, Any]) -> bool:
    """Run it in these names; whether it raised nothing. The value of a last expression is shown, as at a prompt."""
    try:
        tree = ast.parse(piece, "program.py")
        last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "program.py", "exec"), names)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "program.py", "eval"), names)
            if value is not None:
                print(repr(value))
    except SystemExit:
        pass  # the state stays
    except BaseException as error:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        trace = error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename != "program.py":
            trace = trace.tb_next
        sys.stderr.write("".join(traceback.format_exception(type(error), error, trace)))
        return False
    return True
