"""What each cut of the learner saves: the same GRPO step with all of them, and with each left out in turn.

8 groups of 8 answers of 32 tokens to prompts of 64; for the dropped rows, a batch of which half the groups have no
variance. The gradient must stay what it is (`cosine`). `times` is how many times as long the step takes without the
cut, medians of paired rounds; seconds are those of this process's CPU, which a busy machine disturbs less.
`python -m benchmarks.cuts [--rounds N] [--json]`.
"""

from __future__ import annotations

import rlft  # noqa: F401  (first: it says how torch's threads wait)

# isort: split
import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from peft.tuners.lora.layer import Linear

import rlft.kernels as kernels
from benchmarks.learner import grpo
from benchmarks.rlft_side import ADAPTER, groups
from benchmarks.spec import model, table
from rlft.algorithms.catalog.group import Grpo
from rlft.batch import Batch
from rlft.fused import FusedLinear
from rlft.kernels import keep_memory
from rlft.learner import Learner
from rlft.packing import Ways
from rlft.policy import Policy
from rlft.schedule import Schedule

Cut = Callable[[Learner], AbstractContextManager[Any]]


@contextmanager
def _peft(learner: Learner) -> Iterator[None]:
    layers = [part for part in learner.policy.model.modules() if type(part) is FusedLinear]
    for layer in layers:
        layer.__class__ = Linear  # pyright: ignore[reportAttributeAccessIssue]
    yield
    for layer in layers:
        layer.__class__ = FusedLinear


def _ways(ways: Ways) -> Cut:
    return lambda learner: patch.object(learner.forward, "_measured", lambda model: ways)


@contextmanager
def _padded(learner: Learner) -> Iterator[None]:
    with _ways(Ways())(learner), patch.object(learner.forward, "shares", False):
        yield


CUTS: dict[str, Cut] = {
    "all": lambda learner: nullcontext(),
    "prompts once, rows packed": _padded,
    "prompts once": _ways(Ways(packs=True)),
    "attention by segments": _ways(Ways(packs=True, shares=True)),
    "layer and adapter as one": _peft,
    "oneDNN's products": lambda learner: patch.object(kernels, "AVAILABLE", False),
    "no matrix of logits": lambda learner: patch.object(learner.forward, "_plain", lambda model: None),
}


def batch(learner: Learner, informative: int = 8) -> Batch:
    """A step's rows with the engine's log-probs. informative: groups with variance."""
    rows = grpo(random.Random(0))
    for row in rows:
        row.score = row.score if row.group < informative else 0.5
    made = Batch.of(groups(rows, sampled=True))
    return made.with_(logprobs=learner.logprobs(made))


def timed(learner: Learner, rows: Batch, algorithm: Any) -> tuple[float, torch.Tensor]:
    """CPU seconds of the gradient, and the gradient."""
    begun = time.process_time()
    found = learner.gradients(rows, algorithm)
    return time.process_time() - begun, torch.cat([g.flatten() for g in found.values()]).double()


def measure(rounds: int) -> list[dict[str, Any]]:
    """A line per cut."""
    keep_memory()
    policy = Policy(model(), ADAPTER, device="cpu", dtype="float32")
    torch.manual_seed(0)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.add_(torch.randn_like(p) * 0.01)
    learner, algorithm = Learner(policy, Schedule(lr=1e-4, steps=1)), Grpo().build()
    rows, half = batch(learner), batch(learner, 4)
    unknown = rows.with_(logprobs=torch.full_like(rows.logprobs, torch.nan))
    given = {name: (cut, rows, algorithm) for name, cut in CUTS.items()}
    given["the engine's log-probs as the old ones"] = (CUTS["all"], unknown, algorithm)
    given["half"] = (CUTS["all"], half, algorithm)
    given["rows without advantage dropped"] = (CUTS["all"], half, replace(algorithm, dense=True))
    seconds: dict[str, list[float]] = {name: [] for name in given}
    slopes: dict[str, torch.Tensor] = {}
    timed(learner, rows, algorithm)  # warms up
    for _ in range(rounds):
        for name, (cut, some, what) in given.items():
            with cut(learner):
                spent, slopes[name] = timed(learner, some, what)
            seconds[name].append(spent)
    found = []
    for name in given:
        base = "half" if name.startswith("rows without") else "all"
        if name in ("all", "half"):
            continue
        times = [b / a for a, b in zip(seconds[base], seconds[name], strict=True)]
        cosine = float(torch.nn.functional.cosine_similarity(slopes[base], slopes[name], 0))
        found.append(
            {
                "without": name,
                "times": statistics.median(times),
                "cpu_seconds": statistics.median(seconds[name]),
                "with_it": statistics.median(seconds[base]),
                "cosine": round(cosine, 8),
            }
        )
    return found


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found = measure(asked.rounds)
    print(json.dumps(found) if asked.json else table("A step without each cut", found))


if __name__ == "__main__":
    main()
