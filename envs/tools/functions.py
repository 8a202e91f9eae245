"""Python functions as tools: their type hints and docstrings become JSON schemas, and calls are checked against them.

The schema is that of transformers' `get_json_schema`, with pydantic's form for the types that it does not know. A class
is made anew for every episode, and each of its public methods is a tool; they share what the object keeps.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PydanticUserError, ValidationError, create_model

from rlft.envs.custom import load
from rlft.envs.tools.base import Refused, Schema, Tool, function_schema
from rlft.threads import Threads
from rlft.types import InputError, Task

SECTION = re.compile(r"^(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?|Notes?):\s*$", re.M)
ARGUMENT = re.compile(r"^(\s*)\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")
PLAIN = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
ANY_TASK = (Task, "Task", "rlft.types.Task")


@dataclass(frozen=True)
class Described:
    """A function with its schema, and how its arguments are read. task: the parameter that is given the task."""

    function: Callable[..., Any]
    schema: Schema
    model: type[BaseModel]
    names: tuple[str, ...]
    task: str = ""

    def read(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords to call it with. Raises Refused where they are not those of the schema."""
        try:
            read = self.model.model_validate_json(json.dumps(dict(arguments)), strict=True)
        except RecursionError:
            raise Refused("its arguments are nested too deeply") from None
        except ValidationError as error:
            raise Refused("; ".join(map(_told, error.errors()))) from None
        return {name: getattr(read, f"a{i}") for i, name in enumerate(self.names)}


def described(function: Callable[..., Any], key: str) -> Described:
    """A function as a tool. key: what the config calls it, for messages. Raises InputError."""
    try:
        hints = typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except (NameError, TypeError) as error:
        raise InputError(
            f"{key}: its type hints cannot be read: {error}. Write types that exist when it runs"
        ) from error
    about, of_arguments = documented(inspect.getdoc(function) or "")
    if not about:
        raise InputError(f"{key} has no docstring, so the policy could not know what it does. Write one")
    parameters = [one for one in inspect.signature(function).parameters.values() if one.name != "self"]
    task = next((one.name for one in parameters if hints.get(one.name) in ANY_TASK), "")
    asked = [one for one in parameters if one.name != task]
    for one in asked:
        if one.kind not in PLAIN or one.name not in hints:
            reason = "no type hint" if one.kind in PLAIN else "no name of its own in a call"
            raise InputError(
                f"{key}: the argument '{one.name}' has {reason}. Give it one, so that calls can be checked"
            )
    fields: dict[str, Any] = {
        f"a{i}": (
            hints[one.name],
            Field(
                default=... if one.default is one.empty else one.default,
                alias=one.name,
                description=of_arguments.get(one.name),
            ),
        )
        for i, one in enumerate(asked)
    }
    try:
        model = create_model("Arguments", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)
        parameters_schema = _bare(model.model_json_schema())
    except PydanticUserError as error:
        raise InputError(f"{key}: {str(error).splitlines()[0]} Use types that JSON has") from error
    parameters_schema.pop("additionalProperties", None)
    schema = function_schema(function.__name__, about, parameters_schema)
    return Described(function, schema, model, tuple(one.name for one in asked), task)


def documented(text: str) -> tuple[str, dict[str, str]]:
    """What a docstring says of the function, and of each argument in its section `Args:`, as Google writes it."""
    parts = SECTION.split(text)
    about, sections = parts[0].strip(), dict(zip(parts[1::2], parts[2::2], strict=True))
    body = next((sections[name] for name in ("Args", "Arguments", "Parameters") if name in sections), "")
    found: dict[str, str] = {}
    depth, name = None, ""
    for line in body.splitlines():
        entry = ARGUMENT.match(line)
        if entry and (depth is None or len(entry[1]) <= depth):
            depth, name = len(entry[1]), entry[2]
            found[name] = entry[3].strip()
        elif name and line.strip():
            found[name] = f"{found[name]} {line.strip()}"
    return about, found


