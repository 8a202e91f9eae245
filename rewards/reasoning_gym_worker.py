"""The process in which reasoning-gym scores answers, a line of JSON in, a line of JSON out. Never imported.

It holds the datasets, and forks for each answer a process that closes itself in before it reads the answer: none of the
worker's own streams, no files but the libraries', no network, no other program, so much processor time and memory. What
an answer that is run as Python may do there ends with that process, of which a number from 0 to 1 is heard and no more.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import sys
import sysconfig
import time
from functools import lru_cache
from typing import Any

from rlft.reasoning import library, made, unpack
from rlft.sandbox.jail import kernel, landlock, seccomp
from rlft.sandbox.jail.walls import DEVICES, LIBRARIES

MEMORY = 2 << 30  # bytes of address space, of which the libraries take some 300 MB
MOST = 1 << 16  # bytes of a reply that are read
PIPE = 3  # the only stream of a process that scores
READY = b"\n"  # what it says once it is closed in, before it reads the answer
LONGEST = 1000  # characters of an error
RAISED = {"value": 0.0, "raised": True}


def main(seconds: float) -> None:
    """Answer until nobody asks."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a scorer prints is no reply
    library()
    for line in sys.stdin:
        request = json.loads(line)
        reply = {"number": request["number"], **_judged(request, seconds)}
        print(json.dumps(reply), file=replies, flush=True)


def _judged(request: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The library's verdict. A scorer that raises on this answer, and not on the right one, cannot read it: 0."""
    try:
        dataset, entry = _question(request["kept"])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    verdict = _apart(dataset, entry, request["answer"], seconds)
    if "error" not in verdict:
        return verdict
    # The right answer is judged in a process that has never seen this one, which may say anything.
    right = _apart(dataset, entry, entry["answer"], seconds)
    return right if "error" in right else RAISED


def _apart(dataset: Any, entry: dict[str, Any], answer: str | None, seconds: float) -> dict[str, Any]:
    """The verdict of a process of its own: a value, a timeout, or an error, which the answer may have made up."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            kernel.die_with_parent()
            _let_go(theirs)
            _close_in(seconds)
            os.write(PIPE, READY)
            os.write(PIPE, json.dumps(_score(dataset, entry, answer)).encode())
        os._exit(0)
    os.close(theirs)
    told = _read(ours, 3 * seconds + 1)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(ours)
    if told in (b"", READY) and os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU):
        return {"value": None, "timeout": True}
    if not told.startswith(READY):
        return {"error": "the process of the scorer could not close itself in"}
    return _believed(told)


def _believed(told: bytes) -> dict[str, Any]:
    """What a process that scores said, as far as it may be so. One that ends without a word gives 0."""
    try:
        said = json.loads(told)
    except (ValueError, RecursionError):
        return RAISED
    if not isinstance(said, dict):
        return RAISED
    value = said.get("value")
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:  # so no NaN
        return {"value": float(value)}
    return {"error": str(said["error"])} if "error" in said else RAISED


@lru_cache(maxsize=256)
def _question(kept: str) -> tuple[Any, dict[str, Any]]:
    """The dataset that asked, and the entry."""
    told = json.loads(kept)
    return _dataset(told["dataset"], json.dumps(told["options"], sort_keys=True)), unpack(told["entry"])


@lru_cache(maxsize=128)
def _dataset(name: str, options: str) -> Any:
    return made(name, json.loads(options), 0, 1)


def _score(dataset: Any, entry: dict[str, Any], answer: str | None) -> dict[str, Any]:
    try:
        return {"value": float(dataset.score_answer(answer, entry))}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:LONGEST]}


def _let_go(pipe: int) -> None:
    """Of every stream of the worker's, of which the answer could write into the replies, or read the next request."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.dup2(pipe, PIPE)
    os.closerange(PIPE + 1, max(map(int, os.listdir("/proc/self/fd"))) + 1)


def _close_in(seconds: float) -> None:
    """For this process, for good."""
    for kind, most in (
        (resource.RLIMIT_CPU, -int(-seconds // 1)),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))
    kernel.drop_capabilities()
    kernel.undumpable()
    kernel.no_new_privileges()
    if landlock.abi():
        packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        landlock.restrict([path for path in (*LIBRARIES, *packages, *DEVICES) if os.path.exists(path)], [])
    if seccomp.available():
        seccomp.restrict()


def _read(pipe: int, wall: float) -> bytes:
    """What comes in time, until the other end is closed."""
    told, end = b"", time.monotonic() + wall
    while len(told) < MOST and (left := end - time.monotonic()) > 0 and select.select([pipe], [], [], left)[0]:
        part = os.read(pipe, MOST)
        if not part:
            break
        told += part
    return told


if __name__ == "__main__":
    main(float(sys.argv[1]))
