"""What services have in common: a key that requests must bring, a port, and an end by Ctrl-C."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import importlib.util
import os
import socket
from collections.abc import Callable
from typing import Any

from rlft.types import InputError

LOCAL = ("127.0.0.1", "localhost", "::1")


def key_of(variable: str | None) -> str:
    """The key in an environment variable; "" where none is asked for. Raises InputError where it is not set."""
    if variable is not None and not os.environ.get(variable):
        raise InputError(f"--key-env: the environment variable {variable} is not set; export it first")
    return os.environ.get(variable or "", "")


def refuse_lacking(command: str) -> None:
    """Raises InputError where the packages of services are not installed."""
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise InputError(f"{command} needs the packages starlette and uvicorn: pip install 'rlft[serve]'")


def admitted(request: Any, key: str) -> bool:
    """Whether a request brings the key, if there is one."""
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    return not key or hmac.compare_digest(given.encode(), key.encode())


def listen(
    app: Any, host: str, port: int, keyless: bool, say: Callable[[str], None], about: Callable[[str], list[str]]
) -> None:
    """Serve an ASGI application until Ctrl-C. port 0 takes a free one. Raises InputError.

    about: the lines to say, given the address.
    """
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(listening(app, host, port, keyless, say, about))


async def listening(
    app: Any, host: str, port: int, keyless: bool, say: Callable[[str], None], about: Callable[[str], list[str]]
) -> None:
    """See `listen`; on an event loop that is there already."""
    import uvicorn

    try:
        bound = socket.create_server((host, port))
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror}; choose another port") from error
    for line in about(f"http://{host}:{bound.getsockname()[1]}"):
        say(line)
    if keyless and host not in LOCAL:
        say("whoever reaches this port is answered; --key-env NAME asks for a key")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    await server.serve(sockets=[bound])