class Functions:
    """Functions and classes as a source of tools. paths: `module:name`. Raises InputError."""

    def __init__(self, paths: Sequence[str], threads: Threads, seconds: float) -> None:
        found = [(f"env.tools: {path}", load(path, "env.tools")) for path in paths]
        self._plain = [described(one, key) for key, one in found if not inspect.isclass(one)]
        self._classes = [(one, _methods(one, key)) for key, one in found if inspect.isclass(one)]
        self._threads = threads
        self._seconds = seconds

    @property
    def schemas(self) -> list[Schema]:
        """Of all of them."""
        return [one.schema for one in (*self._plain, *(one for _, methods in self._classes for one in methods))]

    def kit(self, task: Task) -> FunctionsKit:
        """Objects of its own for each episode."""
        return FunctionsKit(task, self._plain, self._classes, partial(_run, self._threads, self._seconds))


class FunctionsKit:
    """The functions, and the methods of one object of each class."""

    def __init__(
        self,
        task: Task,
        plain: Sequence[Described],
        classes: Sequence[tuple[type, list[Described]]],
        run: Callable[..., Any],
    ) -> None:
        self._task, self._plain, self._classes, self._run = task, plain, classes, run
        self._objects: list[Any] = []

    async def open(self) -> list[Tool]:
        """Makes the objects; a class whose maker takes an argument is given the task."""
        tools = [self._tool(one, one.function, None) for one in self._plain]
        for kind, methods in self._classes:
            made = await self._run(partial(kind, *([self._task] if _takes_one(kind) else [])), {})
            self._objects.append(made)
            line = asyncio.Lock()  # what an object keeps depends on the order of its calls
            tools += [self._tool(one, getattr(made, one.function.__name__), line) for one in methods]
        return tools

    def metrics(self) -> dict[str, float]:
        """What the objects tell by a method `_metrics`."""
        told = [one._metrics() for one in self._objects if hasattr(one, "_metrics")]
        return {name: value for one in told for name, value in one.items()}

    async def close(self) -> None:
        """Calls the objects' `_close`, where there is one."""
        for one in self._objects:
            if hasattr(one, "_close"):
                await self._run(one._close, {})

    def _tool(self, one: Described, function: Callable[..., Any], line: asyncio.Lock | None) -> Tool:
        further = {one.task: self._task} if one.task else {}

        async def run(given: dict[str, Any]) -> object:
            return await self._run(function, given | further)

        return Tool(one.schema, one.read, run, line)


async def _run(threads: Threads, seconds: float, function: Callable[..., Any], given: dict[str, Any]) -> object:
    """An async function is awaited, any other runs in a thread. TimeoutError after so many seconds."""
    if inspect.iscoroutinefunction(function):
        try:
            return await asyncio.wait_for(function(**given), seconds)
        except TimeoutError as error:
            raise TimeoutError(str(error) or f"the call took longer than {seconds:g} s") from error
    return await threads.run(lambda keywords: function(**keywords), given, seconds)


def _methods(kind: type, key: str) -> list[Described]:
    names = dict.fromkeys(name for base in reversed(kind.__mro__) for name in vars(base) if name[0] != "_")
    methods = [getattr(kind, name) for name in names if inspect.isfunction(inspect.getattr_static(kind, name))]
    if not methods:
        raise InputError(f"{key} has no public method, which would be its tools. Write one, or name a function")
    return [described(method, f"{key}.{method.__name__}") for method in methods]


def _takes_one(kind: type) -> bool:
    try:
        inspect.signature(kind).bind(None)
    except TypeError:
        return False
    return True


def _told(error: Any) -> str:
    """One mistake of a call, as pydantic found it."""
    place = ".".join(map(str, error["loc"]))
    kinds = {"missing": "is missing", "extra_forbidden": "is not an argument of it"}
    said = kinds.get(error["type"]) or str(error["msg"]).replace("Input should be", "should be")
    return f"'{place}' {said}"


def _bare(schema: Any, named: bool = False) -> Any:
    """A schema without the titles that pydantic writes. named: its keys are names of the user's."""
    if isinstance(schema, list):
        return [_bare(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _bare(value, key in ("properties", "$defs") and not named)
        for key, value in schema.items()
        if named or key != "title"
    }
