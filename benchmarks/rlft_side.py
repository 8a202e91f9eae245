"""Our side of a comparison: a learner on a spec's recorded rows, in this process."""

from __future__ import annotations

import rlft  # noqa: F401  (first: it says how torch's threads wait)

# isort: split
import json
import sys
import time
from pathlib import Path

from safetensors.torch import save_file
from torch.nn.utils import get_total_norm

from benchmarks.spec import Outcome, Row, Spec, forget_peak, mark
from benchmarks.work import Shape, ceiling, useful
from rlft.algorithms.catalog.group import Grpo
from rlft.algorithms.catalog.imitation import Sft
from rlft.algorithms.catalog.preference import Dpo
from rlft.batch import Batch
from rlft.kernels import give_memory_back, keep_memory
from rlft.learner import Learner
from rlft.policy import Policy
from rlft.schedule import Schedule
from rlft.types import NAN, Group, Sample, Task, Trajectory

ADAPTER = {"type": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
ALGORITHMS = {"grpo": Grpo, "sft": Sft, "dpo": Dpo}


def groups(step: list[Row], sampled: bool) -> list[Group]:
    """The rows of an optimizer step as the learner takes them."""
    found: dict[int, list[Trajectory]] = {}
    for row in step:
        mask = [False] * len(row.prompt) + [True] * len(row.said)
        logprobs = [NAN] * len(mask)
        sample = Sample(row.prompt + row.said, mask, logprobs, [0.0] * len(mask), 0 if sampled else -1)
        found.setdefault(row.group, []).append(Trajectory(Task("x", ()), (), [sample], score=row.score))
    return [tuple(group) for group in found.values()]


def main() -> None:
    """SPEC ANSWER MODEL [--gradient] [--give-back]"""
    given, answer, path = sys.argv[1:4]
    spec = Spec.read(Path(given))
    before = forget_peak()
    (give_memory_back if "--give-back" in sys.argv else keep_memory)()
    policy = Policy(Path(path), ADAPTER, device="cpu", dtype="float32")
    schedule = Schedule(lr=spec.lr, steps=len(spec.steps), micro_tokens=spec.tokens, packing="auto")
    learner = Learner(policy, schedule)
    algorithm = ALGORITHMS[spec.kind]().build()
    seconds, tokens, shares = [], [], []
    shape = Shape.of(policy.causal_lm.config)
    for i, step in enumerate(spec.steps):
        batch = Batch.of(algorithm.select(groups(step, sampled=spec.kind == "grpo")))
        if spec.kind == "grpo":  # as the engine that samples gives them: not a part of the learner's work
            batch = batch.with_(logprobs=learner.logprobs(batch))
        if "--gradient" in sys.argv and i == len(spec.steps) - 1:
            found = learner.gradients(batch, algorithm)
            scale = min(1.0, schedule.max_grad_norm / float(get_total_norm(found.values())))  # clipped, as TRL's is
            save_file({name: grad.mul(scale).contiguous() for name, grad in found.items()}, f"{answer}.gradient")
            tokens.append(int(batch.mask.sum()))
            break
        most = max(ceiling(shape, 1024).values())
        begun = time.perf_counter()
        metrics = learner.update(batch, algorithm)
        seconds.append(time.perf_counter() - begun)
        passes = 1.5 if spec.kind == "dpo" else 1.0  # and a forward pass of the reference
        shares.append(passes * useful(step, shape) / seconds[-1] / most)
        tokens.append(int(metrics["tokens/trained"]))
    outcome = Outcome(seconds, tokens, mark() - before, f"{answer}.gradient", {"of_ceiling": shares})
    Path(answer).write_text(json.dumps(vars(outcome)))


if __name__ == "__main__":
    main()
