"""Imitation: weights of targets and the confident likelihood in loops; every entry learns through the real learner."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from rlft.algorithms import catalog
from rlft.algorithms.base import Algorithm, Outputs
from rlft.algorithms.losses import imitation
from rlft.algorithms.losses import policy as losses
from rlft.batch import Batch
from rlft.learner import Learner, Schedule
from rlft.policy import Policy
from rlft.source import Recorded
from rlft.trainer import Run, train
from rlft.types import NAN, Group, Sample, Task, Trajectory

Filled = Callable[..., Batch]
MakeGroups = Callable[..., list[Group]]
READ = TypeAdapter(catalog.AlgorithmConfig)


def build(**knobs: Any) -> Algorithm:
    return READ.validate_python(knobs).build()


def leaf(batch: Batch) -> Tensor:
    return torch.where(batch.mask, batch.old_logprobs, 0.0).requires_grad_()


def outputs(logprobs: Tensor) -> Outputs:
    return Outputs(logprobs, torch.zeros_like(logprobs.detach()))


# --- the confident likelihood -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_confident_in_loops(make_groups: MakeGroups, filled: Filled, seed: int) -> None:
    """Wu et al. 2025: - sg(p) log p; its derivative by log p is - p."""
    batch = filled(make_groups(seed=seed), seed)
    logprobs = leaf(batch)
    loss, _ = imitation.confident(outputs(logprobs), batch)
    loss.backward()
    value, slopes = 0.0, torch.zeros_like(logprobs)
    for i, j in batch.mask.nonzero().tolist():
        own, share = float(logprobs.detach()[i, j]), float(batch.weights[i, j] * batch.advantages[i, j])
        value -= share * math.exp(own) * own
        slopes[i, j] = -share * math.exp(own)
    assert loss.item() == pytest.approx(value, rel=1e-9)
    torch.testing.assert_close(logprobs.grad, slopes, rtol=1e-9, atol=1e-9)


def propagated(row: list[float], gamma: float) -> list[float]:
    """Each token's loss times n times its discounted sum of losses to come, over the sum of these sums."""
    dues = [math.fsum(gamma ** (i - t) * row[i] for i in range(t, len(row))) for t in range(len(row))]
    return [len(row) * due / math.fsum(dues) * loss for due, loss in zip(dues, row, strict=True)]


@pytest.mark.parametrize("gamma", [0.3, 0.95, 1.0])
def test_propagated_in_loops(make_groups: MakeGroups, filled: Filled, gamma: float) -> None:
    """The value by the formula, the gradient by differences of the formula, for every chosen token."""
    batch = filled(make_groups(2, 2, seed=1, longest=4), 1)
    logprobs = leaf(batch)
    loss, _ = imitation.propagated(outputs(logprobs), batch, gamma)
    loss.backward()

    def value(shifted: Tensor) -> float:
        total = 0.0
        for i in range(len(batch)):
            columns = batch.mask[i].nonzero().flatten().tolist()
            terms = propagated([-float(shifted[i, j]) for j in columns], gamma)
            shares = [float(batch.weights[i, j] * batch.advantages[i, j]) for j in columns]
            total += math.fsum(share * term for share, term in zip(shares, terms, strict=True))
        return total

    assert loss.item() == pytest.approx(value(logprobs.detach()), rel=1e-9)
    assert logprobs.grad is not None
    for i, j in batch.mask.nonzero().tolist():
        step = torch.zeros_like(logprobs.detach())
        step[i, j] = 1e-5
        slope = (value(logprobs.detach() + step) - value(logprobs.detach() - step)) / 2e-5
        assert float(logprobs.grad[i, j]) == pytest.approx(slope, rel=1e-6, abs=1e-8)
    assert not logprobs.grad[~batch.mask].any()


def test_propagated_without_a_discount_is_the_likelihood_and_gradcheck(make_groups: MakeGroups, filled: Filled) -> None:
    batch = filled(make_groups(2, 2, longest=4))
    logprobs = leaf(batch)
    plain = losses.likelihood(outputs(logprobs), batch)[0]
    assert imitation.propagated(outputs(logprobs), batch, 0.0)[0].item() == pytest.approx(plain.item(), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: imitation.propagated(outputs(x), batch, 0.9)[0], (logprobs,))


