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
from functools import partial
from typing import Any, Literal

from pydantic import Field

from rlft.rewards.base import Config
from rlft.threads import Threads
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
    seconds: float = Field(
        default=600.0, gt=0, description="How long one call may take. One that takes longer has failed: no score."
    )

    def judge(self, name: str) -> Reward:
        call = _caller(_load(self.path, self.options), self.options, self.threads, self.seconds)

        async def judge(group: Group) -> Sequence[Any]:
            if self.per == "group":
                return await call(group)
            # One that raises says nothing about the others.
            return await asyncio.gather(*map(call, group), return_exceptions=True)

        return judge


def _caller(
    function: Callable[..., Any], options: dict[str, Any], threads: int, seconds: float
) -> Callable[[Any], Awaitable[Any]]:
    """Calls the function with its options: on the loop if it is async, else in a thread of this reward's own.

    Raises TimeoutError where a call takes longer than `seconds`.
    """
    apart = Threads(threads)
    bound = partial(_call, function, options)

    async def call(subject: Any) -> Any:
        if inspect.iscoroutinefunction(function):
            return await _within(seconds, function(subject, **options))
        result = await apart.run(bound, subject, seconds)
        return await _within(seconds, result) if inspect.isawaitable(result) else result

    return call


async def _within(seconds: float, work: Awaitable[Any]) -> Any:
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError as error:  # its own, or that of the function
        raise TimeoutError(str(error) or f"the call took longer than {seconds:g} s") from error


def _call(function: Callable[..., Any], options: dict[str, Any], subject: Any) -> Any:
    """What cannot pass through asyncio, or would end the run, becomes an ordinary error."""
    try:
        return function(subject, **options)
    except StopIteration as error:
        raise RuntimeError("the function let a StopIteration out: next() on something empty") from error
    except SystemExit as error:
        raise RuntimeError(f"the function called sys.exit({error.code!r})") from error


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
