"""Several things at once, of which one may fail."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import Any


async def together(coroutines: Iterable[Awaitable[Any]]) -> list[Any]:
    """gather, but the first failure ends the others, and they have ended, before it is raised."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