def test_propagated_trap_18_and_rows_by_themselves(make_groups: MakeGroups, filled: Filled) -> None:
    """NaN outside the mask, and log-probs of 0 throughout a row, reach nothing; micro-batches add up."""
    batch = filled(make_groups(3, 4))
    clean = leaf(batch)
    whole = imitation.propagated(outputs(clean), batch, 0.9)[0]
    dirty = torch.where(batch.mask, clean.detach(), math.nan).requires_grad_()
    spoiled = imitation.propagated(outputs(dirty), batch, 0.9)[0]
    assert torch.equal(*(torch.autograd.grad(loss, x)[0] for loss, x in ((whole, clean), (spoiled, dirty))))
    parts = 0.0
    for i in range(len(batch)):
        part = batch.rows(torch.tensor([i]))
        logprobs = leaf(part)
        parts += float(imitation.propagated(outputs(logprobs), part, 0.9)[0].detach())
    assert parts == pytest.approx(whole.item(), rel=1e-9)
    sure = torch.zeros_like(clean.detach()).requires_grad_()
    loss = imitation.propagated(outputs(sure), batch, 0.9)[0]
    loss.backward()
    assert loss.item() == 0.0
    assert sure.grad is not None
    assert torch.isfinite(sure.grad).all()


def test_ift_propagates_by_row(make_groups: MakeGroups, filled: Filled) -> None:
    batch = filled(make_groups(3, 1, seed=2))
    built = build(type="ift")
    step = built.weigh(built.credit(batch))
    found = built.loss(outputs(leaf(batch)), step)[0].item()
    rows = [propagated([-float(x) for x in batch.old_logprobs[i][batch.mask[i]]], 0.95) for i in range(len(batch))]
    assert found == pytest.approx(math.fsum(math.fsum(row) / len(row) for row in rows) / len(rows), rel=1e-9)


# --- thresholds that grow -------------------------------------------------------------------------------------------


def test_thresholds_take_their_turns(make_groups: MakeGroups) -> None:
    algorithm = build(type="reinforced_self_training", share=1.0, thresholds=[0.2, 0.5, 0.9], hold=2)
    groups = [tuple(replace(t, score=i / 10) for i, t in enumerate(group)) for group in make_groups(1, 11, seed=3)]
    numbers, lowest = dict(algorithm.owned.remembered), []
    for _ in range(7):
        lowest.append(min(t.score or 0.0 for group in algorithm.at(numbers).select(groups) for t in group))
        numbers = dict(algorithm.remember(numbers, {}))
    assert lowest == [0.2, 0.2, 0.5, 0.5, 0.9, 0.9, 0.9]
    assert algorithm.select(groups) == algorithm.at(algorithm.owned.remembered).select(groups)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"thresholds": [0.5, 0.2]}, "must grow"),
        ({"thresholds": [0.5, 0.5]}, "must grow"),
        ({"thresholds": [0.5], "at_least": 0.1}, "set one of them"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build(type="reinforced_self_training", **knobs)


class Kept:
    """Hooks that keep the totals of what each step trained on."""

    def __init__(self) -> None:
        self.totals: list[list[float | None]] = []

    async def before(self, start: int) -> None: ...

    async def after(self, step: int, groups: list[Group], chosen: list[Group], metrics: dict[str, float]) -> None:
        self.totals.append([t.total for group in chosen for t in group])

    async def finish(self, step: int, stopped: bool) -> None: ...


async def unsynced(step: int) -> dict[str, float]:
    return {}


def test_the_loop_filters_by_the_threshold_whose_turn_it_is(tiny_model: Path, make_groups: MakeGroups) -> None:
    """Steps that keep nothing do not count."""
    (four,) = make_groups(1, 4, seed=3)
    for scores, wanted in (
        ((0.0, 0.3, 0.5, 0.9), [[0.3, 0.5, 0.9], [0.9], [0.9]]),
        ((0.0, 0.1, 0.2, 0.2), [[], [], []]),
    ):
        algorithm = build(type="reinforced_self_training", share=1.0, thresholds=[0.25, 0.75], hold=1)
        policy = Policy(tiny_model, {"type": "lora", "r": 4, "target_modules": "all-linear"}, device="cpu")
        learner = Learner(policy, Schedule(lr=1e-3, steps=4), owned=algorithm.owned)
        group = tuple(replace(t, score=score) for t, score in zip(four, scores, strict=True))
        hooks = Kept()
        asyncio.run(train(Run(3, Recorded([group], 1, 0), algorithm, learner, unsynced, hooks)))
        assert hooks.totals == wanted
        assert learner.remembered["steps"] == sum(map(bool, wanted))


def test_trap_18_junk_outside_the_mask(make_groups: MakeGroups, filled: Filled) -> None:
    batch = filled(make_groups())
    clean = leaf(batch)
    imitation.confident(outputs(clean), batch)[0].backward()
    assert clean.grad is not None
    for junk in (math.nan, math.inf, -math.inf):
        dirty = torch.where(batch.mask, clean.detach(), junk).requires_grad_()
        spoiled = batch.with_(
            advantages=torch.where(batch.mask, batch.advantages, junk),
            weights=torch.where(batch.mask, batch.weights, junk),
        )
        loss, _ = imitation.confident(outputs(dirty), spoiled)
        loss.backward()
        assert torch.isfinite(loss)
        torch.testing.assert_close(dirty.grad, clean.grad, rtol=0, atol=0)


def test_confident_adds_over_micro_batches(make_groups: MakeGroups, filled: Filled) -> None:
    batch = filled(make_groups(3, 4))
    logprobs = leaf(batch).detach()
    whole = imitation.confident(outputs(logprobs), batch)[0]
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    parts = [
        imitation.confident(outputs(logprobs[rows][:, : batch.rows(rows).tokens.shape[1]]), batch.rows(rows))[0]
        for rows in order.split(5)
    ]
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-12)


