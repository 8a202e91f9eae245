"""How the agent of one episode is started, and ended: a function in a thread, or a program with a process group."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from shutil import which
from typing import IO, Any, Protocol
from weakref import WeakKeyDictionary

from rlft.envs import wire
from rlft.envs.custom import load
from rlft.threads import Threads
from rlft.types import InputError, Task

MOST = 4096  # threads; an agent is not to wait for another one's end
SHOWN = 2000  # characters of what a program that failed has said
READ = 65536  # bytes from the end of what it printed


@dataclass(frozen=True)
class Seat:
    """Where an agent reaches the policy: what an OpenAI client is made with."""

    base_url: str
    api_key: str
    model: str


class Slot(Protocol):
    """One more that may run."""

    def release(self) -> None: ...


class Start(Protocol):
    """Runs agents."""

    async def slot(self) -> Slot:
        """Wait until one more may run."""
        ...

    async def run(self, task: Task, seat: Seat) -> Any:
        """Its verdict, once it has ended. Raises what it raises; where this is cancelled, so is the agent."""
        ...


def of_function(path: str, options: Mapping[str, Any]) -> Start:
    """A function in a thread of its own. Raises InputError where it cannot be had, or cannot be called."""
    function = load(path, "env.path")
    taken = taking(function, path, options)
    lacking = {"base_url", "api_key"} - set(taken)
    if lacking:
        raise InputError(
            f"env.path: {path} does not take {' and '.join(sorted(lacking))}, so that it would not ask this policy; "
            "take them, or set env.place=process, where OPENAI_BASE_URL and OPENAI_API_KEY are set"
        )
    return Function(function, taken, options)


def taking(function: Callable[..., Any], path: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Which of task, base_url, api_key and model a function takes. Raises InputError where it takes more."""
    signature = inspect.signature(function)
    anything = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in signature.parameters.values())
    taken = tuple(name for name in ("task", "base_url", "api_key", "model") if anything or name in signature.parameters)
    try:
        signature.bind(**dict.fromkeys(taken), **options)
    except TypeError as error:
        raise InputError(
            f"env.path: {path} cannot be called with task, base_url, api_key, model and env.options: {error}"
        ) from error
    return taken


def called(
    function: Callable[..., Any], taken: Sequence[str], task: Task, seat: Seat, options: Mapping[str, Any]
) -> Any:
    """What the function returns, an async one in an event loop of its own."""
    given: dict[str, Any] = {"task": task, **asdict(seat)}
    return function(**{name: given[name] for name in taken}, **options)


class Function:
    """Agents that are calls of a function, each in a thread."""

    def __init__(self, function: Callable[..., Any], taken: Sequence[str], options: Mapping[str, Any]) -> None:
        self._function = function
        self._taken = taken
        self._options = options
        self._threads = Threads(MOST)

    async def slot(self) -> Slot:
        """See `Start.slot`: there is one."""
        return asyncio.Semaphore()

    async def run(self, task: Task, seat: Seat) -> Any:
        """See `Start.run`. What is not async runs on where this is cancelled, until it asks again, and is refused."""
        call = Call(partial(called, self._function, self._taken, task, seat, self._options))
        try:
            return await self._threads.run(call, None, math.inf)
        finally:
            call.cancel()


class Call:
    """One call in a thread; where it is async, it can be cancelled from outside."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._cancelled = False
        self._running: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    def __call__(self, _: None) -> Any:
        try:
            answer = self._function()
            return asyncio.run(self._awaited(answer)) if inspect.iscoroutine(answer) else answer
        except (SystemExit, asyncio.CancelledError) as error:  # which would end the run
            raise RuntimeError(f"the agent ended by {type(error).__name__}({error})") from error

    async def _awaited(self, answer: Any) -> Any:
        task = asyncio.ensure_future(answer)
        self._running = asyncio.get_running_loop(), task
        if self._cancelled:
            task.cancel()
        return await task

    def cancel(self) -> None:
        """Cancel it, if there is anything to cancel."""
        self._cancelled = True
        if self._running is not None:
            with contextlib.suppress(RuntimeError):  # its loop is closed: it has ended
                self._running[0].call_soon_threadsafe(self._running[1].cancel)


def of_command(command: Sequence[str], path: str | None, options: Mapping[str, Any], count: int) -> Start:
    """A program, or a function in a process of its own; at most `count` at once. Raises InputError."""
    if path is not None:
        taking(load(path, "env.path"), path, options)
        return Program((sys.executable, "-m", "rlft.envs.agent_child", path, json.dumps(dict(options))), count)
    if which(command[0]) is None:
        raise InputError(f"env.command: there is no program {command[0]!r}; give its path, or install it")
    return Program(command, count)


class Program:
    """Agents that are processes. Each reads its task as JSON, and may print its verdict as its last line."""

    def __init__(self, command: Sequence[str], count: int) -> None:
        self._command = command
        self._count = count
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    async def slot(self) -> Slot:
        """See `Start.slot`."""
        slot = self._slots.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(self._count))
        await slot.acquire()
        return slot

    async def run(self, task: Task, seat: Seat) -> Any:
        """See `Start.run`: it is killed with all that it has started."""
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            given.write(json.dumps(wire.task(task)).encode())
            given.seek(0)
            process = await asyncio.create_subprocess_exec(
                *self._command, stdin=given, stdout=out, stderr=errors, start_new_session=True, env=around(seat)
            )
            try:
                code = await process.wait()
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
            if code:
                raise RuntimeError(f"the program ended with {code}: {_end(errors)[-SHOWN:].strip()}")
            return _last(_end(out))


def around(seat: Seat) -> dict[str, str]:
    """The environment of a program."""
    own = {"OPENAI_BASE_URL": seat.base_url, "OPENAI_API_KEY": seat.api_key, "OPENAI_MODEL": seat.model}
    direct = {
        name: ",".join(filter(None, (os.environ.get(name), "127.0.0.1,localhost"))) for name in ("NO_PROXY", "no_proxy")
    }
    return {**os.environ, **own, **direct}  # clients would ask a proxy for this machine else


def _end(file: IO[bytes]) -> str:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - READ))
    return file.read().decode(errors="replace")


def _last(printed: str) -> Any:
    """The verdict in the last line, if it is one."""
    line = printed.strip().rpartition("\n")[2]
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number or (isinstance(value, dict) and "reward" in value) else None
