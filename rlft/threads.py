"""Threads for calls that may never come back: one that hangs is left behind, and holds up neither others nor the end.

Python's own pool waits for its threads before the process ends, for ever if need be.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

Job = tuple[Callable[[Any], Any], Any, asyncio.AbstractEventLoop, "asyncio.Future[Any]"]


class Threads:
    """At most `count` calls at a time, each on a thread that is used again once its call has come back."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._idle: list[queue.SimpleQueue[Job | None]] = []
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()

    async def run(self, function: Callable[[Any], Any], argument: Any, seconds: float) -> Any:
        """What the function returns or raises. TimeoutError after so many seconds, the wait for a thread left out."""
        loop = asyncio.get_running_loop()
        async with self._slots.setdefault(loop, asyncio.Semaphore(self._count)):
            jobs = self._idle.pop() if self._idle else _started()
            future: asyncio.Future[Any] = loop.create_future()
            jobs.put((function, argument, loop, future))
            try:
                await asyncio.wait({future}, timeout=seconds)
            finally:
                if future.done():
                    self._idle.append(jobs)
                else:  # left behind: its thread ends with this call, if ever
                    jobs.put(None)
            if not future.done():
                raise TimeoutError(f"the call took longer than {seconds:g} s; its thread is left to itself")
            return future.result()

    def __del__(self) -> None:
        for jobs in self._idle:
            jobs.put(None)


def _started() -> queue.SimpleQueue[Job | None]:
    jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    threading.Thread(target=_work, args=(jobs,), daemon=True, name="rlft-call").start()
    return jobs


def _work(jobs: queue.SimpleQueue[Job | None]) -> None:
    while (job := jobs.get()) is not None:
        function, argument, loop, future = job
        try:
            settle, answer = _result, function(argument)
        except StopIteration as error:  # which no future takes
            settle, answer = _exception, RuntimeError(f"the call let a StopIteration out: {error}")
        except BaseException as error:  # whatever it is, it belongs to whoever called
            settle, answer = _exception, error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, future, answer)


def _result(future: asyncio.Future[Any], answer: Any) -> None:
    if not future.done():
        future.set_result(answer)


def _exception(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
