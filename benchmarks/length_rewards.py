"""What the rewards for length are worth, drawn from the rewards themselves for docs/rewards-shaping.md.

Needs matplotlib. `python -m benchmarks.length_rewards FILE`.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rlft.rewards.catalog import RewardConfig
from rlft.types import Sample, Task, Trajectory

NUMBER = {"type": "number"}
LIMIT = 1000
RIGHT, WRONG, PLAIN = "#31688e", "#d1603d", "#777777"


def said(text: str, tokens: int) -> Trajectory:
    """A recorded answer to "7 + 5", of so many tokens."""
    zeros = [0.0] * tokens
    sample = Sample([0] * tokens, [True] * tokens, zeros, list(zeros), version=-1)
    return Trajectory(Task("t", (), {"answer": 12}), ({"role": "assistant", "content": text},), [sample])


def worth(config: dict[str, Any], *group: Trajectory) -> list[float | None]:
    """The reward's verdicts on a group."""
    reward = TypeAdapter(RewardConfig).validate_python(config).build()  # pyright: ignore[reportAttributeAccessIssue]
    return list(asyncio.run(reward(group)))


def draw(path: Path) -> None:
    """The three panels side by side."""
    try:
        import matplotlib.pyplot as plt  # pyright: ignore[reportMissingModuleSource, reportMissingImports]
    except ImportError as error:
        raise SystemExit("it needs matplotlib: .venv/bin/python -m pip install matplotlib") from error
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    lengths = range(0, 1201, 5)
    cosine = {"type": "cosine", "of": NUMBER, "limit": LIMIT}
    overlong = {"type": "overlong", "limit": LIMIT, "margin": 400}
    for config, text, label, colour in (
        (cosine, "12", "cosine, right", RIGHT),
        (cosine, "13", "cosine, wrong", WRONG),
        (overlong, "12", "overlong, margin 400", PLAIN),
    ):
        values = worth(config, *(said(text, n) for n in lengths))
        dashed = {"ls": "--"} if colour == PLAIN else {}
        axes[0].plot(list(lengths), values, label=label, color=colour, **dashed)
    axes[0].set(xlabel=f"tokens; the limit is {LIMIT}", ylabel="value")
    group = [100 + 10 * i for i in range(91)]
    for text, label, colour in (("12", "right", RIGHT), ("13", "wrong", WRONG)):
        values = worth({"type": "relative_length", "of": NUMBER}, *(said(text, n) for n in group))
        axes[1].plot(group, values, label=f"relative_length, {label}", color=colour)
    axes[1].set(xlabel="tokens; the group has 100 to 1000")
    budgets = range(0, 601, 5)
    for mode, colour in (("exact", RIGHT), ("most", WRONG)):
        config = {"type": "thinking", "budget": 300, "scale": 0.003, "mode": mode, "unit": "characters"}
        values = worth(config, *(said(f"<think>{'x' * n}</think>12", n) for n in budgets))
        axes[2].plot(list(budgets), values, label=f"thinking, mode: {mode}", color=colour)
    axes[2].set(xlabel="length of the thinking; the budget is 300")
    for axis in axes:
        axis.legend(frameon=False, fontsize=8)
        axis.axhline(0, color="#dddddd", lw=0.8, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Draw into the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path)
    draw(parser.parse_args().file)


if __name__ == "__main__":
    main()
