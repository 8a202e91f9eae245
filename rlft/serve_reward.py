"""Rewards as a service: `rlft serve-reward CONFIG` judges for runs elsewhere, whose reward is `type: remote`.

    POST /score    {"groups": [...]}, as `rlft.rewards.served.wire` writes them: verdicts, metrics and failures of each
    GET  /health   the kind of reward, its terms, and how many groups were judged

What the config says is all that can be asked for: a request brings answers to judge, never a reward.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rlft
from rlft.rewards.base import Config
from rlft.rewards.served import wire
from rlft.settings import load_reward
from rlft.types import InputError, RunError

MALFORMED = (ValueError, KeyError, TypeError, AttributeError)


def serve(
    path: Path, overrides: Sequence[str], host: str, port: int, key_env: str | None, say: Callable[[str], None]
) -> None:
    """Serve the `reward:` block of a config until Ctrl-C. port 0 takes a free one. Raises InputError.

    key_env: the environment variable with the key that requests must bring; None: anybody who reaches the port is
    answered. say: is told where.
    """
    config = load_reward(path, overrides)
    if key_env is not None and not os.environ.get(key_env):
        raise InputError(f"--key-env: the environment variable {key_env} is not set; export it first")
    try:
        import uvicorn
    except ImportError as error:
        raise InputError("serve-reward needs the packages starlette and uvicorn: pip install 'rlft[serve]'") from error
    app = application(config, os.environ.get(key_env or "", ""))
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror}; choose another port") from error
    terms = _terms(config)
    say(f"serving the reward '{config.type}' on http://{host}:{listening.getsockname()[1]}; Ctrl-C ends it")
    if terms:
        say(f"in a run's config, to log its terms:  terms: [{', '.join(terms)}]")
    if key_env is None and host not in ("127.0.0.1", "localhost", "::1"):
        say("whoever reaches this port is answered; --key-env NAME asks for a key")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])


def application(config: Config, key: str = "") -> Any:
    """The service as an ASGI application. key: what requests must bring; "" is none. Raises InputError."""
    try:
        from starlette.applications import Starlette
        from starlette.responses import Response
        from starlette.routing import Route
    except ImportError as error:
        raise InputError("serve-reward needs the packages starlette and uvicorn: pip install 'rlft[serve]'") from error
    if config.by_turn or config.directed:
        raise InputError(
            "reward: what pays turn by turn, or by a task's direction, belongs into the run's own config, around "
            "`type: remote`; serve the reward inside it"
        )
    reward, terms, judged = config.build(wire.NAME), _terms(config), 0

    def reply(status: int, plain: Any) -> Response:
        return Response(json.dumps(plain, ensure_ascii=False), status, media_type="application/json")

    async def health(_: Any) -> Response:
        about = {"reward": config.type, "terms": terms, "judged": judged, "version": rlft.__version__}
        return reply(200, {"status": "ok", **about})

    async def score(request: Any) -> Response:
        nonlocal judged
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key and not hmac.compare_digest(given.encode(), key.encode()):
            return reply(401, {"error": "key", "said": "the key is missing or wrong"})
        try:
            groups = [wire.read(plain) for plain in json.loads(await request.body())["groups"]]
        except MALFORMED as error:
            return reply(400, {"error": "request", "said": f"these are no groups: {type(error).__name__}: {error}"})
        try:
            verdicts = await asyncio.gather(*map(reward, groups))
        except (InputError, RunError) as error:
            return reply(422, {"error": type(error).__name__, "said": str(error)})
        judged += len(groups)
        found = [wire.judgement(group, own) for group, own in zip(groups, verdicts, strict=True)]
        return reply(200, {"groups": found, "terms": terms})

    return Starlette(routes=[Route("/health", health), Route("/score", score, methods=["POST"])])


def _terms(config: Config) -> list[str]:
    """The terms of a sum; none of a reward that is one number."""
    return [name.removeprefix(f"{wire.NAME}/") for name in config.components(wire.NAME) if name != wire.NAME]
