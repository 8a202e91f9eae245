"""Work that an engine is needed for, done again from its beginning whenever the engine is lost in it.

Everything that such work draws has seeds of its own, and the process's random states are put back; so what comes out
is what would have come out undisturbed, bit for bit. Samples drawn ahead are of younger weights then, see
`Parts.refill`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from rlft.chance import put, states
from rlft.types import EngineLost

T = TypeVar("T")


async def surviving(work: Callable[[], Awaitable[T]]) -> T:
    """What `work()` gives. It must have changed nothing when it raises EngineLost. Raises RunError from `recover`."""
    before = states()
    while True:
        try:
            return await work()
        except EngineLost as lost:
            if lost.recover is None:
                raise
            await lost.recover()
            put(before)
