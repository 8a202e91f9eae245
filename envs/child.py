"""The process in which `process` plays episodes: one request in, one answer out. Started by it; never imported."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import fcntl
import importlib
import os
import pickle
import signal
from collections.abc import Callable
from typing import IO, Any

from rlft.envs import wire
from rlft.envs.base import Env
from rlft.envs.placed import placed
from rlft.envs.process import HEAD
from rlft.types import Task


def main(lifeline: int, crash: int) -> None:
    """lifeline: a pipe whose other end the run holds. crash: where Python says what it was at when it crashed."""
    faulthandler.enable(os.fdopen(crash, "w"), all_threads=False)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what an environment prints is no answer
    _die_with(lifeline)
    asyncio.run(_serve(requests, replies))
    os._exit(0)  # threads that hang would hold it up


def _die_with(lifeline: int) -> None:
    """The kernel kills this process when the run is gone, also in C code that never comes back (Linux)."""
    with contextlib.suppress(AttributeError, OSError):  # elsewhere the end of the requests has to do
        # Opened anew: whom the kernel signals belongs to an opening, and that of the run is all its processes'.
        lifeline = os.open(f"/proc/self/fd/{lifeline}", os.O_RDONLY | os.O_NONBLOCK)
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)  # type: ignore[attr-defined]
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


async def _serve(requests: IO[bytes], replies: IO[bytes]) -> None:
    try:
        module, name, plain = pickle.load(requests)
        knobs: Any = getattr(importlib.import_module(module), name)(**plain | {"place": "here"})
        play = _Play(placed(knobs, prepare=False))  # the run has done so
    except Exception as error:
        play = _Broken(error)
    while True:
        try:
            what, given = await asyncio.to_thread(pickle.load, requests)
        except EOFError:
            return
        try:
            answer = pickle.dumps((True, await getattr(play, what)(given)))
        except Exception as error:
            answer = pickle.dumps((False, wire.failure(error)))
        replies.write(len(answer).to_bytes(HEAD, "big") + answer)
        replies.flush()


class _Play:
    """One episode after another."""

    def __init__(self, make: Callable[[Task], Env]) -> None:
        self._make = make
        self._env: Env | None = None

    async def reset(self, task: Task) -> Any:
        env = self._env = self._make(task)
        messages = await env.reset()
        return messages, tuple(getattr(env, "tools", ()))

    async def step(self, action: Any) -> Any:
        assert self._env is not None
        return await self._env.step(action)

    async def close(self, _: None) -> None:
        env, self._env = self._env, None
        if env is not None:
            await env.close()


class _Broken:
    """What cannot be built says so, episode by episode."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def reset(self, _: Any) -> Any:
        raise self._error

    async def close(self, _: None) -> None:
        """Nothing to close."""
