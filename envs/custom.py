"""The entry through which a user's own environment enters: a class or function from a task to an environment."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator

from rlft.envs.base import Env, Outside
from rlft.envs.placed import Placed
from rlft.types import InputError, Task

PATH = r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*$"


class Told(Outside):
    """The knobs of environments of which a run knows nothing but what it is told."""

    most_answers: int = Field(default=1, ge=1, description="answers of one episode that the context has room for")
    roles: int = Field(default=1, ge=1, description="how many roles speak, as Turn.role numbers them")
    paid_apart: bool = Field(
        default=False, description="roles are paid each for itself (Turn.pays), and compared with themselves alone"
    )

    @property
    def answers(self) -> int:
        return self.most_answers

    @property
    def speaking(self) -> int:
        return self.roles

    @property
    def rivals(self) -> bool:
        return self.paid_apart

    @model_validator(mode="after")
    def _several(self) -> Told:
        if self.paid_apart and self.roles == 1:
            raise ValueError("env.paid_apart: there is one role, which is paid all there is; set env.roles=2 or more")
        return self


class CustomConfig(Told, Placed):
    """Your own: `path: my_pkg.mine:MyEnv` names a class or function that is called with a task, once an episode."""

    type: Literal["custom"] = "custom"
    path: str = Field(pattern=PATH, description="module:name. The folder that rlft is started in is searched too")
    options: dict[str, Any] = Field(default_factory=dict, description="keywords that it is called with beside the task")

    def build(self) -> Callable[[Task], Env]:
        make = load(self.path, "env.path")
        try:
            inspect.signature(make).bind(None, **self.options)
        except TypeError as error:
            raise InputError(
                f"env.options: {self.path} cannot be called with a task and {list(self.options)}: {error}"
            ) from error
        return partial(make, **self.options)


def load(path: str, key: str) -> Callable[..., Any]:
    """What `module:name` names. key: that of the config, for the message. Raises InputError."""
    module, _, name = path.partition(":")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # last, so that nothing installed is hidden by a file that lies here
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:
        raise InputError(
            f"{key}: {path} cannot be had: {type(error).__name__}: {error}. Install the package, or start rlft in the "
            f"folder that holds it (now: {os.getcwd()})"
        ) from error
    if not callable(found):
        raise InputError(f"{key}: {path} is {type(found).__name__}, nothing that can be called")
    return found
