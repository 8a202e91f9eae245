"""Tools of MCP servers (modelcontextprotocol.io): a process for each episode, or a connection to one at an address."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rlft.envs.tools.base import Broken, Failed, Refused, Schema, Tool, function_schema
from rlft.types import InputError, Task

TOLD = (-32600, -32601, -32602, -32603)  # JSON-RPC's codes for a request that the server did not take
LATE = (-32001, 408)  # of a request that was not answered in time
DEEPEST = 64  # arguments within each other; the package itself gives up at some hundreds
ENDING = 5.0  # seconds that a server gets to end by itself


class Server(BaseModel):
    """One MCP server: a command that speaks MCP on its standard input and output, or the address of one over HTTP."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    command: tuple[str, ...] = Field(default=(), description="words that start it, once for every episode")
    url: str | None = Field(default=None, description="the address of one that runs: streamable HTTP")
    environment: dict[str, str] = Field(default_factory=dict, description="variables that the command is given too")
    seconds: float = Field(default=30.0, gt=0, description="the most that its start, or one call, may take")
    room: int = Field(default=1000, ge=0, description="tokens that the descriptions of its tools may take")

    @model_validator(mode="after")
    def _one_of_both(self) -> Server:
        if bool(self.command) == bool(self.url):
            raise ValueError("an MCP server has either a `command` that starts it, or a `url`; give one of them")
        return self

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.url or " ".join(self.command)


class Served:
    """A source of a server's tools. Raises InputError where the package or the command is missing."""

    def __init__(self, server: Server) -> None:
        try:
            import mcp.client  # noqa: F401
        except ImportError as error:
            raise InputError("env.servers needs the package mcp; install it with pip install rlft[tools]") from error
        if server.command and shutil.which(server.command[0]) is None:
            raise InputError(
                f"env.servers: there is no command '{server.command[0]}' here. Install it, or give its path"
            )
        self._server = server

    @property
    def schemas(self) -> list[Schema]:
        """Known only once it runs."""
        return []

    def kit(self, task: Task) -> ServerKit:
        """A process, or a connection, of its own for each episode."""
        return ServerKit(self._server)


class ServerKit:
    """One connection. A task of its own holds it, since whoever opens one has to close it."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._client: Any = None

    async def open(self) -> list[Tool]:
        """Start or reach the server, and ask what it has."""
        ready: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._live(ready))
        try:
            found = await asyncio.wait_for(ready, self._server.seconds)
        except TimeoutError as error:
            raise Broken(f"the MCP server {self._server.name} did not start in {self._server.seconds:g} s") from error
        return [self._tool(one) for one in found]

    def metrics(self) -> Mapping[str, float]:
        """None."""
        return {}

    async def close(self) -> None:
        """The server's process ends too."""
        self._ended.set()
        if self._task is None:
            return
        await asyncio.wait({self._task}, timeout=ENDING)
        if not self._task.done():
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=ENDING)

    async def _live(self, ready: asyncio.Future[list[Any]]) -> None:
        try:
            with open(os.devnull, "w") as nowhere:
                async with _connected(self._server, nowhere) as self._client:
                    found = await self._listed()
                    if not ready.done():
                        ready.set_result(found)
                    await self._ended.wait()
        except Exception as error:  # it may come as a group of them, from the tasks that the package starts
            if not ready.done():
                ready.set_exception(Broken(f"the MCP server {self._server.name} does not answer: {_cause(error)!r}"))

    async def _listed(self) -> list[Any]:
        page = await self._client.list_tools()
        found = list(page.tools)
        while page.next_cursor:
            page = await self._client.list_tools(cursor=page.next_cursor)
            found += page.tools
        return found

    def _tool(self, one: Any) -> Tool:
        parameters = dict(one.input_schema)

        def read(arguments: Mapping[str, Any]) -> dict[str, Any]:
            missing = [name for name in parameters.get("required", ()) if name not in arguments]
            if missing:
                raise Refused("; ".join(f"'{name}' is missing" for name in missing))
            _sendable(arguments)
            return dict(arguments)

        async def run(arguments: dict[str, Any]) -> str:
            return await self._call(one.name, arguments)

        return Tool(function_schema(one.name, one.description or one.name, parameters), read, run, asyncio.Lock())

    async def _call(self, name: str, arguments: dict[str, Any]) -> str:
        from mcp import MCPError

        try:
            answer = await asyncio.wait_for(self._client.call_tool(name, arguments), self._server.seconds)
        except TimeoutError as error:
            raise Failed(f"{name} took longer than {self._server.seconds:g} s") from error
        except MCPError as error:
            if error.code in (*TOLD, *LATE):
                raise Failed(str(error)) from error
            raise Broken(f"the MCP server {self._server.name} is gone: {error}") from error
        except ValueError as error:  # what is sent, or what has come, is no message; the connection is still there
            raise Failed(f"{name}: {error}") from error
        except Exception as error:
            raise Broken(f"the MCP server {self._server.name} is gone: {_cause(error)!r}") from error
        text = "\n".join(getattr(part, "text", None) or f"[{part.type}]" for part in answer.content)
        if answer.is_error:
            raise Failed(text)
        return text


def _connected(server: Server, nowhere: Any) -> contextlib.AbstractAsyncContextManager[Any]:
    """A client of the server, to be entered. nowhere: where what the command says on standard error goes."""
    from mcp import StdioServerParameters
    from mcp.client import Client
    from mcp.client.stdio import stdio_client

    if server.url:
        return Client(server.url)
    command, *words = server.command
    # Beside these it is given what any program needs, PATH and such, and none of this process's keys.
    asked = StdioServerParameters(command=command, args=words, env=server.environment)
    return Client(stdio_client(asked, errlog=nowhere))


def _sendable(arguments: Mapping[str, Any]) -> None:
    """Raises Refused where arguments cannot be written as JSON, which is no fault of the server."""
    level: list[Any] = [arguments]
    for _ in range(DEEPEST):
        level = [
            value
            for one in level
            if isinstance(one, Mapping | list)
            for value in (one.values() if isinstance(one, Mapping) else one)
        ]
    if level:
        raise Refused(f"its arguments are nested more than {DEEPEST} deep")
    try:
        json.dumps(dict(arguments), ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise Refused("a text in its arguments has half a character, a lone surrogate") from None
    except ValueError:
        raise Refused("a number in its arguments is not finite") from None


def _cause(error: BaseException) -> BaseException:
    """The first error of a group of errors."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
