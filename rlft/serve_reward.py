"""Rewards as a service: `rlft serve-reward CONFIG` judges for runs elsewhere, whose reward is `type: remote`.

    POST /score    {"groups": [...]}, as `rlft.rewards.served.wire` writes them: verdicts, metrics and failures of each
    GET  /health   the kind of reward, its terms, and how many groups were judged

What the config says is all that can be asked for: a request brings answers to judge, never a reward.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rlft
from rlft.listening import admitted, key_of, listen, refuse_lacking
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
    app = application(config, key_of(key_env))
    terms = _terms(config)

    def about(url: str) -> list[str]:
        first = f"serving the reward '{config.type}' on {url}; Ctrl-C ends it"
        return [first, *([f"in a run's config, to log its terms:  terms: [{', '.join(terms)}]"] if terms else [])]

    listen(app, host, port, key_env is None, say, about)


def application(config: Config, key: str = "") -> Any:
    """The service as an ASGI application. key: what requests must bring; "" is none. Raises InputError."""
    refuse_lacking("serve-reward")
    from starlette.applications import Starlette
    from starlette.responses import Response
    from starlette.routing import Route

    if config.by_turn or config.directed or config.by_step:
        raise InputError(
            "reward: what pays turn by turn, by a task's direction or by the step belongs into the run's own config, "
            "around `type: remote`; serve the reward inside it"
        )
    reward, terms, judged = config.build(wire.NAME), _terms(config), 0

    def reply(status: int, plain: Any) -> Response:
        return Response(json.dumps(plain, ensure_ascii=False), status, media_type="application/json")

    async def health(_: Any) -> Response:
        about = {"reward": config.type, "terms": terms, "judged": judged, "version": rlft.__version__}
        return reply(200, {"status": "ok", **about})

    async def score(request: Any) -> Response:
        nonlocal judged
        if not admitted(request, key):
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
