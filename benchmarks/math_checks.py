"""How many answers a second the reward `math` judges with two workers, beside math-verify asked about the same texts.

The mix, of ever new numbers: half integers, a quarter fractions and decimals, a quarter LaTeX (radicals, polynomials,
points, intervals, multiples of pi). Each task is answered four times, two right and two wrong, at the end of some 80
words and in a box; no two answers to a task are the same text. `--bare` asks math-verify in this process, with one
core and no time limit: what a user's own reward would do. `python -m benchmarks.math_checks [--tasks N] [--bare]`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import random
import time
from typing import Any

from rlft.rewards.math import Math
from rlft.types import Sample, Task, Trajectory

WORDS = "First we look at what is given and write it down, with all units, before anything is worked out at all. "
Asked = tuple[str, str, list[tuple[str, bool]]]  # its kind, the right answer, and answers with their verdict


def integer(draw: random.Random) -> Asked:
    n = draw.randint(1000, 99_999)
    return "integer", str(n), [(str(n), True), (f"{n:,}", True), (str(n + 1), False), (str(-n), False)]


def fraction(draw: random.Random) -> Asked:
    above, below = 2 * draw.randint(10, 500) + 1, 2 ** draw.randint(2, 6)
    decimal = f"{above / below}"
    wrong = rf"\frac{{{above + 2}}}{{{below}}}"
    said = [(rf"\frac{{{above}}}{{{below}}}", True), (decimal, True), (wrong, False), (f"1{decimal}", False)]
    return "fraction", f"{above}/{below}", said


def latex(draw: random.Random) -> Asked:
    a, b, c = (draw.randint(2, 60) for _ in range(3))
    right, other, wrong, worse = draw.choice([
        (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{b}}} \cdot {a}", rf"{a}\sqrt{{{b + 1}}}", rf"{a + 1}\sqrt{{{b}}}"),
        (f"x^2+{a}x+{b}", f"{b}+{a}x+x^2", f"x^2+{a + 1}x+{b}", f"x^2-{a}x+{b}"),
        (f"({a}, {b}, {c})", rf"\left({a},{b},{c}\right)", f"({b + 1}, {a}, {c})", f"({a}, {b})"),
        (f"[{a}, {a + b})", rf"\left[{a},{a + b}\right)", f"[{a}, {a + b}]", f"({a}, {a + b})"),
        (rf"\frac{{{a}\pi}}{{{b}}}", rf"{a}\pi/{b}", rf"\frac{{{a}\pi}}{{{b + 1}}}", rf"\frac{{{a}}}{{{b}}}"),
    ])  # fmt: skip
    return "LaTeX", right, [(right, True), (other, True), (wrong, False), (worse, False)]


def asked(tasks: int) -> list[Asked]:
    """The same for the same number of tasks."""
    draw = random.Random(0)
    return [(integer, fraction, integer, latex)[i % 4](draw) for i in range(tasks)]


def groups(some: list[Asked]) -> list[tuple[Trajectory, ...]]:
    """Each task with its four answers."""

    def play(task: Task, said: str) -> Trajectory:
        text = WORDS * 4 + rf"So the answer is $\boxed{{{said}}}$."
        sample = Sample([0, 0], [False, True], [0.0] * 2, [0.0] * 2, version=0)
        return Trajectory(task, ({"role": "assistant", "content": text},), [sample])

    tasks = [Task(f"{i}", (), {"answer": right}) for i, (_, right, _) in enumerate(some)]
    return [tuple(play(task, said) for said, _ in answers) for task, (*_, answers) in zip(tasks, some, strict=True)]


def judged(some: list[Asked]) -> float:
    """Checks a second of the reward; the workers run already. Its verdicts must be right."""
    reward, played = Math(workers=2).build(), groups(some)
    warm = groups([("", "x", [(rf"x+{i}", False) for i in range(8)])])

    async def all_of_them(which: list[tuple[Trajectory, ...]]) -> list[Any]:
        return await asyncio.gather(*(reward(group) for group in which))

    asyncio.run(all_of_them(warm))
    begun = time.perf_counter()
    values = asyncio.run(all_of_them(played))
    seconds = time.perf_counter() - begun
    assert values == [[float(right) for _, right in answers] for *_, answers in some]
    return sum(map(len, played)) / seconds


def bare(some: list[Asked]) -> float:
    """Checks a second of math-verify, asked in this process."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    parse("$1$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
    played, count = groups(some), 0
    begun = time.perf_counter()
    for group in played:
        gold = parse(f"${group[0].task.info['answer']}$", parsing_timeout=None)  # pyright: ignore[reportArgumentType]
        for trajectory in group:
            said = parse(trajectory.completion, parsing_timeout=None)  # pyright: ignore[reportArgumentType]
            verify(gold, said, timeout_seconds=None)
            count += 1
    return count / (time.perf_counter() - begun)


def main() -> None:
    """The whole mix, and each of its kinds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tasks", type=int, default=400)
    parser.add_argument("--bare", action="store_true", help="math-verify alone, too")
    options = parser.parse_args()
    some = asked(options.tasks)
    parts = {"the mix": some} | {kind: [one for one in some if one[0] == kind] for kind, *_ in some}
    for name, part in parts.items():
        alone = f", math-verify alone on one core {bare(part):.0f}" if options.bare else ""
        print(f"{name}: {4 * len(part)} checks, {judged(part):.0f} a second{alone}", flush=True)


if __name__ == "__main__":
    main()
