"""Processes that are ready to run a job in the sandbox, so that no job waits for an interpreter to start.

A forge has loaded the inside of the sandbox and nothing else. It forks a process for each job before it reads a byte of
it, so that nothing of one job is there in the next.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

JAIL = Path(__file__).with_name("jail")
BOOT = (
    "import sys, types; package = types.ModuleType('jail'); package.__path__ = [sys.argv[1]]; "
    "sys.modules['jail'] = package; from jail.start import main; main()"
)


class Forge:
    """One such process. through: words before its command."""

    def __init__(self, through: Sequence[str]) -> None:
        self.process = subprocess.Popen(
            [*through, sys.executable, "-s", "-S", "-P", "-c", BOOT, str(JAIL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": os.environ.get("PATH", ""), "PYTHONHASHSEED": "0"},  # sets have one order
            process_group=0,  # Ctrl-C is for the run
        )
        self.whole = True
        assert self.process.stdout is not None
        self._poll = select.poll()  # and no `select`, which knows 1024 files
        self._poll.register(self.process.stdout, select.POLLIN)
        weakref.finalize(self, _end, self.process)

    def ask(self, sent: bytes, lines: int, seconds: float) -> list[bytes]:
        """Send a job, read so many lines. Fewer come back where it ended or took too long; it is of no use then."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        deadline, out = time.monotonic() + seconds, b""
        try:
            self.process.stdin.write(sent)
            self.process.stdin.flush()
        except BrokenPipeError:
            self.whole = False
        while self.whole and out.count(b"\n") < lines:
            ready = self._poll.poll(max(0.0, 1000 * (deadline - time.monotonic())))
            part = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            self.whole = bool(part)
            out += part
        if not self.whole:
            _end(self.process)
        return out.splitlines()

    def kill(self) -> None:
        """End it while another thread may wait for its answer, who then gets fewer lines and clears up."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """End it, and whatever runs in it."""
        self.whole = False
        _end(self.process)

    def errors(self) -> str:
        """Why one that has ended did so."""
        assert self.process.stderr is not None
        with self.process.stderr as pipe:
            said = pipe.read().decode(errors="replace")
        return f"code {self.process.returncode}: {said[-1000:]}"


_idle: defaultdict[tuple[str, ...], queue.LifoQueue[Forge]] = defaultdict(queue.LifoQueue)


def ask(through: Sequence[str], sent: bytes, lines: int, seconds: float) -> tuple[list[bytes], str]:
    """What an idle forge, or a new one, answers; and why there are fewer lines than asked for, if there are.

    Raises OSError where none can be started.
    """
    idle = _idle[tuple(through)]
    found: list[bytes] = []
    with contextlib.suppress(queue.Empty):
        forge = idle.get_nowait()
        found = _asked(forge, idle, sent, lines, seconds)
    if not found:  # none was idle, or the one that was has been ended meanwhile
        forge = Forge(through)
        found = _asked(forge, idle, sent, lines, seconds)
    return found, "" if forge.whole else forge.errors()


def opened(through: Sequence[str], sent: bytes, seconds: float) -> tuple[Forge, bytes]:
    """A forge that has answered the beginning of a session with a line, and that line; it is the caller's from now on.

    Raises OSError where none can be started, or none answers.
    """
    idle = _idle[tuple(through)]
    with contextlib.suppress(queue.Empty):
        forge = idle.get_nowait()
        if found := forge.ask(sent, 1, seconds):
            return forge, found[0]
    forge = Forge(through)
    if found := forge.ask(sent, 1, seconds):
        return forge, found[0]
    raise OSError(forge.errors())


def _asked(forge: Forge, idle: queue.LifoQueue[Forge], sent: bytes, lines: int, seconds: float) -> list[bytes]:
    try:
        found = forge.ask(sent, lines, seconds)
    except BaseException:  # its answer would be taken for the next one's
        _end(forge.process)
        raise
    if forge.whole:
        idle.put(forge)
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:  # else its number may be another's by now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
