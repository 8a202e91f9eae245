"""Episodes in processes of their own: each is played by one process at a time, which plays others afterwards.

A process that crashes, or whose answer nobody waits for any more, costs its episode alone: it is killed with all that
it started, and another takes its place. The environment is built there from its config, so it need not be picklable;
tasks, actions and turns are. Calls block a thread each, never the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from typing import IO, Any
from weakref import WeakKeyDictionary

from rlft.envs import wire
from rlft.envs.base import Action, EnvKnobs
from rlft.envs.placed import Placed, Preparing
from rlft.threads import Threads
from rlft.types import Message, Task, Turn

START = "from rlft.envs.child import main; main({lifeline}, {crash})"
WORN = 1000  # episodes of one process: a library that leaks is let go of now and then
HEAD = 8  # bytes before an answer that say how long it is
SHOWN = 2000  # characters of what a crash left behind


class Died(Exception):
    """The process of an environment ended where it should have answered."""


class Apart:
    """One episode that is played in another process."""

    tools: tuple[Any, ...] = ()

    def __init__(self, pool: Pool, task: Task) -> None:
        self._pool = pool
        self._task = task
        self._child: Child | None = None

    async def ready(self) -> None:
        """Prepare its task, and wait for a process; as many episodes as there may be are being played."""
        if self._child is None:
            if self._pool.prepare is not None:
                await self._pool.prepare(self._task)
            self._child = await self._pool.take()

    async def reset(self) -> tuple[Message, ...]:
        """Make the environment, and ask for the messages that open the episode."""
        await self.ready()
        messages, self.tools = await self._ask("reset", self._task)
        return messages

    async def step(self, action: Action) -> Turn:
        """The reply to one action."""
        return await self._ask("step", action)

    async def close(self) -> None:
        """Close it there; the process is free then."""
        if self._child is not None:
            await self._ask("close", None)
            child, self._child = self._child, None
            self._pool.give(child)

    async def _ask(self, what: str, given: Any) -> Any:
        child = self._child
        if child is None:
            raise Died("the process of this episode is gone")
        try:
            fine, answer = await self._pool.threads.run(child.ask, (what, given), math.inf)
            if not fine and what == "close":
                raise wire.meant(answer)  # who knows what it left behind
        except BaseException:
            self._child = None
            self._pool.drop(child)
            raise
        if fine:
            return answer
        raise wire.meant(answer)


class Pool:
    """At most `count` processes, each started when it is first needed. They end with the pool, and with this process,
    however it ends.
    """

    def __init__(self, knobs: EnvKnobs, count: int) -> None:
        self.threads = Threads(count)
        self.prepare = Preparing(knobs) if isinstance(knobs, Placed) and knobs.prepares else None
        self._knobs = knobs
        self._count = count
        self._idle: list[Child] = []
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
        self._children: set[Child] = set()
        # The children hold the other end. When this one closes, by whatever death, the kernel kills them.
        self._lifeline = os.pipe()
        weakref.finalize(self, _end, self._children, self._lifeline)

    async def take(self) -> Child:
        """A process for one episode. It waits until one is free."""
        await self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._count)).acquire()
        while self._idle:
            if (child := self._idle.pop()).alive:
                return child
            self._forget(child)
        child = Child(self._knobs, self._lifeline[0])
        self._children.add(child)
        return child

    def give(self, child: Child) -> None:
        """It may play another episode, unless it is worn."""
        child.played += 1
        if child.played < WORN:
            self._idle.append(child)
        else:
            self._forget(child)
        self._slots[asyncio.get_running_loop()].release()

    def drop(self, child: Child) -> None:
        """It shall not play again."""
        self._forget(child)
        self._slots[asyncio.get_running_loop()].release()

    def _forget(self, child: Child) -> None:
        child.kill()
        self._children.discard(child)


def _end(children: set[Child], lifeline: tuple[int, int]) -> None:
    for child in children:
        child.kill()
    for end in lifeline:
        os.close(end)


class Child:
    """A process that plays one episode after another. played: those that it has closed."""

    def __init__(self, knobs: EnvKnobs, lifeline: int) -> None:
        self.played = 0
        self._knobs = knobs
        self._lifeline = lifeline
        self._killed = self._asking = self._buried = False
        self._process: subprocess.Popen[bytes] | None = None
        self._crash: IO[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def alive(self) -> bool:
        """It has not ended by itself."""
        return self._process is None or self._process.poll() is None

    def ask(self, request: tuple[str, Any]) -> tuple[bool, Any]:
        """In a thread: whether the call returned, and what, or else the error as plain values. Raises Died."""
        sent = pickle.dumps(request)
        with self._lock:
            if self._killed:
                raise Died("the process of the environment was killed before it was asked")
            if self._process is None:
                kind = type(self._knobs)
                sent = pickle.dumps((kind.__module__, kind.__name__, self._knobs.model_dump())) + sent
                self._process, self._crash = _started(self._lifeline)
            process, self._asking = self._process, True
        try:
            answer = _exchanged(process, sent)
        except (EOFError, OSError) as error:
            died = self._dead()
            if self._killed:  # then nobody waits for this
                return False, wire.failure(died)
            raise died from error
        with self._lock:
            self._asking = False
        return pickle.loads(answer)

    def kill(self) -> None:
        """With all that it started. If a thread waits for an answer, that thread takes leave of it."""
        with self._lock:
            self._killed = True
            if self._process is not None and not self._buried:
                _kill(self._process)
                if not self._asking:
                    self._bury()

    def _dead(self) -> Died:
        with self._lock:
            assert self._process is not None
            _kill(self._process)  # what it started outlives it else
            code, left = self._bury()
            self._asking = False
        died = Died(f"the process of the environment ended with {_name(code)}")
        if left:
            died.add_note(f"it left behind:\n{left}")
        return died

    def _bury(self) -> tuple[int, str]:
        """Its exit code, and what Python said of the crash. Nothing of it is left open."""
        assert self._process is not None
        assert self._crash is not None
        self._buried = True
        code = self._process.wait()
        self._crash.seek(0)
        left = self._crash.read().decode(errors="replace")[:SHOWN]
        for pipe in (self._process.stdin, self._process.stdout, self._crash):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not sent any more
                    pipe.close()
        return code, left


def _started(lifeline: int) -> tuple[subprocess.Popen[bytes], IO[bytes]]:
    """A process, and the file in which Python says what it was at when it crashed."""
    crash = tempfile.TemporaryFile()  # noqa: SIM115  (closed where the process is buried)
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", START.format(lifeline=lifeline, crash=crash.fileno())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(lifeline, crash.fileno()),
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,  # Ctrl-C is the run's; and what it starts can be killed with it
    )
    return process, crash


def _exchanged(process: subprocess.Popen[bytes], sent: bytes) -> bytes:
    """The answer to what is sent. Raises EOFError or OSError where the process ends before."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(sent)
    process.stdin.flush()
    head = process.stdout.read(HEAD)
    answer = process.stdout.read(int.from_bytes(head, "big")) if len(head) == HEAD else b""
    if not answer or len(answer) < int.from_bytes(head, "big"):
        raise EOFError("the process ended within its answer")
    return answer


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The whole group, which keeps its number while its first process is not waited for."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def _name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
