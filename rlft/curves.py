"""What runs learned, as a picture: the mean reward of each step, and held-out accuracy with its 95% interval."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlft.types import InputError
from rlft.whole import replacing

INSTALL = "pip install 'rlft[plots]'"
ACCURACY = "eval/accuracy"


def draw(runs: Sequence[Path], to: Path) -> Path:
    """Write the curves of runs beside each other; the file's ending says how (.png, .svg, .pdf). Raises InputError."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # pyright: ignore[reportMissingImports]
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"plot needs a package that is not installed ({error}): {INSTALL}") from error

    figure = Figure(figsize=(10, 4), layout="constrained")
    kinds = FigureCanvasAgg(figure).get_supported_filetypes()
    if to.suffix.removeprefix(".") not in kinds:
        raise InputError(f"--to: {to} ends in {to.suffix or 'nothing'}, and can end in {', '.join(sorted(kinds))}")
    left, right = figure.subplots(1, 2)
    for run in runs:
        rows = read(run)
        left.plot(*series(rows, "reward/mean"), label=run.name)
        steps, middle = series(rows, ACCURACY)
        low, high = (series(rows, f"{ACCURACY}_{side}")[1] for side in ("low", "high"))
        if len(low) == len(high) == len(middle):
            sides = [
                [m - a for m, a in zip(middle, low, strict=True)],
                [b - m for m, b in zip(middle, high, strict=True)],
            ]
            right.errorbar(steps, middle, sides, marker="o", capsize=3, label=run.name)
        else:  # of a run before there were intervals
            right.plot(steps, middle, marker="o", label=run.name)
    left.set(xlabel="step", title="mean reward in training")
    right.set(xlabel="step", title="held-out accuracy, 95% intervals", ylim=(0, 1))
    for panel in (left, right):
        panel.xaxis.get_major_locator().set_params(integer=True)  # there is no half step
        panel.grid(alpha=0.3)
        panel.legend()
    to.parent.mkdir(parents=True, exist_ok=True)
    with replacing(to) as scratch:
        figure.savefig(scratch, format=to.suffix.removeprefix("."), dpi=120)
    return to


def read(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics. Raises InputError."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise InputError(f"{run} holds no metrics.jsonl; name the folder of a run that has begun")
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise InputError(f"{path} does not read: {error}. If the run is being written, try again") from error


def series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """The steps that have a finite number of that name, and the numbers; of a step taken again, the later one."""
    found = {row["step"]: float(row[name]) for row in rows if isinstance(row.get(name), int | float)}
    steps = sorted(step for step, value in found.items() if math.isfinite(value))
    return [float(step) for step in steps], [found[step] for step in steps]
