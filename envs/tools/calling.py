"""The environment whose policy calls tools: each answer's calls are run, and their results are the reply.

The calls are in the model's own format and the results in its chat template's. What the policy gets wrong in a call is
told to it, and counted; what breaks the tools themselves ends the episode as a failure.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from rlft.envs.base import Action, Env, EnvKnobs, fill
from rlft.envs.custom import PATH
from rlft.envs.tools import formats
from rlft.envs.tools.base import Broken, Call, Kit, Result, Schema, Source, Tool, called, cut
from rlft.envs.tools.formats import Format
from rlft.envs.tools.functions import Functions
from rlft.envs.tools.hints import Hint, Hints
from rlft.envs.tools.programs import led, said_most
from rlft.envs.tools.python import Python, Sandboxed
from rlft.envs.tools.search import Corpus, Search
from rlft.envs.tools.servers import Served, Server
from rlft.threads import Threads
from rlft.types import InputError, Message, Task, Turn

FORMAT = r"^(auto|hermes|llama|mistral|plain|vllm:[\w.-]+)$"
EACH = 30  # tokens around one result, and of the notes in it
PLAIN = (
    'You can call tools. To call one, write <call>{"name": "...", "arguments": {...}}</call>. You are then shown the '
    "result. To answer, write no call. The tools:\n{tools}"
)


class Tools:
    """One task; each answer with calls is followed by their results."""

    def __init__(self, task: Task, knobs: ToolsConfig, kits: Sequence[Kit], form: Format) -> None:
        self._task, self._knobs, self._kits, self._form = task, knobs, kits, form
        self._hints = Hints(knobs.hints)
        self._left = knobs.most_answers
        self._tools: dict[str, Tool] = {}
        self._counts = {"calls": 0.0, "call_errors": 0.0, "call_failures": 0.0, "answered": 0.0}
        self.tools: tuple[Schema, ...] = ()

    async def reset(self) -> tuple[Message, ...]:
        """The task's own messages. Raises Broken where the tools are not to be had."""
        for tools in await asyncio.gather(*(kit.open() for kit in self._kits)):
            for tool in tools:
                if tool.name in self._tools:
                    raise Broken(f"two tools are called '{tool.name}'; rename one of them")
                self._tools[tool.name] = tool
        schemas = [tool.schema for tool in self._tools.values()]
        if self._form.native:
            self.tools = tuple(schemas)
        return led(self._task.messages, instructions(self._knobs, self._form, schemas))

    async def step(self, action: Action) -> Turn:
        """The results of the answer's calls; the end where there are none, and no hint to give."""
        self._left -= 1
        if action.finish == "length":  # a call may be cut off, and the episode ends here
            return Turn(metrics=self._metrics())
        before, calls = self._form.calls(action.raw, action.text)
        if calls:
            results = await self._run(calls)
            said, replies = self._form.said(before, calls), self._form.replies(calls[: len(results)], results)
            return Turn(replies if self._left else (), done=not self._left, said=said, metrics=self._metrics())
        hint = self._hints.next(action.text)
        if hint is not None and self._left:
            return Turn(({"role": "user", "content": hint},), done=False, metrics=self._metrics())
        self._counts["answered"] = 1.0
        return Turn(metrics=self._metrics())

    async def close(self) -> None:
        """Whatever a tool holds is let go of."""
        for error in await asyncio.gather(*(kit.close() for kit in self._kits), return_exceptions=True):
            if isinstance(error, BaseException):
                raise error

    async def _run(self, calls: Sequence[Call]) -> list[Result]:
        """The calls of one answer, beside each other, and one result for all that are too many; together the results
        are of a limited length."""
        most = self._knobs.most_calls
        told = f"only {most} calls of one answer are run; make the others in the next one"
        asked = [*calls[:most], *(replace(call, error=told) for call in calls[most : most + 1])]
        results = await asyncio.gather(*(called(call, self._tools) for call in asked))
        self._counts["calls"] += len(calls)
        untold = len(calls) - len(results)
        self._counts["call_errors"] += sum(result.fault == "error" for result in results) + untold
        self._counts["call_failures"] += sum(result.fault == "failure" for result in results)
        room = self._knobs.longest // len(results)
        return [Result(cut(result.text, room), result.fault) for result in results]

    def _metrics(self) -> dict[str, float]:
        own = [kit.metrics() for kit in self._kits]
        return self._counts | {name: value for one in own for name, value in one.items()}


