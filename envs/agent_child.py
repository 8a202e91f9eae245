"""A function as a program: reads its task from stdin, calls the function, and writes its verdict as the last line.

What the function prints goes where errors go, so that nothing is taken for the verdict that is none.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys

from rlft.envs import wire
from rlft.envs.agent_endpoint import paid
from rlft.envs.agent_start import Seat, called, taking
from rlft.envs.custom import load


def main(path: str, options: str) -> None:
    """Run `path` with these options, a JSON object."""
    verdict = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    task, own = wire.read_task(json.load(sys.stdin)), json.loads(options)
    function = load(path, "env.path")
    seat = Seat(*(os.environ[name] for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY", "OPENAI_MODEL")))
    answer = called(function, taking(function, path, own), task, seat, own)
    if inspect.iscoroutine(answer):
        answer = asyncio.run(answer)
    if answer is not None and not isinstance(answer, str):
        paid(answer)  # raises where it is no verdict, as in a thread of the run
    json.dump(answer, verdict)
    verdict.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
