"""What two engines are given to do alike, and how it is measured: each in processes of its own, in turn.

A spec is a list of optimizer steps, each a list of rows (token ids of the prompt and of what was said, a score and the
number of the group), or live prompts to sample from. Each side writes what it took: seconds and trained tokens per
step, its peak of memory less the process after the imports, and the gradient of the last step.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SIDES = ("rlft", "trl")


@dataclass
class Row:
    """Token ids. group: rows of one number share a prompt and are compared; of a pair the better one has score 1."""

    prompt: list[int]
    said: list[int]
    score: float = 1.0
    group: int = 0


@dataclass
class Spec:
    """kind: grpo, sft or dpo. micro: rows per forward pass of TRL; tokens: of ours. live: see trl_side."""

    kind: str
    steps: list[list[Row]]
    micro: int = 64
    tokens: int = 2048
    lr: float = 1e-4
    live: dict[str, Any] | None = None

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Spec:
        """What `write` wrote."""
        read = json.loads(path.read_text())
        return cls(**{**read, "steps": [[Row(**row) for row in step] for step in read["steps"]]})

    @property
    def trained(self) -> int:
        """Tokens that the policy is trained on, in all steps."""
        return sum(len(row.said) for step in self.steps for row in step)


@dataclass
class Outcome:
    """What a side took. peak: bytes. gradient: of the last step as it was taken, one file of safetensors."""

    seconds: list[float]
    tokens: list[int]
    peak: int
    gradient: str
    extra: dict[str, Any] = field(default_factory=dict)


@cache
def model() -> Path:
    """The folder of SmolLM2-135M."""
    from rlft.models import DEFAULT, locate

    return locate(DEFAULT)


def run(side: str, spec: Spec, folder: Path, *options: str) -> Outcome:
    """One side in a process of its own."""
    given, answer = folder / "spec.json", folder / f"{side}.json"
    spec.write(given)
    answer.unlink(missing_ok=True)
    command = [sys.executable, "-m", f"benchmarks.{side}_side", str(given), str(answer), str(model()), *options]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if not answer.exists():
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return Outcome(**json.loads(answer.read_text()))


def paired(spec: Spec, rounds: int, first: int = 1, sides: Sequence[str] = SIDES) -> dict[str, list[Outcome]]:
    """Every side `rounds` times, in turn. first: steps that only warm up."""
    found: dict[str, list[Outcome]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds):
            for side in sides if number % 2 == 0 else reversed(sides):
                outcome = run(side, spec, Path(scratch))
                found[side].append(cut(outcome, first))
    return found


def cut(outcome: Outcome, first: int) -> Outcome:
    """Without the first steps."""
    extra = {name: values[first:] for name, values in outcome.extra.items()}
    return Outcome(outcome.seconds[first:], outcome.tokens[first:], outcome.peak, outcome.gradient, extra)


def same_gradient(spec: Spec) -> dict[str, Any]:
    """Whether both sides did the same: the tokens that each trained on, and the cosine of the last step's gradients."""
    import torch
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as scratch:
        sides = {side: run(side, spec, Path(scratch), "--gradient") for side in SIDES}
        one, other = (load_file(outcome.gradient) for outcome in sides.values())
    if one.keys() != other.keys():
        raise SystemExit(f"the sides train other parameters: {sorted(one.keys() ^ other.keys())[:3]}")
    a, b = (torch.cat([tensors[name].flatten().double() for name in sorted(one)]) for tensors in (one, other))
    ours, theirs = (outcome.tokens for outcome in sides.values())
    return {
        "cosine": float(torch.nn.functional.cosine_similarity(a, b, 0)),
        "norm_ratio": float(a.norm() / b.norm()),
        "same_tokens": ours == theirs,
    }


def ratios(found: dict[str, list[Outcome]]) -> dict[str, Any]:
    """How many times as fast ours is: the median of paired runs, with the least and the most of them."""
    pairs = [
        statistics.median(theirs.seconds) / statistics.median(ours.seconds)
        for ours, theirs in zip(found["rlft"], found["trl"], strict=True)
    ]
    seconds = {side: statistics.median(s for one in runs for s in one.seconds) for side, runs in found.items()}
    return {
        "ratio": statistics.median(pairs),
        "ratio_min": min(pairs),
        "ratio_max": max(pairs),
        **{f"seconds_{side}": value for side, value in seconds.items()},
    }


def mark(name: str = "VmHWM") -> int:
    """This process's high-water mark in bytes, or another line of its status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def forget_peak() -> int:
    """Begin a new high-water mark; the memory that there is now."""
    Path("/proc/self/clear_refs").write_text("5")
    return mark("VmRSS")


def table(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown, one column per key of the first row."""
    names = list(rows[0])
    cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    lines = ["| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names), *cells]]
    return "\n".join([title, "", *lines])