# --- how strongly a target is imitated ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 0.5, 3.0])
def test_boltzmann_in_loops(scored: Callable[..., Batch], temperature: float) -> None:
    scores = [[0.0, 1.0, 0.25], [2.0], [-1.0, -1.0], [5.0, 0.0, 5.0, 1.0]]
    batch = imitation.boltzmann(scored(scores), temperature)
    wanted = []
    for group in scores:
        strength = [math.exp(score / temperature) for score in group]
        wanted += [len(group) * one / sum(strength) for one in strength]
    assert batch.advantages[:, 1].tolist() == pytest.approx(wanted, rel=1e-9)
    assert (batch.advantages[:, 0] == 0).all(), "nothing outside the mask"


def test_boltzmann_does_not_overflow(scored: Callable[..., Batch]) -> None:
    batch = imitation.boltzmann(scored([[1e5, 0.0], [-1e5, -1e5]]), 1e-3)
    assert batch.advantages[:, 1].tolist() == [2.0, 0.0, 1.0, 1.0]


def test_boltzmann_counts_a_trajectory_of_several_rows_once(scored: Callable[..., Batch]) -> None:
    whole = imitation.boltzmann(scored([[0.0, 1.0]]), 1.0).advantages[:, 1]
    split = replace(scored([[0.0, 1.0, 1.0]]), trajectory=torch.tensor([0, 1, 1]))
    assert imitation.boltzmann(split, 1.0).advantages[:, 1].tolist() == pytest.approx(
        [*whole.tolist(), float(whole[1])]
    )


def test_boltzmann_of_nothing() -> None:
    batch = Batch.of([])
    assert len(imitation.boltzmann(batch, 1.0)) == 0


# --- whole algorithms ---------------------------------------------------------------------------------------------


def whole(algorithm: Algorithm, groups: list[Group], double: Callable[[Batch], Batch]) -> tuple[float, Batch, Tensor]:
    """The loss from groups to number at random log-probs."""
    batch = double(Batch.of(algorithm.select(groups)))
    noise = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    logprobs = torch.where(batch.mask, -2.0 + 0.4 * noise, 0.0)
    batch = algorithm.weigh(algorithm.credit(batch.with_(old_logprobs=logprobs - 0.1 * noise)))
    return float(algorithm.loss(outputs(logprobs), batch)[0]), batch, logprobs


def rows_of(batch: Batch, values: Tensor) -> list[list[float]]:
    return [values[i][batch.mask[i]].tolist() for i in range(len(batch))]


@pytest.mark.parametrize("name", ["sft", "dft"])
@pytest.mark.parametrize("targets", ["best", "all"])
def test_targets_alike(make_groups: MakeGroups, double: Callable[[Batch], Batch], name: str, targets: str) -> None:
    groups = make_groups(4, 3, sampled=False)
    found, batch, logprobs = whole(build(type=name, targets=targets), groups, double)
    tokens = [x for row in rows_of(batch, logprobs) for x in row]
    assert len(batch) == (4 if targets == "best" else 12)
    wanted = -sum((math.exp(x) if name == "dft" else 1.0) * x for x in tokens) / len(tokens)
    assert found == pytest.approx(wanted, rel=1e-9)


def test_weighted_targets(make_groups: MakeGroups, double: Callable[[Batch], Batch]) -> None:
    """MORepair: sum over objectives of weight * the mean over its own tokens; here over targets, scored 0, 0.5, 1."""
    groups = make_groups(4, 3, sampled=False)
    groups[0][0].score = -2.0  # would be unlearned without bound
    found, batch, logprobs = whole(build(type="sft", targets="weighted"), groups, double)
    each = [float(s) * sum(row) / len(row) for s, row in zip(batch.scores, rows_of(batch, logprobs), strict=True)]
    assert len(batch) == 11
    assert found == pytest.approx(-sum(each) / 11, rel=1e-9)


