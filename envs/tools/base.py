"""What a tool is, and how calls of it run: beside each other, each within its time, and told as text."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rlft.types import InputError, RunError, Task

Schema = Mapping[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}


class Refused(Exception):
    """A call that the tool does not take. The policy is told why, and can do better."""


class Failed(Exception):
    """A tool's own words for what went wrong, which the policy is told as they are."""


class Broken(Exception):
    """What the tools need is gone, so that the episode cannot go on."""


@dataclass(frozen=True)
class Tool:
    """One tool of one episode.

    read: what `run` needs, from a call's arguments; it raises Refused. run: what the policy is told, as text or data,
    no later than it may; what it raises is told too, but for Broken, InputError and RunError. line: calls with the
    same one run one after another, in the order in which they were made.
    """

    schema: Schema
    read: Callable[[Mapping[str, Any]], Any]
    run: Callable[[Any], Awaitable[object]]
    line: asyncio.Lock | None = None

    @property
    def name(self) -> str:
        """As the policy calls it."""
        return self.schema["function"]["name"]


class Kit(Protocol):
    """Some tools of one episode, and what they share."""

    async def open(self) -> list[Tool]:
        """Called once, before the episode begins. Raises Broken."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """Numbers of the episode so far."""
        ...

    async def close(self) -> None:
        """Called once, also where `open` failed."""
        ...


class Source(Protocol):
    """Where kits come from. It is shared by all episodes."""

    @property
    def schemas(self) -> list[Schema]:
        """Those of its tools that are known before an episode begins."""
        ...

    def kit(self, task: Task) -> Kit:
        """For one episode."""
        ...


@dataclass(frozen=True)
class Call:
    """A call as it stands in an answer. error: why it cannot be read; then the name may be empty."""

    name: str
    arguments: Mapping[str, Any]
    error: str = ""


@dataclass(frozen=True)
class Result:
    """What a call gave. fault: "error" where the call was wrong, "failure" where the tool failed, else empty."""

    text: str
    fault: str = ""


def function_schema(name: str, description: str, parameters: Mapping[str, Any]) -> Schema:
    """In the form that chat templates take."""
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": dict(parameters)},
    }


async def called(call: Call, tools: Mapping[str, Tool]) -> Result:
    """Run one call; what goes wrong is told as text. Raises Broken, InputError and RunError."""
    if call.error:
        return Result(f"Error: {call.error}", "error")
    if call.name not in tools:
        return Result(f"Error: there is no tool '{call.name}'. There are: {', '.join(tools)}.", "error")
    tool = tools[call.name]
    try:
        given = tool.read(call.arguments)
    except Refused as error:
        return Result(f"Error: {call.name}: {error}. It takes: {_usage(tool)}", "error")
    try:
        async with tool.line or contextlib.nullcontext():
            return Result(text_of(await tool.run(given)))
    except (Broken, InputError, RunError):
        raise
    except Failed as error:
        return Result(f"Error: {error}", "failure")
    except Exception as error:
        return Result(f"Error: {call.name}: {type(error).__name__}: {error}", "failure")


def text_of(value: object) -> str:
    """Text as it is, and data as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def cut(text: str, longest: int) -> str:
    """Text of at most so many characters, before a note that says how many are left out."""
    if len(text) <= longest:
        return text
    return f"{text[:longest]}\n[{len(text) - longest} more characters were left out]"


def _usage(tool: Tool) -> str:
    """A tool's arguments in short, those marked that can be left out."""
    parameters = tool.schema["function"]["parameters"]
    needed = parameters.get("required", ())
    names = [
        f"{name}{'' if name in needed else '?'}: {schema.get('type', 'any')}"
        for name, schema in parameters.get("properties", {}).items()
    ]
    return f"{tool.name}({', '.join(names)})"
