"""An engine in a process of its own: the same calls over a pipe, weights through files in shared memory.

Only a worker can die without the learner. When it does, every open call ends with an EngineLost that says so. It can
hang, too. A thread of the worker says every second that the process is alive, and where its main thread stands: in
which line of Python, and after how many turns of its event loop. If nothing is heard, or if it stands in one place with
calls open, the process is ended after a while. A long generation moves all the time and is never taken for a hang.

Calls that are made in one turn of the event loop travel as one message, so that what is batched with what does not
depend on how fast the pipe is.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlft.engine.base import Delta, Engine, Full, Weights
from rlft.lock import Scratch
from rlft.types import Completion, EngineLost, InputError, RunError, Sampling

SHARD_BYTES = 64 * 2**20
BEAT = 1.0  # seconds between two signs of life
LOOKS = 20  # at the main thread, from one to the next
PATIENCE = 120.0
ALIVE = -1  # the number of such a message, which answers no call


class WorkerEngine:
    """Starts `make()` in a spawned process and passes every call on.

    make: a picklable function that builds the engine there. patience: seconds without a sign of life, or of progress
    while calls are open, after which it is ended. start: seconds to wait for its start.
    """

    def __init__(
        self,
        make: Callable[[], Engine],
        log: Path | None = None,
        patience: float = PATIENCE,
        start: float = 600.0,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, log), daemon=True, name="rlft-engine")
        self._process.start()
        theirs.close()
        self.version = -1
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._next = 0
        self._outgoing: list[tuple[int, str, tuple[Any, ...]]] = []
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._patience = patience
        self._hung = ""
        if not self._pipe.poll(start):
            self._kill()
            raise RunError(f"the engine's process did not start within {start:.0f} s")
        kind, answer = self._receive()
        if kind != "ready":
            self._kill()
            raise answer
        self.dtype = answer
        threading.Thread(target=self._listen, daemon=True).start()

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        """See `Engine.generate`."""
        return await self._call("generate", list(prompt), sampling)

    async def load_weights(self, weights: Weights, version: int) -> None:
        """See `Engine.load_weights`. Tensors travel as safetensors in shared memory, a few at a time."""
        if isinstance(weights, Delta):
            await self._call("load_weights", weights, version)
        else:
            with Scratch("rlft-sync", _shared()) as folder:
                _write(weights, folder)
                await self._call("load_files", str(folder), version, weights.agent)
        self.version = version

    async def units(self, names: Sequence[str]) -> dict[str, str]:
        """See `Engine.units`."""
        return await self._call("units", list(names))

    async def read_back(self, names: Sequence[str], seed: int, agent: int = 0) -> dict[str, Tensor]:
        """See `Engine.read_back`."""
        found = await self._call("read_back", list(names), seed, agent)
        return {name: torch.from_numpy(array) for name, array in found.items()}

    async def forget(self) -> None:
        """See `Engine.forget`."""
        await self._call("forget")

    async def kept(self) -> int:
        """See `Engine.kept`."""
        return await self._call("kept")

    async def close(self) -> None:
        """See `Engine.close`. A process that does not end by itself within ten seconds is killed."""
        if not self._closed and self._process.is_alive():
            with contextlib.suppress(RunError, asyncio.TimeoutError, OSError):
                await asyncio.wait_for(self._call("close"), 10)
        self._closed = True
        self._process.join(10)
        self._kill()

    async def _call(self, method: str, *arguments: Any) -> Any:
        self._loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = self._loop.create_future()
        with self._lock:
            number, self._next = self._next, self._next + 1
            self._waiting[number] = future
        self._post(number, method, arguments)
        try:
            return await future
        except asyncio.CancelledError:
            self._waiting.pop(number, None)
            self._post(number, "cancel", ())
            raise

    def _post(self, number: int, method: str, arguments: tuple[Any, ...]) -> None:
        """Send it with everything else of this turn of the event loop."""
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._send)
        self._outgoing.append((number, method, arguments))

    def _send(self) -> None:
        calls, self._outgoing = self._outgoing, []
        try:
            self._pipe.send(calls)
        except (OSError, ValueError):
            for future in [self._waiting.pop(number, None) for number, _, _ in calls]:
                if future is not None and not future.done():
                    future.set_exception(self._dead())

    def _receive(self) -> tuple[Any, Any]:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            return "failed", self._dead()

    def _listen(self) -> None:
        """A thread: hand answers to the event loop; when the pipe breaks, or the worker hangs, fail whatever waits."""
        silent, stuck, moves = 0.0, 0.0, -1
        while not self._hung:
            try:
                if not self._pipe.poll(BEAT):  # what passed while this process itself was stopped does not count
                    silent += BEAT
                    self._hung = f"gave no sign of life for {silent:.0f} s" if silent >= self._patience else ""
                    continue
                number, good, answer = self._pipe.recv()
            except (EOFError, OSError, pickle.UnpicklingError):
                break
            silent = 0.0
            if number == ALIVE:
                stuck = stuck + BEAT if answer == moves and self._waiting else 0.0
                self._hung = f"stood still in one call for {stuck:.0f} s" if stuck >= self._patience else ""
                moves = answer
                continue
            with self._lock:
                future = self._waiting.pop(number, None)
            if future is not None:
                self._settle(future, good, answer)
        if self._hung:
            self._kill()
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            self._settle(future, False, self._dead())

    def _settle(self, future: asyncio.Future[Any], good: bool, answer: Any) -> None:
        def settle() -> None:
            if not future.done():
                future.set_result(answer) if good else future.set_exception(answer)

        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(settle)

    def _dead(self) -> EngineLost:
        self._process.join(1)
        what = f"{self._hung} and was ended" if self._hung else f"ended (exit code {self._process.exitcode})"
        return EngineLost(f"the engine's process {what}. Resume the run from its last checkpoint.")

    def _kill(self) -> None:
        if self._process.is_alive():
            self._process.kill()
            self._process.join(5)


def _shared() -> Path | None:
    return Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None


def _write(weights: Full, folder: Path) -> None:
    """Whole weights into numbered files of about SHARD_BYTES, in the order they come."""
    part: dict[str, Tensor] = {}
    size = count = 0
    for name, tensor in weights.tensors:
        part[name] = tensor.detach().cpu().contiguous()
        size += tensor.numel() * tensor.element_size()
        if size >= SHARD_BYTES:
            _save(part, folder / f"{count:05d}.safetensors")
            part, size, count = {}, 0, count + 1
    if part:
        _save(part, folder / f"{count:05d}.safetensors")


def _save(part: dict[str, Tensor], file: Path) -> None:
    try:
        save_file(part, file)
    except (OSError, SafetensorError) as error:
        where = file.parent.parent
        raise RunError(f"the weights do not fit into {where}: {error}. Enlarge it, or use place: here.") from error


def _serve(pipe: Connection, make: Callable[[], Engine], log: Path | None) -> None:
    """The other side: build the engine, answer calls until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides when the engine ends
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
    try:
        engine = make()
    except (RunError, InputError) as error:
        pipe.send(("failed", error))
        return
    except Exception as error:  # whatever it is, the driver has to hear it
        pipe.send(("failed", RunError(f"the engine did not start: {type(error).__name__}: {error}")))
        return
    pipe.send(("ready", getattr(engine, "dtype", None)))
    asyncio.run(_answer(_Pipe(pipe), engine))


