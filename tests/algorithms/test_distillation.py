"""Distillation: divergences in loops over the vocabulary, and a policy that comes to agree with its teacher."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from rlft.algorithms import catalog
from rlft.algorithms.base import Algorithm, Outputs, merge
from rlft.algorithms.losses import distillation
from rlft.batch import Batch
from rlft.build import assemble
from rlft.learner import Learner, Schedule
from rlft.material import material
from rlft.policy import Policy
from rlft.settings import validate
from rlft.trainer import Run, train
from rlft.types import NAN, Group, Sample, Task, Trajectory

Filled = Callable[..., Batch]
MakeGroups = Callable[..., list[Group]]
READ = TypeAdapter(catalog.AlgorithmConfig)
VOCAB = 7
LORA: dict[str, Any] = {"type": "lora", "r": 8, "target_modules": "all-linear"}


def build(**knobs: Any) -> Algorithm:
    return READ.validate_python(knobs).build()


def noise(*shape: int, seed: int = 0, scale: float = 1.5) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(batch: Batch, logits: Tensor, teacher: Tensor) -> Outputs:
    zeros = torch.zeros(batch.mask.shape, dtype=torch.float64)
    return Outputs(zeros, zeros, logits=logits, teacher_logits=teacher)


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in logits)
    return [math.exp(x) / total for x in logits]


def jsd(logits: list[float], teacher: list[float], beta: float, temperature: float) -> float:
    """Agarwal et al. 2023, eq. 1: beta KL(P || beta P + (1 - beta) Q) + (1 - beta) KL(Q || ...), P the teacher."""
    q, p = softmax([x / temperature for x in logits]), softmax([x / temperature for x in teacher])
    if beta == 0:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    if beta == 1:
        return sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    first = sum(a * math.log(a / c) for a, c in zip(p, m, strict=True))
    second = sum(b * math.log(b / c) for b, c in zip(q, m, strict=True))
    return beta * first + (1 - beta) * second


# --- whole distributions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_generalized_jsd_in_loops(make_groups: MakeGroups, filled: Filled, beta: float, temperature: float) -> None:
    batch = filled(make_groups(2, 3, seed=1))
    n = int(batch.mask.sum())
    logits, teacher = noise(n, VOCAB), noise(n, VOCAB, seed=1)
    loss, metrics = distillation.generalized_jsd(beta, temperature)(outputs(batch, logits, teacher), batch)
    value, gap = 0.0, 0.0
    for k, (i, j) in enumerate(batch.mask.nonzero().tolist()):
        pair = logits[k].tolist(), teacher[k].tolist()
        value += float(batch.weights[i, j]) * jsd(*pair, beta, temperature)
        gap += jsd(*pair, 1.0, temperature) / n
    assert float(loss) == pytest.approx(value, rel=1e-9)
    assert metrics["kl/teacher"].value == pytest.approx(gap, rel=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_generalized_jsd_gradcheck(make_groups: MakeGroups, filled: Filled, beta: float) -> None:
    batch = filled(make_groups(1, 2, seed=3, longest=3))
    n = int(batch.mask.sum())
    loss, teacher = distillation.generalized_jsd(beta), noise(n, VOCAB, seed=1)
    logits = noise(n, VOCAB).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(outputs(batch, x, teacher), batch)[0], (logits,))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_agreement_costs_nothing_and_moves_nothing(make_groups: MakeGroups, filled: Filled, beta: float) -> None:
    batch = filled(make_groups(1, 2))
    logits = noise(int(batch.mask.sum()), VOCAB).requires_grad_()
    loss, _ = distillation.generalized_jsd(beta)(outputs(batch, logits, logits.detach() + 3.0), batch)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-12)
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-12


def test_trap_40_distributions_far_apart_stay_finite(make_groups: MakeGroups, filled: Filled) -> None:
    batch = filled(make_groups(1, 2))
    n = int(batch.mask.sum())
    for beta in (0.0, 0.5, 1.0):
        logits = (200 * torch.eye(VOCAB)[torch.arange(n) % VOCAB]).double().requires_grad_()
        teacher = 200 * torch.eye(VOCAB)[(torch.arange(n) + 1) % VOCAB].double()
        loss, _ = distillation.generalized_jsd(beta)(outputs(batch, logits, teacher), batch)
        loss.backward()
        assert torch.isfinite(loss)
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()


def test_the_jsd_adds_over_micro_batches_and_trap_18_reads_nothing_outside_the_mask(
    make_groups: MakeGroups, filled: Filled
) -> None:
    batch = filled(make_groups(3, 4))
    n = int(batch.mask.sum())
    logits, teacher = noise(n, VOCAB), noise(n, VOCAB, seed=1)
    loss = distillation.generalized_jsd(0.5)
    whole, metrics = loss(outputs(batch, logits, teacher), batch)
    owner = batch.mask.nonzero()[:, 0]
    total, parts = 0.0, []
    for rows in torch.randperm(12, generator=torch.Generator().manual_seed(0)).split(5):
        part = batch.rows(rows)
        mine = torch.cat([(owner == row).nonzero().flatten() for row in rows])
        value, seen = loss(outputs(part, logits[mine], teacher[mine]), part)
        total += float(value)
        parts.append(seen)
    assert total == pytest.approx(float(whole), rel=1e-12)
    assert merge(parts)["kl/teacher"].value == pytest.approx(metrics["kl/teacher"].value)


# --- chosen tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [0.0, 0.4])
def test_toward_teacher_in_loops(make_groups: MakeGroups, filled: Filled, reward: float) -> None:
    batch = filled(make_groups(3, 4))
    batch = batch.with_(teacher_logprobs=torch.where(batch.mask, batch.logprobs + noise(*batch.mask.shape), torch.nan))
    found = distillation.toward_teacher(batch, 0.7, reward).advantages
    for i in range(len(batch)):
        mates = batch.scores[batch.group == batch.group[i]]
        centred = float(batch.scores[i] - mates.mean())
        for j in range(batch.mask.shape[1]):
            wanted = 0.0
            if batch.mask[i, j]:
                wanted = 0.7 * float(batch.teacher_logprobs[i, j] - batch.logprobs[i, j]) + reward * centred
            assert float(found[i, j]) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_its_expectation_is_the_gradient_of_the_reverse_kl() -> None:
    """One token, all of the vocabulary weighed by its probability, against autograd of the exact KL."""
    logits, teacher = noise(VOCAB).requires_grad_(), noise(VOCAB, seed=1).log_softmax(-1)
    own = logits.log_softmax(-1)
    (wanted,) = torch.autograd.grad((own.exp() * (own - teacher)).sum(), logits, retain_graph=True)
    sample = [Trajectory(Task("t", ()), (), [Sample([3, v], [False, True], [NAN, 0.0], [0.0, 0.0], 0)], score=0.0)
              for v in range(VOCAB)]  # fmt: skip
    batch = Batch.of([tuple(sample)])

    def column(values: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(values), values], 1)

    batch = batch.with_(
        logprobs=column(own.detach()), teacher_logprobs=column(teacher), weights=column(own.detach().exp())
    )
    credited = distillation.toward_teacher(batch)
    loss, metrics = distillation.sampled_reverse_kl(Outputs(column(own), column(own.detach())), credited)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert metrics["kl/teacher"].value == pytest.approx(float((own - teacher).mean().detach()))


# --- entries ---------------------------------------------------------------------------------------------------------


def test_entries_say_what_they_need() -> None:
    for name in ("on_policy_distillation", "gkd"):
        assert READ.validate_python({"type": name}).teacher
    assert build(type="gkd").distributions
    assert build(type="gkd").needs == ()
    assert build(type="on_policy_distillation").needs == ("teacher_logprobs",)
    plain, paid = (READ.validate_python({"type": "on_policy_distillation", "reward": r}) for r in (0.0, 0.5))
    assert (plain.source, plain.group_size_min, paid.group_size_min) == ("rollouts", 1, 2)


@pytest.mark.parametrize("knobs", [{"type": "gkd", "beta": 1.1}, {"type": "gkd", "temperature": 0.0},
                                   {"type": "on_policy_distillation", "coefficient": 0.0}])  # fmt: skip
def test_wrong_knobs_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        READ.validate_python(knobs)


# --- small real runs -------------------------------------------------------------------------------------------------

PROMPTS = torch.tensor([[5, 6, 7], [8, 9, 10]])


def teacher_of(path: Path) -> torch.nn.Module:
    """The policy's model, moved some way."""
    model = Policy(path, None, device="cpu").causal_lm
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * p.std() * torch.randn(p.shape, generator=generator) if p.ndim > 1 else 0.0
    return model.eval().requires_grad_(False)


