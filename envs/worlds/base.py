"""What the worlds of other libraries share: their packages, their knobs, and where an episode's chance comes from.

Those that hold a library are plain classes whose methods are not async: they are called in threads, or in processes of
their own (see `placed`), one call of an episode after the other, but not always on the same thread.
"""

from __future__ import annotations

import hashlib
import importlib
from typing import Any

from pydantic import Field

from rlft.envs.base import Outside
from rlft.types import InputError, Message, Task

INSTALL = "pip install 'rlft[worlds]'"


class LibraryKnobs(Outside):
    """The knobs of every such world."""

    turns: int = Field(default=20, ge=1, description="the most answers of one episode; those that are no moves count")
    most_said: int = Field(default=1024, ge=1, description="tokens of all that the world says, for which there is room")

    @property
    def answers(self) -> int:
        return self.turns


def library(module: str, needed_by: str) -> Any:
    """A module of a package that only one world needs. Raises InputError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"env: {needed_by} needs a package that is not installed ({error}): {INSTALL}") from error


def seed_of(task: Task) -> int:
    """The task's seed; where it has none, 31 bits of its id."""
    seed = task.info.get("seed")
    if isinstance(seed, int):
        return seed
    return int.from_bytes(hashlib.blake2b(task.id.encode(), digest_size=4).digest(), "big") >> 1


def opened(task: Task, text: str) -> tuple[Message, ...]:
    """The task's system message, if any, and the world's opening in place of its question."""
    system = tuple(message for message in task.messages if message["role"] == "system")
    return (*system, said(text))


def said(text: str) -> Message:
    """What the world says."""
    return {"role": "user", "content": text}
