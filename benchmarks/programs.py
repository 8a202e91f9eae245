"""How many programs a second the reward `code` judges in its sandbox, beside bare interpreters that run them unwatched.

The mix: 60 programs, a third each with three asserts on a function, with three inputs of a script, and with one assert
that fails; two at a time. The floor is one bare interpreter for each program, which runs all of its tests, and from
which the program could do as it likes.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlft.rewards.code import Code, run
from rlft.sandbox.cases import cases
from rlft.types import Sample, Task, Trajectory

FUNCTION = "def f(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n"
SCRIPT = "n = int(input())\nprint(sum(i * i for i in range(n)))\n"
MIX: tuple[tuple[str, list[Any]], ...] = (
    (FUNCTION, ["assert f(1) == 1", "assert f(10) == 55", "assert f(90) == 2880067194370816120"]),
    (SCRIPT, [{"input": str(n), "output": str(sum(i * i for i in range(n)))} for n in (1, 100, 10_000)]),
    (FUNCTION, ["assert f(3) == 1"]),
)


def judged(count: int) -> float:
    """Programs per second of the reward."""
    reward = Code(workers=2).build()
    groups = []
    for i in range(count):
        program, tests = MIX[i % len(MIX)]
        sample = Sample([0, 0], [False, True], [0.0] * 2, [0.0] * 2, version=0)
        groups.append(
            (Trajectory(Task(f"{i}", (), {"tests": tests}), ({"role": "assistant", "content": program},), [sample]),)
        )

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(reward(group) for group in groups))

    begun = time.perf_counter()
    values = asyncio.run(all_of_them())
    seconds = time.perf_counter() - begun
    assert [value for (value,) in values] == [[1.0, 1.0, 0.0][i % 3] for i in range(count)]
    return count / seconds


def bare(count: int) -> float:
    """Programs per second of interpreters that nobody watches."""

    def one(i: int) -> None:
        program, tests = MIX[i % len(MIX)]
        for given in [test["input"] for test in tests] if isinstance(tests[0], dict) else [None]:
            whole = program if given is not None else "\n".join([program, *tests])
            subprocess.run([sys.executable, "-I", "-S", "-c", whole], input=given, text=True, capture_output=True)

    begun = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(count)))
    return count / (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="programs in one round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    tests = cases(Task("0", (), {"tests": MIX[0][1]}), "tests")
    print("walls:", ", ".join(run(FUNCTION, tests).walls))
    rounds = [(judged(options.count), bare(options.count)) for _ in range(options.rounds)]
    for ours, floor in rounds:
        print(f"sandbox {ours:6.1f} programs/s    bare {floor:6.1f} programs/s    ratio {ours / floor:.2f}")


if __name__ == "__main__":
    main()