def test_raft_with_and_without_a_clip(make_groups: MakeGroups, double: Callable[[Batch], Batch]) -> None:
    groups = make_groups(5, 4, seed=2)
    found, batch, logprobs = whole(build(type="raft", k=2), groups, double)
    assert len(batch) == 10, "whatever the scores"
    tokens = [x for row in rows_of(batch, logprobs) for x in row]
    assert found == pytest.approx(-sum(tokens) / len(tokens), rel=1e-9)
    found, batch, logprobs = whole(build(type="raft", k=2, clip=0.05), groups, double)
    gaps = [x for row in rows_of(batch, logprobs - batch.old_logprobs) for x in row]
    assert found == pytest.approx(-sum(min(math.exp(gap), 1.05) for gap in gaps) / len(gaps), rel=1e-9)


def test_reinforced_self_training_whole(make_groups: MakeGroups, double: Callable[[Batch], Batch]) -> None:
    groups = make_groups(5, 4, seed=2)
    found, batch, logprobs = whole(build(type="reinforced_self_training", share=0.4), groups, double)
    assert len(batch) == 8
    tokens = [x for row in rows_of(batch, logprobs) for x in row]
    assert found == pytest.approx(-sum(tokens) / len(tokens), rel=1e-9)
    _, strict, _ = whole(build(type="reinforced_self_training", share=1.0, at_least=1.0), groups, double)
    assert strict.scores.unique().tolist() == [1.0]


def test_reward_weighted_whole(make_groups: MakeGroups, double: Callable[[Batch], Batch]) -> None:
    groups = make_groups(3, 4, seed=2)
    found, batch, logprobs = whole(build(type="reward_weighted", temperature=0.3), groups, double)
    total = 0.0
    for g, row in enumerate(rows_of(batch, logprobs)):
        mates = [math.exp(float(s) / 0.3) for s in batch.scores[batch.group == batch.group[g]]]
        total -= len(mates) * math.exp(float(batch.scores[g]) / 0.3) / sum(mates) * sum(row) / len(row)
    assert found == pytest.approx(total / len(batch), rel=1e-9)


@pytest.mark.parametrize(
    "knobs",
    [
        {"type": "sft", "targets": "worst"},
        {"type": "raft", "clip": 1.0},
        {"type": "raft", "k": 0},
        {"type": "reinforced_self_training", "share": 0.0},
        {"type": "reinforced_self_training", "share": 1.1},
        {"type": "reward_weighted", "temperature": 0.0},
    ],
)
def test_wrong_knobs_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        READ.validate_python(knobs)


def test_defaults_are_those_of_the_past() -> None:
    assert (
        build(type="sft").formula
        == build(type="sft", targets="best").formula
        == "- mean over completion tokens of log p"
    )


# --- small real runs ----------------------------------------------------------------------------------------------


def said(tokens: list[int], score: float) -> Trajectory:
    """Two tokens of prompt, the rest chosen; nobody sampled it."""
    n = len(tokens)
    return Trajectory(
        Task("t", ()), (), [Sample(tokens, [False, False] + [True] * (n - 2), [NAN] * n, [0.0] * n, -1)], score=score
    )


TOY = [
    (said([5, 6, 20, 21, 2], 1.0), said([5, 6, 30, 31, 2], 0.0)),
    (said([7, 8, 40, 2], 0.0), said([7, 8, 50, 2], 1.0)),
]


@pytest.mark.parametrize(
    "knobs",
    [
        {"type": "sft"},
        {"type": "sft", "targets": "weighted"},
        {"type": "dft"},
        {"type": "rejection"},
        {"type": "raft"},
        {"type": "raft", "clip": 0.2},
        {"type": "reinforced_self_training", "share": 0.5},
        {"type": "reward_weighted", "temperature": 0.1},
    ],
    ids=lambda knobs: "-".join(map(str, knobs.values())),
)
def test_every_entry_learns_the_better_answer(tiny_model: Path, knobs: dict[str, Any]) -> None:
    algorithm = build(**knobs)
    policy = Policy(tiny_model, {"type": "lora", "r": 8, "target_modules": "all-linear"}, device="cpu")
    learner = Learner(policy, Schedule(lr=2e-2, steps=80, micro_tokens=64))
    batch = Batch.of(algorithm.select(TOY))
    for _ in range(80 if knobs["type"] == "dft" else 30):
        learner.update(batch, algorithm)
    found = learner.logprobs(Batch.of(TOY)).nansum(1)
    assert found[0] > -1, found
    assert found[3] > -1, found
    assert found[1] < -3, found
    assert found[2] < -1.5, found
