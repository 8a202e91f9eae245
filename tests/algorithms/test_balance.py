"""Trajectory balance: residuals in loops, and policies that sample in proportion to the reward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from rlft.algorithms import catalog
from rlft.algorithms.base import Algorithm, Outputs
from rlft.algorithms.losses import balance
from rlft.batch import Batch
from rlft.learner import Learner, Schedule
from rlft.policy import Policy
from rlft.types import NAN, Group, InputError, Sample, Task, Trajectory

Filled = Callable[..., Batch]
MakeGroups = Callable[..., list[Group]]
READ = TypeAdapter(catalog.AlgorithmConfig)
BETA = 0.5
LORA: dict[str, Any] = {"type": "lora", "r": 8, "target_modules": "all-linear"}


def build(**knobs: Any) -> Algorithm:
    return READ.validate_python(knobs).build()


def leaf(batch: Batch) -> Tensor:
    return torch.where(batch.mask, batch.old_logprobs, 0.0).requires_grad_()


def outputs(logprobs: Tensor, log_z: Tensor | None = None) -> Outputs:
    return Outputs(logprobs, torch.zeros_like(logprobs.detach()), scalars={} if log_z is None else {"log_z": log_z})


def now(batch: Batch, logprobs: Tensor) -> Batch:
    return batch.with_(now_logprobs=torch.where(batch.mask, logprobs.detach(), torch.nan))


def residuals(batch: Batch, logprobs: Tensor, reference: bool) -> list[float]:
    """log p - [log ref] - s / beta per row, token by token."""
    found = []
    for i in range(len(batch)):
        gap = -float(batch.scores[i]) / BETA
        for j in batch.mask[i].nonzero().flatten().tolist():
            gap += float(logprobs.detach()[i, j]) - (float(batch.ref_logprobs[i, j]) if reference else 0.0)
        found.append(gap)
    return found


@pytest.mark.parametrize("reference", [True, False])
def test_learned_partition_in_loops(make_groups: MakeGroups, filled: Filled, reference: bool) -> None:
    """Malkin et al. 2022, eq. 14; gradients by log p and by log Z."""
    batch = filled(make_groups(3, 4))
    logprobs, log_z = leaf(batch), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss, metrics = balance.trajectory_balance(BETA, reference, "learned")(outputs(logprobs, log_z), batch)
    loss.backward()
    value, slopes, slope = 0.0, torch.zeros_like(logprobs), 0.0
    gaps = residuals(batch, logprobs, reference)
    for i, gap in enumerate(gaps):
        share = float(batch.weights[i][batch.mask[i]].sum())
        value += share * (0.7 + gap) ** 2
        slope += share * 2 * (0.7 + gap)
        slopes[i][batch.mask[i]] = share * 2 * (0.7 + gap)
    assert float(loss.detach()) == pytest.approx(value, rel=1e-9)
    assert log_z.grad is not None
    assert float(log_z.grad) == pytest.approx(slope, rel=1e-9)
    torch.testing.assert_close(logprobs.grad, slopes, rtol=1e-9, atol=1e-9)
    assert metrics["balance/residual"].value == pytest.approx(sum(abs(0.7 + g) for g in gaps) / len(gaps))
    assert metrics["balance/log_z"].value == pytest.approx(0.7)


@pytest.mark.parametrize("reference", [True, False])
def test_by_group_it_is_the_variance_and_its_gradient(make_groups: MakeGroups, filled: Filled, reference: bool) -> None:
    """Richter et al. 2020: no gradient through log Z is needed, since the group's residuals sum to 0."""
    batch = filled(make_groups(3, 4)).with_()
    algorithm = build(type="gflownet", beta=BETA, reference=reference)
    logprobs = leaf(batch)
    step = algorithm.prepare(now(algorithm.weigh(batch), logprobs))
    loss, _ = algorithm.loss(outputs(logprobs), step)
    loss.backward()
    gaps = residuals(batch, logprobs, reference)
    value = 0.0
    free = leaf(batch)
    whole = torch.zeros((), dtype=torch.float64)
    for g in range(3):
        rows = range(4 * g, 4 * g + 4)
        centre = sum(gaps[i] for i in rows) / 4
        value += sum((gaps[i] - centre) ** 2 for i in rows) / 12
        each = torch.stack([free[i].sum() for i in rows]) + torch.tensor(
            [gaps[i] - float(free[i].detach().sum()) for i in rows], dtype=torch.float64
        )
        whole = whole + (each - each.mean()).square().sum() / 12  # here with a gradient through the mean
    whole.backward()
    assert free.grad is not None
    assert float(loss.detach()) == pytest.approx(value, rel=1e-9)
    torch.testing.assert_close(logprobs.grad, torch.where(batch.mask, free.grad, 0.0), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("partition", ["group", "learned"])
def test_gradcheck(make_groups: MakeGroups, filled: Filled, partition: Any) -> None:
    batch = filled(make_groups(2, 2, seed=3))
    logprobs, log_z = leaf(batch), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    batch = balance.group_partition(BETA, True)(now(batch, logprobs))
    loss = balance.trajectory_balance(BETA, True, partition)
    assert torch.autograd.gradcheck(lambda x, z: loss(outputs(x, z), batch)[0] + 0 * z, (logprobs, log_z))


@pytest.mark.parametrize("partition", ["group", "learned"])
def test_trap_18_and_micro_batches(make_groups: MakeGroups, filled: Filled, partition: Any) -> None:
    batch = filled(make_groups(3, 4))
    logprobs, log_z = leaf(batch), torch.tensor(0.3, dtype=torch.float64)
    batch = balance.group_partition(BETA, True)(now(batch, logprobs))
    loss = balance.trajectory_balance(BETA, True, partition)
    whole = float(loss(outputs(logprobs.detach(), log_z), batch)[0])
    parts = 0.0
    for rows in torch.randperm(12, generator=torch.Generator().manual_seed(0)).split(5):
        part = batch.rows(rows)
        parts += float(loss(outputs(logprobs.detach()[rows][:, : part.mask.shape[1]], log_z), part)[0])
    assert parts == pytest.approx(whole, rel=1e-12)
    for junk in (math.nan, math.inf):
        dirty = torch.where(batch.mask, logprobs.detach(), junk).requires_grad_()
        spoiled = batch.with_(weights=torch.where(batch.mask, batch.weights, junk),
                              ref_logprobs=torch.where(batch.mask, batch.ref_logprobs, junk))  # fmt: skip
        value, _ = loss(outputs(dirty, log_z), spoiled)
        value.backward()
        assert float(value.detach()) == pytest.approx(whole, rel=1e-12)
        assert dirty.grad is not None
        assert torch.isfinite(dirty.grad).all()


def test_a_trajectory_of_several_rows_is_refused(make_groups: MakeGroups, filled: Filled) -> None:
    batch = filled(make_groups(1, 2))
    batch = now(batch, batch.old_logprobs).with_(trajectory=torch.tensor([0, 0]))
    for knobs in ({}, {"partition": "learned"}):
        with pytest.raises(InputError, match="several samples"):
            build(type="gflownet", **knobs).prepare(batch)


def test_entries_say_what_they_need() -> None:
    assert build(type="gflownet").needs == ("now_logprobs", "ref_logprobs")
    assert build(type="gflownet", reference=False).needs == ("now_logprobs",)
    learned = build(type="gflownet", partition="learned", log_z=3.0, reference=False)
    assert learned.needs == ()
    assert dict(learned.owned.learned) == {"log_z": 3.0}
    assert READ.validate_python({"type": "gflownet"}).group_size_min == 2
    with pytest.raises(ValidationError):
        READ.validate_python({"type": "gflownet", "beta": 0.0})


# --- in proportion to the reward -------------------------------------------------------------------------------------

KINDS = 3
WORDS = list(itertools.product(range(KINDS), repeat=2))  # every completion of two tokens
SCORES = [math.sin(3.0 * i) for i in range(len(WORDS))]


def everyone() -> Batch:
    """Each completion once, in one group."""
    rows = [Sample([9, *word], [False, True, True], [NAN, -1.0, -1.0], [0.0] * 3, 0) for word in WORDS]
    return Batch.of([tuple(Trajectory(Task("t", ()), (), [s], score=x) for s, x in zip(rows, SCORES, strict=True))])


@pytest.mark.slow
@pytest.mark.parametrize("partition", ["group", "learned"])
@pytest.mark.parametrize("reference", [True, False])
def test_a_table_comes_to_sample_in_proportion(partition: Any, reference: bool) -> None:
    """The target, enumerated: [ref] exp(s / beta) / Z; trained on completions that the policy did not sample."""
    algorithm = build(type="gflownet", beta=BETA, reference=reference, partition=partition)
    first, second = torch.zeros(KINDS, dtype=torch.float64), torch.zeros(KINDS, KINDS, dtype=torch.float64)
    log_z = torch.zeros((), dtype=torch.float64)
    table = [tensor.requires_grad_() for tensor in (first, second, log_z)]
    batch = everyone()
    words = torch.tensor(WORDS)
    ref = torch.randn(len(WORDS), generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(0)

    def logprobs() -> Tensor:
        one = first.log_softmax(-1)[words[:, 0]]
        two = second.log_softmax(-1)[words[:, 0], words[:, 1]]
        return torch.stack([torch.zeros_like(one), one, two], 1)

    batch = batch.with_(
        scores=torch.tensor(SCORES, dtype=torch.float64),
        ref_logprobs=torch.stack([torch.full_like(ref, torch.nan), ref / 2, ref / 2], 1),
    )
    optimizer = torch.optim.Adam(table, lr=0.05)
    for _ in range(1500):
        optimizer.zero_grad()
        here = logprobs()
        step = algorithm.prepare(algorithm.weigh(algorithm.credit(batch)).with_(now_logprobs=here.detach()))
        algorithm.loss(outputs(here, log_z), step)[0].backward()
        optimizer.step()
    logs = [s / BETA + (float(r) if reference else 0.0) for s, r in zip(SCORES, ref, strict=True)]
    total = math.log(sum(map(math.exp, logs)))
    found = logprobs().sum(1).exp().tolist()
    assert found == pytest.approx([math.exp(x - total) for x in logs], abs=1e-3)
    if partition == "learned":
        assert float(log_z.detach()) == pytest.approx(total, abs=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("knobs", [{}, {"reference": False}, {"partition": "learned", "log_z": 8.0}])
def test_the_learner_balances(tiny_model: Path, knobs: dict[str, Any]) -> None:
    """Of three recorded answers, each becomes as likely to the others as their scores say, [times the reference]."""
    policy = Policy(tiny_model, LORA, device="cpu")
    algorithm = build(type="gflownet", beta=BETA, **knobs)
    learner = Learner(policy, Schedule(lr=5e-3, steps=150, micro_tokens=12), owned=algorithm.owned)
    rows, scores = ([5, 6, 20, 2], [5, 6, 30, 2], [5, 6, 40, 2]), (0.0, 0.5, 1.0)
    samples = [Sample(row, [False, False, True, True], [NAN] * 4, [0.0] * 4, -1) for row in rows]
    groups = [tuple(Trajectory(Task("t", ()), (), [s], score=x) for s, x in zip(samples, scores, strict=True))]
    batch = Batch.of(groups)
    start = learner.logprobs(batch).nansum(1)
    first, *_, last = [learner.update(batch, algorithm)["balance/residual"] for _ in range(150)]
    assert last < 0.1 < first
    found = learner.logprobs(batch).nansum(1) - (start if knobs.get("reference", True) else 0.0)
    assert (found[1:] - found[:-1]).tolist() == pytest.approx([0.5 / BETA] * 2, abs=0.3)