class _Pipe:
    """The worker's end of the pipe, which its two threads write to."""

    def __init__(self, pipe: Connection) -> None:
        self._lock = threading.Lock()
        self.poll, self.recv, self.fileno = pipe.poll, pipe.recv, pipe.fileno
        self._pipe = pipe

    def send(self, message: Any) -> None:
        with self._lock:
            self._pipe.send(message)


def _beat(pipe: _Pipe, turns: list[int]) -> None:
    """A thread: say every second that the process is alive, and how often its main thread was seen to have moved.

    It is looked at many times a second, since a loop may well stand at the same line each time that it is looked at.
    """
    main, moves, last = threading.main_thread().ident or 0, 0, 0
    with contextlib.suppress(OSError, ValueError):  # the driver is gone
        while True:
            for _ in range(LOOKS):
                place = _place(main, turns[0])
                moves, last = moves + (place != last), place
                time.sleep(BEAT / LOOKS)
            pipe.send((ALIVE, True, moves))


def _place(thread: int, turns: int) -> int:
    """Where a thread stands, as a number."""
    place, frame = [turns], sys._current_frames().get(thread)
    while frame is not None:
        place += (id(frame.f_code), frame.f_lasti)
        frame = frame.f_back
    return hash(tuple(place))


async def _turning(turns: list[int]) -> None:
    """Count that the event loop still turns."""
    while True:
        await asyncio.sleep(BEAT / 4)
        turns[0] += 1


async def _answer(pipe: _Pipe, engine: Engine) -> None:
    loop = asyncio.get_running_loop()
    turns = [0]
    threading.Thread(target=_beat, args=(pipe, turns), daemon=True).start()
    turning = loop.create_task(_turning(turns))
    tasks: dict[int, asyncio.Task[None]] = {}
    done = asyncio.Event()

    async def answer(number: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            reply = (number, True, await _run(engine, method, arguments))
        except asyncio.CancelledError:
            return
        except (RunError, InputError) as error:
            kind = InputError if isinstance(error, InputError) else RunError
            reply = (number, False, kind(str(error)))
        except Exception as error:  # it must reach the driver, not this process's log only
            reply = (number, False, RunError(f"the engine failed: {type(error).__name__}: {error}"))
        finally:
            tasks.pop(number, None)
        with contextlib.suppress(OSError):
            pipe.send(reply)
        if method == "close":
            done.set()

    def read() -> None:
        try:
            while pipe.poll():
                for number, method, arguments in pipe.recv():
                    if method != "cancel":
                        tasks[number] = loop.create_task(answer(number, method, arguments))
                    elif number in tasks:
                        tasks.pop(number).cancel()
        except (EOFError, OSError):
            loop.remove_reader(pipe.fileno())
            done.set()

    loop.add_reader(pipe.fileno(), read)
    await done.wait()
    turning.cancel()


async def _run(engine: Engine, method: str, arguments: tuple[Any, ...]) -> Any:
    if method == "load_files":
        folder, version, agent = arguments
        files = sorted(Path(folder).glob("*.safetensors"))
        tensors = (pair for file in files for pair in load_file(file).items())
        return await engine.load_weights(Full(tensors, agent), version)
    answer = await getattr(engine, method)(*arguments)
    return {name: value.numpy() for name, value in answer.items()} if method == "read_back" else answer


def in_worker(make: Callable[..., Engine], patience: float = PATIENCE, **settings: Any) -> WorkerEngine:
    """Build `make(**settings)` in a process of its own, whose output goes to the engine's `log` too."""
    return WorkerEngine(partial(make, **settings), settings.get("log"), patience)