@torch.no_grad()
def gap(policy: Policy, teacher: torch.nn.Module) -> float:
    """The exact KL(policy || teacher) of the first token after each prompt."""
    policy.model.eval()
    own, other = (m(input_ids=PROMPTS).logits[:, -1].double().log_softmax(-1) for m in (policy.model, teacher))
    return float((own.exp() * (own - other)).sum(-1).mean())


@torch.no_grad()
def sampled(policy: Policy, count: int, length: int, generator: torch.Generator) -> list[Group]:
    """Groups of samples of the policy, with their log-probs."""
    policy.model.eval()
    groups = []
    for prompt in PROMPTS:
        tokens = prompt.repeat(count, 1)
        logprobs = torch.full(tokens.shape, NAN)
        for _ in range(length):
            each = policy.model(input_ids=tokens).logits[:, -1].log_softmax(-1)
            drawn = torch.multinomial(each.exp(), 1, generator=generator)
            tokens, logprobs = torch.cat([tokens, drawn], 1), torch.cat([logprobs, each.gather(1, drawn)], 1)
        mask = [False] * 3 + [True] * length
        rows = zip(tokens.tolist(), logprobs.tolist(), strict=True)
        zeros = [0.0] * len(mask)
        samples = [Sample(row, list(mask), known, list(zeros), 0) for row, known in rows]
        groups.append(tuple(Trajectory(Task("t", ()), (), [sample], score=0.0) for sample in samples))
    return groups


