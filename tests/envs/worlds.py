"""Environments whose methods are plain, async, or both; and such that crash, hang, and leave things behind."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import threading
import time
from typing import Any

from rlft.envs.base import Action
from rlft.types import InputError, Message, Task, Turn


class Plain:
    """Says what it was told, in which process and thread. How it behaves is what the task's `does` says."""

    def __init__(self, task: Task, sleep: float = 0.0, late: float = 0.0) -> None:
        time.sleep(late)
        self.task, self.sleep = task, sleep
        self.tools = ({"name": "shout"},)
        self.made = threading.get_ident()
        self.steps = 0

    def reset(self) -> tuple[Message, ...]:
        return self.task.messages

    def step(self, action: Action) -> Turn:
        self.steps += 1
        time.sleep(self.sleep)
        does = self.task.info.get("does")
        if does is not None:
            DOES[does]()
        said = {"pid": os.getpid(), "thread": threading.get_ident(), "made": self.made, "steps": self.steps}
        messages = ({"role": "user", "content": f"{action.text}!", "at": said},)
        return Turn(messages, 0.5, False, said={"role": "assistant", "content": action.text}, metrics={"loud": 1.0})

    def close(self) -> None:
        if self.task.info.get("closed"):
            with open(self.task.info["closed"], "a") as file:
                print(os.getpid(), file=file)


class Async(Plain):
    """The same with async methods."""

    async def reset(self) -> tuple[Message, ...]:  # type: ignore[override]
        await asyncio.sleep(0)
        return super().reset()

    async def step(self, action: Action) -> Turn:  # type: ignore[override]
        return super().step(action)

    async def close(self) -> None:  # type: ignore[override]
        super().close()


class Mixed(Plain):
    """One method of three is async."""

    async def step(self, action: Action) -> Turn:  # type: ignore[override]
        return super().step(action)


class Once:
    """Plain: one question, one answer."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def reset(self) -> tuple[Message, ...]:
        return self.task.messages

    def step(self, action: Action) -> Turn:
        return Turn(reward=float(len(action.text)))

    def close(self) -> None: ...


def made(task: Task, **options: Any) -> Async:
    """A function that makes an environment."""
    return Async(task, **options)


def crash() -> None:
    ctypes.string_at(0)


def spawn_and_hang() -> None:
    subprocess.Popen(["sleep", "4321"])
    time.sleep(600)


def hang() -> None:
    time.sleep(600)


def hang_in_c() -> None:
    """It holds the interpreter, so that no thread of its process gets a turn."""
    ctypes.PyDLL(None).sleep(600)


def raise_own() -> None:
    class Odd(Exception):
        """Found nowhere else."""

    raise Odd("not in the parent")


def refuse() -> None:
    raise InputError("the row lacks its world")


def leave() -> None:
    raise SystemExit(3)


DOES = {
    "crash": crash, "spawn": spawn_and_hang, "hang": hang, "hang in C": hang_in_c, "raise": raise_own,
    "refuse": refuse, "leave": leave,
}  # fmt: skip
