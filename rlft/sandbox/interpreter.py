"""A Python interpreter behind the sandbox's walls that keeps its state from one piece of a program to the next.

The same walls stand around it as around a program under test, and the same limits hold for every piece. Only the
standard library is there.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import tempfile
import threading
import weakref
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlft.sandbox import forge
from rlft.sandbox.programs import START, Limits, SandboxError

ENDING = 5.0  # seconds that it gets to end by itself


@dataclass(frozen=True)
class Said:
    """What one piece printed, errors and the value of a last expression with it.

    raised: it ended with an error. reason: why it was stopped, `timeout`, or cut, `output`; else empty. lost: the
    interpreter has ended, and the next piece begins anew. fresh: it is the first of its state. seconds: of processor
    time.
    """

    text: str
    raised: bool
    reason: str
    lost: bool
    fresh: bool
    seconds: float


class Session:
    """A process in the sandbox that runs pieces, of one program after another. Raises SandboxError."""

    def __init__(self, limits: dict[str, Any], through: Sequence[str]) -> None:
        home = tempfile.mkdtemp(prefix="sandbox-")
        self._gone = weakref.finalize(self, shutil.rmtree, home, ignore_errors=True)
        os.chmod(home, 0o777)
        head = json.dumps({"session": True, "home": home, "limits": limits}).encode()
        try:
            self.forge, ready = forge.opened(through, _framed(head), START)
        except OSError as error:
            self._gone()
            raise SandboxError(f"the sandbox did not start, {error}") from error
        self.walls = tuple(json.loads(ready)["ready"])

    def ask(self, piece: bytes, seconds: float) -> dict[str, Any] | None:
        """What came of a piece; None where the process has ended."""
        lines = self.forge.ask(_framed(piece), 1, seconds)
        return json.loads(lines[0]) if lines else None

    def cleared(self) -> bool:
        """Nothing is left of a program, and the next one may begin; False where the process has ended."""
        return self.forge.whole and self.ask(b"", ENDING) is not None

    def end(self) -> None:
        """Whatever it does."""
        self.forge.end()
        self._gone()


_idle: defaultdict[str, queue.LifoQueue[Session]] = defaultdict(queue.LifoQueue)


class Interpreter:
    """One state. It starts with the first piece, runs one at a time, and is to be closed. For any thread.

    limits: of one piece; the disk's holds for all of them. through: words before the sandbox's command.
    """

    def __init__(self, limits: Limits | None = None, through: Sequence[str] = ()) -> None:
        self._limits = (limits or Limits(output=1 << 16)).told()
        self._through = tuple(through)
        self._session: Session | None = None
        self._turn = threading.Lock()
        self._closed = False

    @property
    def walls(self) -> tuple[str, ...]:
        """What stands around it; nothing before the first piece."""
        return self._session.walls if self._session else ()

    def run(self, piece: str) -> Said:
        """Raises SandboxError where the sandbox does not work, and where it was closed meanwhile."""
        with self._turn:
            if self._closed:
                raise SandboxError("the interpreter was closed")
            self._session = session = self._session or self._opened()
            try:
                found = session.ask(piece.encode(errors="replace") or b"\n", self._limits["wall"] + START)
            except BaseException:
                self._end()
                raise
            if found is None:
                self._end()
                raise SandboxError(f"the interpreter {'was closed' if self._closed else 'has lost its sandbox'}")
            return Said(*(found[name] for name in ("said", "raised", "reason", "ended", "fresh", "seconds")))

    def close(self) -> None:
        """End it, also in the middle of a piece. It can be called more than once."""
        self._closed = True
        session = self._session
        if not self._turn.acquire(blocking=False):
            if session is not None:
                session.forge.kill()  # whoever waits for its answer clears up
            return
        try:
            if session is not None and session.cleared():
                _idle[self._kind].put(session)
                self._session = None
            self._end()
        finally:
            self._turn.release()

    @property
    def _kind(self) -> str:
        return json.dumps([self._limits, self._through])

    def _opened(self) -> Session:
        """One that is idle, or a new one."""
        with contextlib.suppress(queue.Empty):
            while True:
                session = _idle[self._kind].get_nowait()
                if session.cleared():
                    return session
                session.end()
        return Session(self._limits, self._through)

    def _end(self) -> None:
        if self._session is not None:
            self._session.end()
            self._session = None


def _framed(part: bytes) -> bytes:
    return b"%012d" % len(part) + part
