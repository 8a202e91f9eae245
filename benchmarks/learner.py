"""The learner alone on the same rows as TRL's: GRPO (64-token prompts, 8 answers of 32), SFT and DPO of mixed lengths.

Checks first that both train the same tokens and have the same gradient after two steps, then measures them in turn.
Ours is also held against the rate of plain matrix products (`of_ceiling`), measured before each of its steps.
`python -m benchmarks.learner [--only grpo|sft|dpo] [--rounds N] [--json]`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics

from benchmarks.spec import Row, Spec, paired, ratios, same_gradient, table

WARM, STEPS = 1, 1
SMALL = 4  # how many times fewer rows the check of the gradients has
WORDS = range(100, 49_000)


def said(chance: random.Random, length: int) -> list[int]:
    """Some tokens."""
    return [chance.choice(WORDS) for _ in range(length)]


def mixed(chance: random.Random) -> int:
    """A length between 16 and 512, as often below 90 as above."""
    return round(2 ** chance.uniform(4, 9))


def grpo(chance: random.Random, count: int = 8) -> list[Row]:
    """Groups of 8, each with variance."""
    made = []
    for group in range(count):
        prompt = said(chance, 64)
        made += [Row(prompt, said(chance, 32), chance.random(), group) for _ in range(8)]
    return made


def sft(chance: random.Random, count: int = 16) -> list[Row]:
    """Demonstrations, the first third of each its prompt."""
    lengths = [mixed(chance) for _ in range(count)]
    return [Row(said(chance, n // 3), said(chance, n - n // 3), 1.0, i) for i, n in enumerate(lengths)]


def dpo(chance: random.Random, count: int = 8) -> list[Row]:
    """Pairs."""
    made = []
    for group in range(count):
        prompt = said(chance, mixed(chance) // 3 + 4)
        lengths = [max(12, mixed(chance) - len(prompt)) for _ in range(2)]
        made += [Row(prompt, said(chance, n), score, group) for n, score in zip(lengths, (1.0, 0.0), strict=True)]
    return made


KINDS = {"grpo": (grpo, 8), "sft": (sft, 16), "dpo": (dpo, 8)}
# Rows per forward pass of TRL that measured best here, of 4, 8, 16, 32 and 64.
BEST = {"grpo": 16, "sft": 4, "dpo": 2}


def spec_of(kind: str, steps: int, seed: int = 0, part: int = 1) -> Spec:
    """Steps of fresh rows, so many times fewer of them."""
    (make, count), chance = KINDS[kind], random.Random(seed)
    return Spec(kind, [make(chance, count // part) for _ in range(steps)], BEST[kind], lr=1e-4)


def measure(kind: str, rounds: int) -> dict[str, object]:
    """One line of the table."""
    agreed = same_gradient(spec_of(kind, 3, seed=1, part=SMALL))
    found = paired(spec_of(kind, WARM + STEPS), rounds, WARM)
    ours = [share for one in found["rlft"] for share in one.extra["of_ceiling"]]
    peaks = {f"peak_mib_{side}": max(o.peak for o in runs) / 2**20 for side, runs in found.items()}
    return {"kind": kind, **ratios(found), **agreed, "of_ceiling": statistics.median(ours), **peaks}


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = [measure(kind, asked.rounds) for kind in asked.only]
    print(json.dumps(rows) if asked.json else table("The learner alone, against TRL", rows))


if __name__ == "__main__":
    main()
