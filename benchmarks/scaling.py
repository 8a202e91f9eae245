"""Cost grows as the work: seconds per trained token and peak memory of the learner, by samples a step and by length.

Samples: 8 to 512 answers of 32 tokens. Length: 16 answers of 32 to 512. Memory: one forward and backward pass over all
rows at once, so that nothing hides it, of 1 to 8 thousand tokens. Prompts of 16 tokens, 8 answers each. Each point is a
process of its own, and the points of a series come in turn, `--rounds` times. `--plot FILE` draws them (needs
matplotlib). `python -m benchmarks.scaling [--rounds N] [--json] [--plot FILE]`.
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

SERIES = {
    "samples": [(8, 32), (32, 32), (128, 32), (512, 32)],
    "length": [(16, 32), (16, 128), (16, 256), (16, 512)],
    "memory": [(32, 32), (64, 32), (128, 32), (256, 32)],
}
BUDGET = 2048


def spec_of(count: int, length: int, whole: bool) -> Spec:
    """Two steps, the first to warm up. whole: all rows in one forward pass."""
    chance = random.Random(0)
    steps = []
    for _ in range(2):
        rows: list[Row] = []
        for group in range(count // 8):
            prompt = said(chance, 16)
            rows += [Row(prompt, said(chance, length), chance.random(), group) for _ in range(8)]
        steps.append(rows)
    return Spec("grpo", steps, tokens=10**6 if whole else BUDGET)


def measure(rounds: int) -> list[dict[str, Any]]:
    """A line per point."""
    found: dict[tuple[str, int, int], list[tuple[float, int]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(rounds):
            for name, points in SERIES.items():
                for count, length in points:
                    outcome = run("rlft", spec_of(count, length, name == "memory"), Path(scratch), "--give-back")
                    each = outcome.seconds[-1] / outcome.tokens[-1]
                    found.setdefault((name, count, length), []).append((each, outcome.peak))
    first = {name: statistics.median(s for s, _ in found[(name, *points[0])]) for name, points in SERIES.items()}
    return [
        {
            "series": name,
            "samples": count,
            "length": length,
            "tokens": count * length,
            "ms_per_token": 1e3 * statistics.median(s for s, _ in taken),
            "to_first": statistics.median(s for s, _ in taken) / first[name],
            "peak_mib": statistics.median(p for _, p in taken) / 2**20,
        }
        for (name, count, length), taken in found.items()
    ]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The three series side by side."""
    try:
        import matplotlib.pyplot as plt  # pyright: ignore[reportMissingModuleSource, reportMissingImports]
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: .venv/bin/python -m pip install matplotlib") from error

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    shown = (("samples", "samples", "samples a step"), ("length", "length", "tokens of an answer"))
    for axis, (name, key, label) in zip(axes, shown, strict=False):
        some = [row for row in rows if row["series"] == name]
        axis.plot([row[key] for row in some], [row["ms_per_token"] for row in some], marker="o", color="#31688e")
        base = some[0]["ms_per_token"]
        axis.axhspan(0.85 * base, 1.15 * base, color="#31688e", alpha=0.12, label="15% around the first")
        axis.set(
            xscale="log",
            xlabel=label,
            ylabel="ms per trained token",
            ylim=(0, 1.6 * base),
            xticks=[row[key] for row in some],
        )
        axis.set_xticklabels([row[key] for row in some])
        axis.minorticks_off()
        axis.legend(frameon=False, loc="lower right")
    some = [row for row in rows if row["series"] == "memory"]
    tokens, logits = [row["tokens"] for row in some], 49_152 * 4 / 2**20
    axes[2].plot(tokens, [row["peak_mib"] for row in some], marker="o", color="#31688e", label="peak of one pass")
    axes[2].plot(
        tokens, [2 * logits * n for n in tokens], color="#999999", ls="--", label="logits and their gradient alone"
    )
    highest = 1.25 * max(row["peak_mib"] for row in some)
    axes[2].set(xlabel="trained tokens in one pass", ylabel="MiB", ylim=(0, highest), xlim=(0, None))
    axes[2].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path)
    asked = parser.parse_args()
    rows = measure(asked.rounds)
    if asked.plot is not None:
        draw(rows, asked.plot)
    print(json.dumps(rows) if asked.json else table("Cost by the work", rows))


if __name__ == "__main__":
    main()
