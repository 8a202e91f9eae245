"""Your own reward as one function, named by `path: my_pkg.mine:function`. No class, no registration.

A plain function runs in a thread, so that one that waits for a network or a disk never stops the rollouts; an async
function runs on the event loop.
"""

from __future__ import annotations

import asyncio
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pydantic import Field

from rlft.rewards.base import Config
from rlft.types import Group, InputError, Reward


class Custom(Config):
    """What a function of yours returns: `function(trajectory, **options)`, plain or async."""

    type: Literal["custom"] = "custom"
    path: str = Field(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$",
        description="Where the function is, as my_pkg.mine:function. The folder rlft is started in is searched too.",
    )
    per: Literal["trajectory", "group"] = Field(
        default="trajectory",
        description="What it is called with. `trajectory`: one, and it returns a number or None. `group`: all of one "
        "task, and it returns a list of them in that order.",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Passed to the function as keywords.")
    threads: int = Field(
        default=8, ge=1, description="Calls of a plain function that run at once. 1 for one that is not thread-safe."
    )

    def judge(self, name: str) -> Reward:
        call = _caller(_load(self.path, self.options), self.options, self.threads)

        async def judge(group: Group) -> Sequence[float | None]:
            if self.per == "group":
                return await call(group)
            return list(await asyncio.gather(*(call(trajectory) for trajectory in group)))

        return judge


def _caller(function: Callable[..., Any], options: dict[str, Any], threads: int) -> Callable[[Any], Awaitable[Any]]:
    """Calls the function with its options: on the loop if it is async, else in a thread of this reward's own."""
    if inspect.iscoroutinefunction(function):
        return lambda subject: function(subject, **options)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="rlft-reward")

    def plain(subject: Any) -> Any:
        try:
            return function(subject, **options)
        except StopIteration as error:  # asyncio cannot hand this one over, and would wait for ever
            raise RuntimeError("the function let a StopIteration out: next() on something empty") from error

    async def call(subject: Any) -> Any:
        result = await asyncio.get_running_loop().run_in_executor(pool, plain, subject)
        return await result if inspect.isawaitable(result) else result

    return call


def _load(path: str, options: dict[str, Any]) -> Callable[..., Any]:
    """The function behind `module:name`. Raises InputError where it cannot be had, or would refuse the options."""
    module_name, _, name = path.partition(":")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # last, so that nothing installed is hidden by a file that lies here
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise InputError(
            f"custom reward '{path}': importing '{module_name}' failed with {type(error).__name__}: {error}. Install "
            f"the package, or start rlft in the folder that holds it (now: {os.getcwd()})."
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        near = difflib.get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], 1)
        hint = f" Did you mean '{near[0]}'?" if near else ""
        raise InputError(f"custom reward '{path}': '{module_name}' has no function '{name}'.{hint}")
    try:
        inspect.signature(function).bind(None, **options)
    except TypeError as error:
        raise InputError(
            f"custom reward '{path}': it cannot be called as {name}(x, **options) with the options "
            f"{list(options)}: {error}. Change `options`, or the function's arguments."
        ) from error
    except ValueError:
        pass  # some builtins do not tell their signature
    return function
