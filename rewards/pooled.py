"""What rewards share that take a while: they run in threads, so that generation goes on meanwhile. And libraries that
only the rewards on texts need.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from rlft.threads import Threads
from rlft.types import Group, InputError, Reward, Trajectory

INSTALL = "pip install 'rlft[texts]'"
SECONDS = 60.0  # for one trajectory, hundreds of times what the slowest of these rewards takes for a long answer

Verdict = tuple[float | None, dict[str, float]]


def pooled(verdict: Callable[[Trajectory], Verdict], name: str, threads: int = 1, seconds: float = SECONDS) -> Reward:
    """verdict: the value and what to log beside it, as `reward/<name>/<key>`. One that raises has failed there alone.

    threads: one is enough for what is Python, of which one runs at a time. seconds: what a call may take.
    """
    apart = Threads(threads)

    async def judge(group: Group) -> Sequence[Any]:
        calls = (apart.run(verdict, trajectory, seconds) for trajectory in group)
        said = await asyncio.gather(*calls, return_exceptions=True)
        for trajectory, one in zip(group, said, strict=True):
            if not isinstance(one, BaseException):
                trajectory.metrics |= {f"reward/{name}/{key}": value for key, value in one[1].items()}
        return [one if isinstance(one, BaseException) else one[0] for one in said]

    return judge


def library(module: str, needed_by: str) -> Any:
    """A module of a package that only some rewards need. Raises InputError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{needed_by} needs a package that is not installed ({error}): {INSTALL}") from error