class ToolsConfig(EnvKnobs):
    """Run the tool calls of each answer and show their results; an answer without one ends the episode."""

    type: Literal["tools"] = "tools"
    tools: tuple[Annotated[str, Field(pattern=PATH)], ...] = Field(
        default=(), description="Python functions and classes, as module:name. A class is made anew for every episode"
    )
    python: Sandboxed | None = Field(
        default=None, description="a Python interpreter as a tool; {}: as it is by default"
    )
    corpus: Corpus | None = Field(default=None, description="a search over documents as a tool")
    servers: tuple[Server, ...] = Field(default=(), description="MCP servers, whose tools are added")
    most_answers: int = Field(default=8, ge=2, description="the most answers to one task")
    most_calls: int = Field(default=4, ge=1, description="calls of one answer that are run; further ones are refused")
    longest: int = Field(default=2000, ge=80, description="characters that the results of one answer may have together")
    seconds: float = Field(default=30.0, gt=0, description="the most that a call of a Python function may take")
    workers: int = Field(default=16, ge=1, description="calls of plain functions at the same time, over all episodes")
    format: str = Field(default="auto", pattern=FORMAT, description="how the model writes calls; auto: as its template")
    instructions: str = Field(
        default="", description="put in front of the task's first message; {tools} stands for the tools' descriptions"
    )
    hints: tuple[Hint, ...] = Field(default=(), description="said in place of the end, where an answer has no call")

    @property
    def several(self) -> bool:
        return True

    @property
    def answers(self) -> int:
        return self.most_answers

    def room(self, asked: int, count: Callable[[str], int]) -> int:
        schemas = [schema for source in self._sources() for schema in source.schemas]
        told = count(described(schemas)) + count(PLAIN) + count(self.instructions)
        told += sum(server.room for server in self.servers)
        shown = count("0" * self.longest) + (self.most_calls + 1) * EACH
        return told + said_most(self.hints, self.most_answers, shown, count)

    def build(self) -> Callable[[Task], Env]:
        """Without the model's template `auto` is `plain`, which every model can be shown. Raises InputError."""
        return self.build_for(None, "")

    def build_for(self, tokenizer: Any, template: str) -> Callable[[Task], Env]:
        """As `build`, for one model. template: its chat template, empty for plain text. Raises InputError."""
        sources = self._sources()
        schemas = [schema for source in sources for schema in source.schemas]
        names = [schema["function"]["name"] for schema in schemas]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(
                f"env: two tools are called '{twice[0]}', and a call would be of either. Rename one of them"
            )
        form = self._format(tokenizer, template, schemas)
        return lambda task: Tools(task, self, [source.kit(task) for source in sources], form)

    def _format(self, tokenizer: Any, template: str, schemas: Sequence[Schema]) -> Format:
        kind, _, name = self.format.partition(":")
        if name:
            return formats.vllm(name, tokenizer, schemas)
        return formats.OWN[formats.told_by(template) if kind == "auto" else kind]

    def _sources(self) -> list[Source]:
        sources: list[Source] = []
        if self.tools:
            sources.append(Functions(self.tools, Threads(self.workers), self.seconds))
        if self.python is not None:
            sources.append(Python(self.python))
        if self.corpus is not None:
            sources.append(Search(self.corpus))
        sources += map(Served, self.servers)
        if not sources:
            raise InputError("env: there is no tool. Name some under env.tools, python, corpus or servers")
        return sources


def described(schemas: Sequence[Schema]) -> str:
    """Tools as a model without a format of its own is told them: the JSON of each on a line."""
    return "\n".join(json.dumps(schema["function"], ensure_ascii=False) for schema in schemas)


def instructions(knobs: ToolsConfig, form: Format, schemas: Sequence[Schema]) -> str:
    """What stands in front of the task: the user's own words, or those that plain text needs."""
    return fill(knobs.instructions or ("" if form.native else PLAIN), {"tools": described(schemas)})
