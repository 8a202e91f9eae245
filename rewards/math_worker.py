"""The process in which math-verify judges, one line of JSON in, one word out. Started by `math`; never imported.

Its time limit is the kernel's: a timer of processor time whose signal nobody catches, so it ends the process wherever
it is, also inside C code, also when the run that asked is gone. Its memory is limited too, lest a tower of powers take
the machine's. It stands on its own: nothing but math-verify and the standard library is imported.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import resource
import signal
import sys
from typing import Any

MEMORY = 2 << 30  # bytes of address space; judging takes some 60 MB


def main(seconds: float) -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a parser prints is no reply
    logging.disable(logging.CRITICAL)  # math-verify warns that its own time limit is off
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        verdict("1", "1")  # imports, and compiles the patterns, outside the time limit
        print("ready", file=replies, flush=True)
    except Exception as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=replies, flush=True)
        return
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        word = verdict(**json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(word, file=replies, flush=True)


def verdict(gold: str, completion: str) -> str:
    """`equal`, `different`, or `unreadable` where no mathematics is found in the gold answer."""
    from math_verify import parse, verify

    right = read_gold(gold)
    if not right:
        return "unreadable"
    said = parse(completion, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    return "equal" if verify(right, said, timeout_seconds=None) else "different"


@functools.lru_cache(maxsize=64)
def read_gold(gold: str) -> list[Any]:
    """The parsed answer; empty if there is none. A bare answer is put between $ signs, for math-verify would read no
    more than the 3 of 3\\sqrt{2} without them."""
    from math_verify import parse

    marked = re.search(r"(?<!\\)\$|\\boxed|\\\(|\\\[", gold)
    return parse(gold if marked else f"${gold.strip()}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main(float(sys.argv[1]))