class Seen:
    """Hooks that keep what a step trained on, and its metrics."""

    chosen: list[Group]
    metrics: dict[str, float]

    async def before(self, start: int) -> None: ...

    async def after(self, step: int, groups: list[Group], chosen: list[Group], metrics: dict[str, float]) -> None:
        self.chosen, self.metrics = chosen, metrics

    async def finish(self, step: int, stopped: bool) -> None: ...


def test_gkd_on_samples_and_recorded_answers_in_one_run(tiny_model: Path, tmp_path: Path) -> None:
    """Each group ends with its task's own answer, and the loss is that of both kinds apart, 0.25 to 0.75."""
    said = ["one two", "three", "four five six", "seven"]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {i}", "completion": x}) + "\n" for i, x in enumerate(said)))
    config = validate({
        "name": "both", "steps": 1, "model": {"path": str(tiny_model)}, "teacher": {"path": str(tiny_model)},
        "adapter": {**LORA, "lora_alpha": 16}, "data": {"train": str(rows)}, "algorithm": {"type": "gkd", "own": 0.25},
        "rollout": {"engine": {"type": "local"}, "tasks_per_step": 2, "group_size": 2, "sampling": {"max_tokens": 4}},
    })  # fmt: skip
    seen, teacher = Seen(), teacher_of(tiny_model)

    async def run() -> None:
        parts = assemble(material(config), None)
        parts.learner.teacher = teacher
        try:
            await train(Run(1, parts.source, parts.material.algorithm, parts.learner, parts.serve, seen))
        finally:
            await parts.close()

    asyncio.run(run())
    assert [[t.drawn for t in group] for group in seen.chosen] == [[0, 0, 1]] * 2
    learner = Learner(Policy(tiny_model, LORA, device="cpu"), Schedule(lr=0.0, steps=4), teacher=teacher)
    kinds = [[tuple(t for t in group if bool(t.drawn) is kind) for group in seen.chosen] for kind in (False, True)]
    own, recorded = (learner.update(Batch.of(groups), build(type="gkd"))["loss/total"] for groups in kinds)
    assert own != pytest.approx(recorded, rel=1e-3)
    assert seen.metrics["loss/total"] == pytest.approx(0.25 * own + 0.75 * recorded, rel=1e-4)


def test_gkd_on_both_asks_for_recorded_answers() -> None:
    both, samples = READ.validate_python({"type": "gkd", "own": 0.5}), READ.validate_python({"type": "gkd"})
    assert (both.source, both.demonstrations, len(both.build().draws)) == ("rollouts", True, 1)
    assert (samples.source, samples.demonstrations, samples.build().draws) == ("any", False, ())


@pytest.mark.slow
def test_on_policy_distillation_learns_its_teacher(tiny_model: Path) -> None:
    policy, teacher = Policy(tiny_model, LORA, device="cpu"), teacher_of(tiny_model)
    learner = Learner(policy, Schedule(lr=1e-2, steps=60, micro_tokens=4096), dropout=False, teacher=teacher)
    algorithm, generator = build(type="on_policy_distillation"), torch.Generator().manual_seed(0)
    before = gap(policy, teacher)
    for _ in range(60):
        batch = Batch.of(sampled(policy, 32, 2, generator))
        metrics = learner.update(batch.with_(version=torch.full_like(batch.version, learner.version)), algorithm)
    assert metrics["parity/logprob_max"] < 1e-4
    assert before > 0.2
    assert gap(policy, teacher) < before / 3


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_gkd_learns_its_teacher(tiny_model: Path, beta: float) -> None:
    """On recorded text, which nobody sampled."""
    policy, teacher = Policy(tiny_model, LORA, device="cpu"), teacher_of(tiny_model)
    learner = Learner(policy, Schedule(lr=1e-2, steps=60, micro_tokens=32), teacher=teacher)
    rows = [[*prompt, 20 + i, 30 + i] for i, prompt in enumerate(PROMPTS.tolist())]
    groups = [
        (Trajectory(Task("t", ()), (), [Sample(row, [False] * 3 + [True] * 2, [NAN] * 5, [0.0] * 5, -1)], score=1.0),)
        for row in rows
    ]
    before = gap(policy, teacher)
    first, *_, last = [learner.update(Batch.of(groups), build(type="gkd", beta=beta))["kl/teacher"] for _ in range(40)]
    assert last < first / 5
    assert gap(policy, teacher) < before / 5
