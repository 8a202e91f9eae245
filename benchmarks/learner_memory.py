"""Peak memory of the learner alone against TRL's: recorded answers of 512 tokens, 8 to a prompt, micro-batches equal.

The high-water mark of the process less what it has after the imports, the model included in it. Ours once as it is by
default (`memory.keep`) and once with memory given back; beside it what a whole step takes, sampling included, is in
docs/memory.md. `python -m benchmarks.learner_memory [--json]`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.learner import said
from benchmarks.spec import Row, Spec, run, table

PROMPT, ANSWER, SIZE = 64, 512, 8


def spec() -> Spec:
    """Two steps of one group; all of it in one forward pass on both sides."""
    chance = random.Random(0)
    steps = []
    for _ in range(2):
        prompt = said(chance, PROMPT)
        steps.append([Row(prompt, said(chance, ANSWER), chance.random(), 0) for _ in range(SIZE)])
    return Spec("grpo", steps, micro=SIZE, tokens=SIZE * (PROMPT + ANSWER))


def measure() -> list[dict[str, Any]]:
    """A line per side."""
    found = []
    sides = (("TRL", "trl", ()), ("rlft", "rlft", ()), ("rlft, memory.keep=false", "rlft", ("--give-back",)))
    with tempfile.TemporaryDirectory() as scratch:
        for name, side, options in sides:
            outcome = run(side, spec(), Path(scratch), *options)
            found.append((name, outcome.peak / 2**20, statistics.median(outcome.seconds)))
    whole = found[0][1]
    return [{"side": name, "peak_mib": peak, "share": peak / whole, "seconds": s} for name, peak, s in found]


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = measure()
    print(json.dumps(rows) if asked.json else table("Peak memory of the learner", rows))


if __name__ == "__main__":
    main()
