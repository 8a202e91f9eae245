"""The Python interpreter as a tool: one for each episode, in the sandbox, which keeps its state from call to call."""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from rlft.envs.tools.base import Broken, Refused, Schema, Tool, function_schema
from rlft.sandbox.interpreter import Interpreter, Said
from rlft.sandbox.programs import START, Limits, SandboxError
from rlft.threads import Threads
from rlft.types import InputError, Task

OUTPUT = 1 << 16  # bytes of one piece's output that leave the sandbox
FENCED = re.compile(r"\A\s*```[ \t]*\w*[ \t]*\n(.*?)(?:\n```\s*)?\Z", re.S)
SCHEMA = function_schema(
    "python",
    "Runs Python code, and returns what it prints and the value of a last expression. Names that are defined stay for "
    "the next call. Only the standard library is there, and no network.",
    {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "the code"}},
        "required": ["code"],
    },
)


class Sandboxed(BaseModel):
    """What one piece of code may take."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seconds: float = Field(
        default=2.0,
        gt=0,
        allow_inf_nan=False,
        description="processor time of one piece of code; on the clock, 3 times that + 1",
    )
    memory: int = Field(default=256, ge=64, description="megabytes that the interpreter may have")
    workers: int = Field(default=8, ge=1, description="pieces that run at the same time, over all episodes")
    through: list[str] = Field(
        default_factory=list,
        description="words put before the sandbox's command, such as those that start a container with this Python "
        "in it; none: behind the walls that this system has",
    )

    def limits(self) -> Limits:
        """Of one piece of code. Raises InputError where there is no sandbox."""
        if sys.platform != "linux":
            raise InputError("env: Python code runs in a sandbox, which only Linux has. Run the training there")
        if self.through and shutil.which(self.through[0]) is None:
            raise InputError(f"through: there is no command '{self.through[0]}' here; install it, or leave this empty")
        return Limits(seconds=self.seconds, memory=self.memory, output=OUTPUT)


class Pieces:
    """Runs pieces of code in one episode's interpreter, and counts them."""

    def __init__(self, knobs: Sandboxed, threads: Threads) -> None:
        limits = knobs.limits()
        self._interpreter = Interpreter(limits, knobs.through)
        self._threads = threads
        self._most = limits.told()["wall"] + 2 * START
        self._counts = {"python_calls": 0.0, "python_errors": 0.0}

    async def run(self, code: str) -> str:
        """What it prints, with a note where it was stopped. Raises Broken where the sandbox does not work."""
        try:
            said: Said = await self._threads.run(self._interpreter.run, code, self._most)
        except SandboxError as error:
            raise Broken(str(error)) from error
        self._counts["python_calls"] += 1
        self._counts["python_errors"] += float(said.raised or bool(said.reason) or said.lost)
        return noted(said)

    def metrics(self) -> Mapping[str, float]:
        """How many pieces ran, and how many of them raised, or were stopped."""
        return dict(self._counts)

    async def close(self) -> None:
        """End the interpreter, whatever it does."""
        await asyncio.to_thread(self._interpreter.close)


class Python:
    """A source of one tool: `python`."""

    def __init__(self, knobs: Sandboxed) -> None:
        knobs.limits()
        self._knobs = knobs
        self._threads = Threads(knobs.workers)

    @property
    def schemas(self) -> list[Schema]:
        """Of the one tool."""
        return [SCHEMA]

    def kit(self, task: Task) -> PythonKit:
        """An interpreter of its own for each episode."""
        return PythonKit(Pieces(self._knobs, self._threads))


class PythonKit:
    """The tool, with its state."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self.metrics, self.close = pieces.metrics, pieces.close

    async def open(self) -> list[Tool]:
        """Nothing starts before the first call."""
        return [Tool(SCHEMA, _code, self._pieces.run, asyncio.Lock())]


def noted(said: Said) -> str:
    """What a piece of code printed, and what became of it."""
    notes = {"timeout": "[it took too long and was stopped]", "output": "[it printed too much]", "": ""}
    lost = "[the interpreter ended, and what was defined is gone]" if said.lost else ""
    parts = [said.text.rstrip("\n"), notes[said.reason], lost]
    return "\n".join(part for part in parts if part) or "[nothing was printed]"


def _code(arguments: Mapping[str, Any]) -> str:
    """The code of a call, without code fences. Raises Refused."""
    if set(arguments) != {"code"} or not isinstance(arguments["code"], str):
        raise Refused("it takes one argument, 'code', a text")
    fenced = FENCED.match(arguments["code"])
    return fenced[1] if fenced else arguments["code"]
