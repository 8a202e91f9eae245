"""The learner: its gradients against a loop over rows, and that nothing depends on how a batch is cut.

In float64, where equal means equal. Llama's norm computes in float32 whatever the model's dtype, so that the tests
give it one that does not.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlft.algorithms import credit, select, weigh
from rlft.algorithms.base import Algorithm, Metrics, Outputs, Stat
from rlft.algorithms.catalog import AlgorithmConfig
from rlft.algorithms.losses import policy as losses
from rlft.batch import Batch
from rlft.learner import Learner, Schedule
from rlft.policy import Policy
from rlft.prefix import prompt_lengths
from rlft.types import NAN, Group, Sample, Task, Trajectory

MakeGroups = Callable[..., list[Group]]
Watching = Callable[[Any], AbstractContextManager[list[dict[str, Any]]]]
LORA: dict[str, Any] = {"type": "lora", "r": 4, "target_modules": "all-linear"}
HUGE = 1_000_000


class Norm(LlamaRMSNorm):
    """RMSNorm in the dtype of its input."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(mean + self.variance_epsilon)


def in_double(model: nn.Module) -> None:
    model.double()
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = Norm


def shake(policy: Policy, scale: float = 0.05) -> Policy:
    """Move every trained parameter, so that LoRA's A has a gradient too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p in policy.trainable():
            p += scale * torch.randn(p.shape, generator=generator).to(p.dtype)
    return policy


def exact(path: Path, adapter: dict[str, Any] | None = LORA, **options: Any) -> Policy:
    """A policy in float64, its adapter moved."""
    policy = shake(Policy(path, adapter, device="cpu", **options))
    in_double(policy.model)
    return policy


def learner_of(policy: Policy, temperature: float = 1.0, **schedule: Any) -> Learner:
    return Learner(policy, Schedule(**{"lr": 1e-2, "steps": 10, "micro_tokens": HUGE, **schedule}), temperature)


def named(**knobs: Any) -> Algorithm:
    return TypeAdapter(AlgorithmConfig).validate_python(knobs).build()


ALGORITHMS = {
    "grpo": named(type="grpo"),
    "grpo-kl": named(type="grpo", kl=0.3),
    "dr_grpo": replace(named(type="grpo", scale="none"), weigh=partial(weigh.by_budget, budget=16)),
    "rloo": named(type="rloo"),
    "sft": named(type="sft"),
}


def double(batch: Batch) -> Batch:
    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return Batch(**{name: t.double() if t.is_floating_point() else t for name, t in found.items()})


def near(batch: Batch, learner: Learner, scale: float = 0.3) -> Batch:
    """As if sampled by a policy not far from the learner's, so that some ratios are clipped and some are not."""
    noise = torch.randn(batch.tokens.shape, generator=torch.Generator().manual_seed(2), dtype=batch.logprobs.dtype)
    return batch.with_(logprobs=learner.logprobs(batch) + scale * noise)


def mixed(groups: list[Group]) -> list[Group]:
    """The same trajectories in groups that share no prompt, though groups share theirs."""
    return list(zip(*groups, strict=True))


def apart(groups: list[Group]) -> list[Group]:
    """The same trajectories with a prompt each, as recorded data or a rewritten history may have."""
    groups = copy.deepcopy(groups)
    for i, trajectory in enumerate(t for group in groups for t in group):
        trajectory.samples[0].tokens[0] = 3 + i
    return groups


def in_turns(groups: list[Group]) -> list[Group]:
    """The same trajectories with an environment that says every third token after the policy's first, and the last."""
    groups = copy.deepcopy(groups)
    for trajectory in (t for group in groups for t in group):
        (sample,) = trajectory.samples
        first = sample.mask.index(True)
        for i in range(first + 1, len(sample.mask)):
            sample.mask[i] = (i - first) % 3 != 1 and i < len(sample.mask) - 1
    return groups


SHAPES: dict[str, Callable[[list[Group]], list[Group]]] = {
    "shared": list,
    "mixed": mixed,
    "apart": apart,
    "in_turns": in_turns,
}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Equal relative to the largest entry of each parameter's gradient, which must not be zero."""
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        size = float(gradient.abs().max())
        assert size > 0, name
        assert float((found[name] - gradient).abs().max()) <= tolerance * size, name


def one(tokens: Sequence[int], chosen: int, score: float | None = 1.0, logprob: float = NAN) -> Trajectory:
    """A trajectory whose last `chosen` tokens are the policy's."""
    n = len(tokens)
    mask = [i >= n - chosen for i in range(n)]
    sample = Sample(list(tokens), mask, [logprob if m else NAN for m in mask], [0.0] * n, version=0)
    return Trajectory(Task("t", ()), (), [sample], score=score)


def snapshot(learner: Learner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.policy.trainable()}


# --- against a loop over rows -----------------------------------------------------------------------------------------


def in_loops(policy: Policy, batch: Batch, algorithm: Algorithm, temperature: float) -> dict[str, Tensor]:
    """Gradients by one plain forward pass per row without padding, each token's log-prob picked out by hand."""
    rows = []
    for i in range(len(batch)):
        tokens = batch.tokens[i][batch.valid[i]]
        logits = policy.model(input_ids=tokens[None]).logits[0] / temperature
        row = [logits.new_zeros(())] * batch.tokens.shape[1]
        for j in batch.mask[i].nonzero().flatten().tolist():
            row[j] = logits[j - 1, tokens[j]] - logits[j - 1].logsumexp(0)
        rows.append(torch.stack(row))
    logprobs = torch.stack(rows)
    loss, _ = algorithm.loss(Outputs(logprobs, torch.zeros_like(logprobs.detach())), batch)
    names, parameters = zip(*policy.trainable(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    ("temperature", "shape"), [(1.0, "shared"), (1.0, "mixed"), (0.7, "apart"), (1.0, "in_turns"), (0.7, "shared")]
)
def test_gradients_of_a_batch_in_loops(
    tiny_model: Path, make_groups: MakeGroups, name: str, temperature: float, shape: str
) -> None:
    algorithm = ALGORITHMS[name]
    learner = learner_of(exact(tiny_model), temperature)
    batch = near(double(Batch.of(SHAPES[shape](make_groups(2, 3, seed=1)))), learner)
    filled = algorithm.weigh(algorithm.credit(learner.fill(batch, algorithm.needs)))
    wanted = in_loops(learner.policy, filled, algorithm, temperature)
    assert_same(learner.gradients(batch, algorithm), wanted, 1e-10)


def test_full_fine_tuning_has_the_gradients_of_a_loop(tiny_model: Path, make_groups: MakeGroups) -> None:
    algorithm = ALGORITHMS["grpo-kl"]
    learner = learner_of(exact(tiny_model, None))
    in_double(learner.policy.frozen())
    batch = near(double(Batch.of(make_groups(2, 3, seed=1))), learner)
    filled = algorithm.weigh(algorithm.credit(learner.fill(batch, algorithm.needs)))
    wanted = in_loops(learner.policy, filled, algorithm, 1.0)
    assert_same(learner.gradients(batch, algorithm), wanted, 1e-10)


@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_in_float32_are_those_of_float64_rounded(
    tiny_model: Path, make_groups: MakeGroups, adapter: dict[str, Any] | None, shape: str
) -> None:
    """Float32 takes other kernels."""
    single, wide = learner_of(shake(Policy(tiny_model, adapter, device="cpu"))), learner_of(exact(tiny_model, adapter))
    batch = near(Batch.of(SHAPES[shape](make_groups(2, 3, seed=1))), single)
    wanted = wide.gradients(double(batch), ALGORITHMS["grpo"])
    assert_same(single.gradients(batch, ALGORITHMS["grpo"]), wanted, 1e-3)


# --- nothing depends on how a batch is cut or padded ------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("shape", ["shared", "apart"])
def test_trap_07_normaliser_across_micro_batches(
    tiny_model: Path, make_groups: MakeGroups, name: str, shape: str
) -> None:
    """From one row a micro-batch to all eight, and any row order."""
    policy = exact(tiny_model)
    whole = learner_of(policy)
    batch = near(double(Batch.of(SHAPES[shape](make_groups(2, 4, seed=3)))), whole)
    wanted = whole.gradients(batch, ALGORITHMS[name])
    width = batch.tokens.shape[1]
    sizes = set()
    for budget in (1, 2 * width, 4 * width, 6 * width, HUGE):
        learner = learner_of(policy, micro_tokens=budget)
        sizes |= {len(part) for part in learner._micro(batch, 1)}
        assert_same(learner.gradients(batch, ALGORITHMS[name]), wanted, 1e-12)
    for seed in range(3):
        order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
        learner = learner_of(policy, micro_tokens=3 * width)
        assert_same(learner.gradients(batch.rows(order), ALGORITHMS[name]), wanted, 1e-12)
    assert {1, 8} < sizes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("unit", [1, 2])
def test_micro_batches_keep_to_the_budget_and_cover_every_row(
    tiny_model: Path, make_groups: MakeGroups, watched: Watching, shape: str, unit: int
) -> None:
    batch = Batch.of(SHAPES[shape](make_groups(4, 4, seed=3, longest=20)))
    learner = learner_of(Policy(tiny_model, LORA, device="cpu"), micro_tokens=60)
    parts = list(learner._micro(batch, unit))
    assert sorted(torch.cat(parts).tolist()) == list(range(len(batch)))
    assert max(len(part) for part in parts) > unit
    for part in parts:
        firsts = part.view(-1, unit)[:, :1]
        assert not (firsts % unit).any()
        assert torch.equal(part.view(-1, unit), firsts + torch.arange(unit))
        learner.forward(batch.rows(part))  # the first of all measures what may be done
        with watched(learner.policy) as read:
            learner.forward(batch.rows(part))
        assert sum(given["input_ids"].numel() for given in read) <= 60


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_shared_prompt_is_computed_once(tiny_model: Path, watched: Watching, side: Literal["right", "left"]) -> None:
    prompt = list(range(3, 43))
    batch = Batch.of([tuple(one([*prompt, *range(50, 52 + i)], 2 + i) for i in range(4))], side=side)
    learner = learner_of(exact(tiny_model))
    learner.forward(double(batch))
    with watched(learner.policy) as read:
        learner.forward(double(batch))
    assert sum(given["input_ids"].numel() for given in read) <= len(prompt) + 4 * 5


@pytest.mark.parametrize("name", ["grpo", "grpo-kl"])
@pytest.mark.parametrize("shape", ["shared", "apart"])
def test_trap_28_padding_side(tiny_model: Path, make_groups: MakeGroups, name: str, shape: str) -> None:
    groups = SHAPES[shape](make_groups(2, 3, seed=4))
    learner = learner_of(exact(tiny_model))
    right, left = (double(Batch.of(groups, side=side)) for side in ("right", "left"))
    assert not torch.equal(right.tokens, left.tokens)
    torch.testing.assert_close(
        learner.logprobs(left)[left.mask], learner.logprobs(right)[right.mask], rtol=1e-12, atol=1e-12
    )
    wanted = learner.gradients(right, ALGORITHMS[name])
    assert_same(learner.gradients(left, ALGORITHMS[name]), wanted, 1e-11)


@pytest.mark.parametrize("shape", ["shared", "apart"])
def test_trap_28_positions_count_from_the_first_token(
    tiny_model: Path, make_groups: MakeGroups, watched: Watching, shape: str
) -> None:
    """A model with rotary positions would not mind another start; one with learned positions would."""
    batch = Batch.of(SHAPES[shape](make_groups(2, 3, seed=4)), side="left")
    learner = learner_of(exact(tiny_model), packing="off")
    learner.forward(double(batch))
    with watched(learner.policy) as read:
        learner.forward(double(batch))
    positions, prompts = [given["position_ids"] for given in read], prompt_lengths(batch)
    assert int(positions[0][:, 0].min()) == 0
    for row in range(len(batch)):
        if shape == "apart":
            assert positions[0][row][batch.valid[row]].tolist() == list(range(int(batch.lengths[row])))
        else:
            assert int(positions[1][row, 0]) == int(prompts[row])


def test_trap_28_amount_of_padding(tiny_model: Path, make_groups: MakeGroups) -> None:
    """A row's log-probs are the same beside a much longer one."""
    groups = make_groups(1, 3, seed=4)
    learner = learner_of(exact(tiny_model))
    alone = double(Batch.of(groups))
    beside = double(Batch.of([*groups, (one(range(3, 63), 50),)]))
    width = alone.tokens.shape[1]
    found = learner.logprobs(beside)[:3, :width]
    torch.testing.assert_close(found, learner.logprobs(alone), rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_rows_that_cannot_move_the_weights_may_be_dropped(tiny_model: Path, make_groups: MakeGroups, name: str) -> None:
    """They stay in the denominator."""
    groups, equal = make_groups(2, 3, seed=5), make_groups(2, 3, seed=6)
    for group in groups:
        for i, trajectory in enumerate(group):
            trajectory.score = float(i)
    for trajectory in equal[0] + equal[1]:
        trajectory.score = 0.1
    learner = learner_of(exact(tiny_model), lr=0.0)
    batch = near(double(Batch.of([equal[0], groups[0], equal[1], groups[1]])), learner)
    algorithm = ALGORITHMS[name]
    kept = replace(algorithm, dense=True)
    assert_same(learner.gradients(batch, algorithm), learner.gradients(batch, kept), 1e-12)
    alone = learner.gradients(near(double(Batch.of(groups)), learner), algorithm)
    assert any(not torch.allclose(alone[k], g) for k, g in learner.gradients(batch, algorithm).items())

    some, every = learner.update(batch, algorithm), learner.update(batch, kept)
    assert some["tokens/trained"] < every["tokens/trained"] == float(batch.mask.sum())
    assert some["loss/total"] == pytest.approx(every["loss/total"], rel=1e-12)
    assert some["advantage/zero_groups"] == 0.5


def test_rows_without_advantage_are_not_dropped_under_a_kl(tiny_model: Path, make_groups: MakeGroups) -> None:
    groups = make_groups(1, 3)
    for trajectory in groups[0]:
        trajectory.score = 0.1
    learner = learner_of(exact(tiny_model))
    batch = double(Batch.of(groups))
    assert learner.gradients(batch, ALGORITHMS["grpo"]) == {}
    found = learner.gradients(batch, ALGORITHMS["grpo-kl"])
    assert all(float(g.abs().max()) > 0 for g in found.values())


def test_a_row_without_chosen_tokens_is_harmless(tiny_model: Path, make_groups: MakeGroups) -> None:
    groups = make_groups(2, 3, seed=5)
    learner = learner_of(exact(tiny_model), micro_tokens=1)
    batch = near(double(Batch.of(groups)), learner)
    more = near(double(Batch.of([*groups, (one([5, 6, 7, 8], 0),)])), learner)
    more = more.with_(logprobs=torch.cat([batch.logprobs, torch.full_like(batch.logprobs[:1], torch.nan)]))
    for name in ("grpo", "grpo-kl"):
        assert_same(learner.gradients(more, ALGORITHMS[name]), learner.gradients(batch, ALGORITHMS[name]), 1e-12)


def test_trap_03_what_the_environment_says_last_is_neither_trained_nor_counted(tiny_model: Path) -> None:
    learner = learner_of(exact(tiny_model))
    found = []
    for told in ([7, 8, 9], [100, 200], []):
        sample = Sample(
            [5, 6, 20, 21, *told],
            [False, False, True, True] + [False] * len(told),
            [NAN] * (4 + len(told)),
            [0.0] * (4 + len(told)),
            0,
        )
        trajectory = Trajectory(Task("t", ()), (), [sample], score=1.0)
        found.append(learner.gradients(double(Batch.of([(trajectory,), (one([9, 8, 7, 6], 2),)])), ALGORITHMS["sft"]))
    assert_same(found[1], found[0], 1e-12)
    assert_same(found[2], found[0], 1e-12)


# --- optimizer steps --------------------------------------------------------------------------------------------------


class Watched:
    """An algorithm that pulls on every row, and remembers which it saw and at what ratio."""

    def __init__(self, unit: int = 1) -> None:
        self.steps: list[list[int]] = []
        self.weights: list[float] = []
        self.ratios: list[Tensor] = []
        self.algorithm = Algorithm(
            select.everything, credit.uniform, self.weigh, self.loss, ("old_logprobs",), unit=unit, dense=True
        )

    def weigh(self, batch: Batch) -> Batch:
        self.steps.append([])
        self.weights.append(0.0)
        return weigh.by_token(batch)

    def loss(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        self.steps[-1] += batch.trajectory.tolist()
        self.weights[-1] += float(batch.weights[batch.mask].sum())
        self.ratios.append((outputs.logprobs.detach() - batch.old_logprobs)[batch.mask].exp())
        return losses.clipped(outputs, batch, low=0.2, high=0.2)


@pytest.mark.parametrize(("epochs", "minibatches", "unit"), [(1, 1, 1), (2, 3, 1), (3, 1, 2), (2, 3, 2), (1, 20, 1)])
def test_every_epoch_covers_every_row_once(
    tiny_model: Path, make_groups: MakeGroups, epochs: int, minibatches: int, unit: int
) -> None:
    watched = Watched(unit)
    learner = learner_of(
        Policy(tiny_model, LORA, device="cpu"), epochs=epochs, minibatches=minibatches, micro_tokens=40
    )
    batch = Batch.of(make_groups(5, 2, seed=7, sampled=False))
    metrics = learner.update(batch, watched.algorithm)
    count = min(minibatches, len(batch) // unit)
    assert len(watched.steps) == epochs * count
    passes = [
        [row for step in watched.steps[i : i + count] for row in step] for i in range(0, len(watched.steps), count)
    ]
    assert all(sorted(rows) == list(range(len(batch))) for rows in passes)
    assert watched.weights == pytest.approx([1.0] * len(watched.steps), rel=1e-5)
    assert metrics["tokens/trained"] == epochs * float(batch.mask.sum())
    for step in watched.steps:
        assert unit == 1 or {row ^ 1 for row in step} == set(step)
    if epochs > 1 and minibatches > 1:
        halves = [sorted(step) for step in watched.steps]
        assert halves[:count] != halves[count : 2 * count]  # shuffled anew


def test_trap_15_the_first_ratio_is_exactly_one(tiny_model: Path, make_groups: MakeGroups) -> None:
    """In float32, with padding and several micro-batches; later steps have moved."""
    watched = Watched()
    learner = learner_of(shake(Policy(tiny_model, LORA, device="cpu")), epochs=2, micro_tokens=40)
    learner.update(Batch.of(make_groups(3, 4, seed=8)), watched.algorithm)
    half = len(watched.ratios) // 2
    assert half > 1
    assert all(bool((ratio == 1).all()) for ratio in watched.ratios[:half])
    assert any(bool((ratio != 1).any()) for ratio in watched.ratios[half:])


def test_trap_15_old_logprobs_are_those_before_any_step(tiny_model: Path, make_groups: MakeGroups) -> None:
    watched = Watched()
    learner = learner_of(exact(tiny_model), minibatches=3)
    learner.update(double(Batch.of(make_groups(2, 3, seed=8))), watched.algorithm)
    torch.testing.assert_close(watched.ratios[0], torch.ones_like(watched.ratios[0]), rtol=1e-12, atol=0)
    assert float((watched.ratios[-1] - 1).abs().max()) > 1e-3


def test_the_rollouts_logprobs_stand_for_the_old_ones_in_a_single_step(
    tiny_model: Path, make_groups: MakeGroups
) -> None:
    policy = Policy(tiny_model, LORA, device="cpu")
    sampled, recorded = Batch.of(make_groups(2, 3)), Batch.of(make_groups(2, 3, sampled=False))
    single, several = learner_of(policy), learner_of(policy, epochs=2)
    assert single.fill(sampled, ("old_logprobs",)).old_logprobs is sampled.logprobs
    for learner, batch in ((single, recorded), (several, sampled)):
        old = learner.fill(batch, ("old_logprobs",)).old_logprobs
        torch.testing.assert_close(old, learner.logprobs(batch), rtol=0, atol=0, equal_nan=True)
        assert torch.isfinite(old[batch.mask]).all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_only_rows_without_logprobs_of_a_rollout_are_computed(
    tiny_model: Path, make_groups: MakeGroups, side: Literal["right", "left"]
) -> None:
    """Answers that somebody wrote down beside samples; the shortest rows, so that they are cut narrower."""
    learner = learner_of(Policy(tiny_model, LORA, device="cpu"), micro_tokens=40)
    batch = Batch.of(make_groups(2, 4, seed=8), side)
    written = batch.lengths.argsort()[:3]
    logprobs = batch.logprobs.clone()
    logprobs[written] = torch.nan
    batch = batch.with_(logprobs=logprobs)
    own = torch.ones(len(batch), dtype=torch.bool).index_fill(0, written, False)
    old, all_of_it = learner.fill(batch, ("old_logprobs",)).old_logprobs, learner.logprobs(batch)
    assert torch.equal(old[own][batch.mask[own]], logprobs[own][batch.mask[own]]), "the rollout's"
    torch.testing.assert_close(old[~own], all_of_it[~own], rtol=0, atol=1e-5, equal_nan=True)
    assert old[~batch.mask].isnan().all()
    fresh = learner.fill(batch, ("fresh_logprobs",)).old_logprobs
    torch.testing.assert_close(fresh, all_of_it, rtol=0, atol=0, equal_nan=True)


def test_only_what_is_needed_is_filled(tiny_model: Path, make_groups: MakeGroups) -> None:
    learner = learner_of(Policy(tiny_model, LORA, device="cpu"))
    batch = learner.fill(Batch.of(make_groups()), ("ref_logprobs",))
    assert torch.isfinite(batch.ref_logprobs[batch.mask]).all()
    assert batch.ref_logprobs[~batch.mask].isnan().all()
    assert batch.old_logprobs.isnan().all()


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (2, 2)])
def test_learning_rates_of_a_warm_up_and_a_decay(
    tiny_model: Path, make_groups: MakeGroups, epochs: int, minibatches: int
) -> None:
    """Linear: up over the warm-up's optimizer steps, down to 0 at the end; every update logs its last one."""
    steps, each = 8 // (epochs * minibatches), epochs * minibatches
    learner = learner_of(
        Policy(tiny_model, LORA, device="cpu"),
        lr=1.0,
        steps=steps,
        optimizer="sgd",
        scheduler="linear",
        warmup_steps=4,
        epochs=epochs,
        minibatches=minibatches,
        max_grad_norm=1e-9,
    )
    rates = [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]
    batch = Batch.of(make_groups(1, 2))
    found = [learner.update(batch, ALGORITHMS["sft"])["learner/lr"] for _ in range(steps)]
    assert found == pytest.approx(rates[each - 1 :: each])
    assert learner.scheduler.get_last_lr() == [0.0]


def test_the_schedule_goes_on_where_there_is_nothing_to_train_on(tiny_model: Path, make_groups: MakeGroups) -> None:
    def learner() -> Learner:
        policy = Policy(tiny_model, LORA, device="cpu")
        return learner_of(policy, lr=1.0, steps=4, scheduler="linear", epochs=2, minibatches=3, optimizer="sgd")

    idle, scarce = learner(), learner()
    idle.update(Batch.of([]), ALGORITHMS["sft"])
    scarce.update(Batch.of(make_groups(1, 2)), ALGORITHMS["sft"])  # two rows for three minibatches
    assert idle.scheduler.get_last_lr() == scarce.scheduler.get_last_lr() == pytest.approx([0.75])


def test_sgd_steps_by_the_rate_along_the_clipped_gradient(tiny_model: Path, make_groups: MakeGroups) -> None:
    for bound in (1e-3, 0.0):
        learner = learner_of(exact(tiny_model), optimizer="sgd", lr=0.5, max_grad_norm=bound)
        batch = near(double(Batch.of(make_groups(2, 3, seed=1))), learner)
        gradient, before = learner.gradients(batch, ALGORITHMS["grpo"]), snapshot(learner)
        norm = math.sqrt(sum(float(g.pow(2).sum()) for g in gradient.values()))
        metrics = learner.update(batch, ALGORITHMS["grpo"])
        assert metrics["loss/grad_norm"] == pytest.approx(norm, rel=1e-9)
        assert norm > 1e-3
        share = bound / (norm + 1e-6) if bound else 1.0
        for name, p in snapshot(learner).items():
            torch.testing.assert_close(before[name] - p, 0.5 * share * gradient[name], rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
def test_every_optimizer_moves_every_parameter(tiny_model: Path, make_groups: MakeGroups, optimizer: str) -> None:
    learner = learner_of(shake(Policy(tiny_model, LORA, device="cpu")), optimizer=optimizer)
    before = snapshot(learner)
    learner.update(Batch.of(make_groups(2, 3, sampled=False)), ALGORITHMS["sft"])
    assert all(not torch.equal(p, before[name]) for name, p in snapshot(learner).items())


@pytest.mark.parametrize("groups", [[], [(one([5, 6, 7], 2, score=None),)], [(one([5, 6, 7], 0),)]])
def test_a_batch_without_anything_to_train_on(tiny_model: Path, groups: list[Group]) -> None:
    learner = learner_of(Policy(tiny_model, LORA, device="cpu"))
    before = snapshot(learner)
    assert learner.update(Batch.of(groups), ALGORITHMS["sft"]) == {"tokens/trained": 0.0, "learner/lr": 1e-2}
    assert all(torch.equal(p, before[name]) for name, p in snapshot(learner).items())


def test_a_batch_without_any_advantage_moves_nothing(tiny_model: Path) -> None:
    learner = learner_of(Policy(tiny_model, LORA, device="cpu"), weight_decay=0.1)
    before = snapshot(learner)
    batch = Batch.of([(one([5, 6, 7], 2, 0.1, -1.0), one([5, 6, 8, 9], 3, 0.1, -1.0))])
    metrics = learner.update(batch, ALGORITHMS["grpo"])
    assert metrics["tokens/trained"] == metrics["loss/total"] == metrics["loss/grad_norm"] == 0.0
    assert metrics["advantage/zero_groups"] == 1.0
    assert all(torch.equal(p, before[name]) for name, p in snapshot(learner).items())


def test_trap_32_a_missing_score_changes_no_gradient(tiny_model: Path, make_groups: MakeGroups) -> None:
    learner = learner_of(exact(tiny_model))
    groups = make_groups(1, 4, seed=1)
    wanted = learner.gradients(double(Batch.of(groups)), ALGORITHMS["rloo"])
    failed = (one([5, 6, 7, 8], 2, score=None), *groups[0])
    assert_same(learner.gradients(double(Batch.of([failed])), ALGORITHMS["rloo"]), wanted, 1e-12)
    zero = (one([5, 6, 7, 8], 2, score=0.0), *groups[0])
    assert any(
        not torch.allclose(g, wanted[k])
        for k, g in learner.gradients(double(Batch.of([zero])), ALGORITHMS["rloo"]).items()
    )


@pytest.mark.parametrize("kind", ["score", "loss", "gradient"])
def test_a_loss_that_is_not_finite_moves_nothing_and_names_its_rows(
    tiny_model: Path, make_groups: MakeGroups, kind: str
) -> None:
    learner = learner_of(shake(Policy(tiny_model, LORA, device="cpu")))
    groups = make_groups(2, 3, seed=1)
    learner.update(Batch.of(groups), ALGORITHMS["grpo"])
    before, moments = snapshot(learner), copy.deepcopy(learner.optimizer.state_dict()["state"])

    def broken(outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        if kind == "loss":
            return outputs.logprobs.sum() + math.inf, {"any": Stat(1.0, 1.0)}
        return (outputs.logprobs * 0).sum().sqrt(), {}

    algorithm = ALGORITHMS["grpo"] if kind == "score" else replace(ALGORITHMS["sft"], loss=broken)
    if kind == "score":
        groups[0][1].score = NAN
    epoch = learner.scheduler.last_epoch
    metrics = learner.update(Batch.of(groups), algorithm)
    assert metrics["learner/skipped"] == learner.stepper.skipped_in_a_row == 1
    assert math.isnan(metrics["loss/total"])
    assert learner.scheduler.last_epoch == epoch + 1
    (skip,) = learner.skipped
    if kind == "score":  # the other group is sound, and so would its rows have been
        assert skip.rows == tuple((skip.batch.group == 0).nonzero().flatten().tolist())
    else:
        assert skip.rows == tuple(range(len(skip.batch)))
    assert bool(skip.parameters) == (kind != "loss")
    assert all(torch.equal(p, before[name]) for name, p in snapshot(learner).items())
    after = learner.optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][k], moments[i][k]) for i in moments for k in moments[i])
    assert all(p.grad is None for _, p in learner.policy.trainable())
    assert "learner/skipped" not in learner.update(Batch.of(make_groups(2, 3, seed=2)), ALGORITHMS["grpo"])
    assert learner.stepper.skipped_in_a_row == 0
    assert any(not torch.equal(p, before[name]) for name, p in snapshot(learner).items())


# --- the forward pass -------------------------------------------------------------------------------------------------


def test_trap_11_logits_are_divided_by_the_temperature(tiny_model: Path, make_groups: MakeGroups) -> None:
    policy = exact(tiny_model)
    batch = double(Batch.of(make_groups(1, 2)))
    found = learner_of(policy, temperature=0.7).logprobs(batch)
    tokens = batch.tokens[0][batch.valid[0]]
    with torch.no_grad():
        wanted = (policy.model(input_ids=tokens[None]).logits[0] / 0.7).log_softmax(-1)
    for j in batch.mask[0].nonzero().flatten().tolist():
        assert float(found[0, j]) == pytest.approx(float(wanted[j - 1, tokens[j]]), rel=1e-12)


class Bare(nn.Module):
    """In a model's place: the same logits for every row, in a dtype of choice."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = logits

    def forward(self, input_ids: Tensor, logits_to_keep: Tensor, **_: Any) -> Any:
        picked = self.table[logits_to_keep].expand(len(input_ids), -1, -1)
        return type("Output", (), {"logits": picked})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_trap_13_log_softmax_is_float32_or_better(tiny_model: Path, dtype: torch.dtype) -> None:
    """Over a vocabulary of 50 thousand with logits to 30: 1e-5 from float64 on the same logits, bfloat16 ones too."""
    learner = learner_of(Policy(tiny_model, LORA, device="cpu"))
    logits = (8 * torch.randn(9, 50_000, generator=torch.Generator().manual_seed(0))).to(dtype)
    tokens = torch.randint(3, 50_000, (4, 9), generator=torch.Generator().manual_seed(1))
    batch = Batch.of([tuple(one(row.tolist(), 8) for row in tokens)])
    outputs = learner.forward(batch, model=Bare(logits))
    distribution = logits.double().log_softmax(-1)
    wanted = distribution[:-1].expand(4, -1, -1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    assert outputs.logprobs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(outputs.logprobs[:, 1:].double(), wanted, rtol=0, atol=1e-5)
    entropy = -(distribution.exp() * distribution).sum(-1)[:-1].expand(4, -1)
    torch.testing.assert_close(outputs.entropy[:, 1:].double(), entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["grpo", "grpo-kl", "rloo"])
def test_trap_18_junk_in_masked_slots_of_a_batch(
    tiny_model: Path, make_groups: MakeGroups, name: str, junk: float
) -> None:
    learner = learner_of(exact(tiny_model))
    batch = near(double(Batch.of(make_groups(2, 3, seed=5))), learner)
    algorithm = ALGORITHMS[name]
    found = []
    for fill in (0.0, junk):
        floats = [f.name for f in fields(Batch) if getattr(batch, f.name).is_floating_point()]
        floats = [name for name in floats if getattr(batch, name).shape == batch.mask.shape]
        filled = algorithm.weigh(algorithm.credit(learner.fill(batch, algorithm.needs)))
        given = {n: torch.where(filled.mask, getattr(filled, n), fill) for n in floats}

        ready = replace(algorithm, needs=(), credit=lambda given: given, weigh=lambda given: given)
        found.append(learner.gradients(filled.with_(**given), ready))
    assert_same(found[1], found[0], 0.0)


@pytest.mark.parametrize("adapter", [LORA, None], ids=["lora", "none"])
def test_trap_26_gradient_checkpointing(
    tiny_model: Path, make_groups: MakeGroups, adapter: dict[str, Any] | None
) -> None:
    plain = learner_of(exact(tiny_model, adapter))
    saving = learner_of(exact(tiny_model, adapter, gradient_checkpointing=True))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    saving.forward(double(Batch.of(make_groups(1, 1, seed=1))))  # measured before anything is counted
    saving.policy.causal_lm.model.layers[0].input_layernorm.register_forward_hook(count)
    batch = near(double(Batch.of(make_groups(2, 3, seed=1))), plain)
    assert_same(saving.gradients(batch, ALGORITHMS["grpo"]), plain.gradients(batch, ALGORITHMS["grpo"]), 1e-12)
    assert calls == 2  # once forward, once again in the backward pass


def test_metrics_of_an_update(tiny_model: Path, make_groups: MakeGroups) -> None:
    policy = exact(tiny_model)
    learner = learner_of(policy, micro_tokens=20, lr=0.0)
    batch = near(double(Batch.of(make_groups(2, 4, seed=3))), learner)
    metrics = learner.update(batch, ALGORITHMS["grpo"])
    with torch.no_grad():
        outputs = learner.forward(batch)
    mask = batch.mask
    gap = (outputs.logprobs - batch.logprobs)[mask]
    assert metrics["parity/logprob_max"] == pytest.approx(float(gap.abs().max()), rel=1e-9)
    assert metrics["parity/logprob_mean"] == pytest.approx(float(gap.abs().mean()), rel=1e-9)
    assert metrics["policy/ratio_max"] == pytest.approx(float(gap.exp().max()), rel=1e-9)
    assert metrics["policy/entropy"] == pytest.approx(float(outputs.entropy[mask].mean()), rel=1e-9)
    assert 0 < metrics["policy/clip_fraction"] < 1
    recorded = learner.update(double(Batch.of(make_groups(2, 4, sampled=False))), ALGORITHMS["sft"])
    assert not any(name.startswith("parity") for name in recorded)


def test_parity_is_of_the_newest_rows_and_older_ones_stand_apart(tiny_model: Path, make_groups: MakeGroups) -> None:
    """A group that waited was sampled from weights that have moved on since: no gap of engine and learner."""
    policy = exact(tiny_model)
    learner = learner_of(policy, micro_tokens=20, lr=0.0)
    batch = near(double(Batch.of(make_groups(2, 4, seed=3))), learner)
    older = batch.group == 1
    batch = batch.with_(
        version=torch.where(older, 6, 7),
        logprobs=torch.where(older[:, None], batch.logprobs - 0.5, learner.logprobs(batch) + 1e-4),
    )
    metrics = learner.update(batch, ALGORITHMS["grpo"])
    gap = (learner.logprobs(batch) - batch.logprobs).abs()
    assert metrics["parity/logprob_max"] == pytest.approx(1e-4, rel=1e-6)
    assert metrics["parity/logprob_mean"] == pytest.approx(1e-4, rel=1e-6)
    stale = gap[older][batch.mask[older]]
    assert metrics["parity/stale_logprob_max"] == pytest.approx(float(stale.max()), rel=1e-9)
    assert metrics["parity/stale_logprob_mean"] == pytest.approx(float(stale.mean()), rel=1e-9)


def test_a_batch_that_moves_nothing_has_its_metrics_and_no_gradient(tiny_model: Path, make_groups: MakeGroups) -> None:
    learner = learner_of(exact(tiny_model), micro_tokens=20)
    batch = near(double(Batch.of(make_groups(2, 4, seed=3))), learner)
    before = {name: p.detach().clone() for name, p in learner.trained().items()}
    metrics = learner.update(batch.with_(scores=torch.ones_like(batch.scores)), ALGORITHMS["grpo"])
    assert (metrics["advantage/zero_groups"], metrics["tokens/trained"], metrics["loss/grad_norm"]) == (1, 0, 0)
    assert metrics["parity/logprob_max"] > 0
    assert metrics["policy/entropy"] > 0
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in learner.trained().items())


# --- small real runs --------------------------------------------------------------------------------------------------


def test_sft_learns_a_demonstration_by_heart(tiny_model: Path) -> None:
    learner = learner_of(Policy(tiny_model, LORA, device="cpu"), lr=2e-2)
    said = [50, 51, 52, 53, 2]
    batch = Batch.of([(one([5, 6, 7, *said], len(said)),)])
    first, *_, last = [learner.update(batch, ALGORITHMS["sft"])["policy/nll"] for _ in range(40)]
    assert first > 3
    assert last < 0.05
    tokens = [5, 6, 7]
    learner.policy.model.eval()
    with torch.no_grad():
        for _ in said:
            tokens.append(int(learner.policy.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    assert tokens[3:] == said


def test_rejection_imitates_the_best_of_each_group(tiny_model: Path, make_groups: MakeGroups) -> None:
    algorithm = named(type="rejection", k=1, at_least=0.5)
    learner = learner_of(Policy(tiny_model, LORA, device="cpu"))
    groups = [(one([5, 6, 20, 21, 22], 3, 0.4), one([5, 6, 30, 31], 2, 0.9), one([5, 6, 40], 1, None))]
    groups += [(one([7, 8, 50, 51, 52, 53], 4, 0.2),)]
    everyone = Batch.of([tuple(replace(t, score=0.0) for t in group) for group in groups])
    before = learner.logprobs(everyone)
    for _ in range(5):
        metrics = learner.update(Batch.of(algorithm.select(groups)), algorithm)
    assert metrics["tokens/trained"] == 2.0
    risen = (learner.logprobs(everyone) - before).nansum(1)
    assert int(risen.argmax()) == 1
    assert float(risen[1]) > 1


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_a_rewarded_sample_becomes_likelier(tiny_model: Path, name: str) -> None:
    learner = learner_of(Policy(tiny_model, LORA, device="cpu"), epochs=1, lr=1e-3)
    groups = [(one([5, 6, 20, 21], 2, 1.0), one([5, 6, 30, 31], 2, 0.0))]
    start = learner.logprobs(Batch.of(groups))
    batch = Batch.of(groups).with_(logprobs=start)
    learner.update(batch, ALGORITHMS[name])
    good, bad = (learner.logprobs(batch) - start).nansum(1).tolist()
    assert good > 0 > bad


def test_updates_with_one_seed_are_equal_to_the_bit(tiny_model: Path, make_groups: MakeGroups) -> None:
    found = []
    for _ in range(2):
        learner = learner_of(Policy(tiny_model, LORA, device="cpu", seed=3), epochs=2, minibatches=2, micro_tokens=40)
        for seed in range(2):
            learner.update(Batch.of(make_groups(2, 4, seed=seed)), ALGORITHMS["grpo-kl"])
        found.append(snapshot(learner))
    assert all(torch.equal(p, found[1][name]) for name, p in found[0].items())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trap_27_no_dropout_where_samples_of_the_policy_are_scored(
    tiny_model: Path, make_groups: MakeGroups, checkpointing: bool
) -> None:
    adapter = {**LORA, "lora_dropout": 0.5}
    policy = Policy(tiny_model, adapter, device="cpu", dtype="float32", gradient_checkpointing=checkpointing)
    shake(policy)
    batch = Batch.of(make_groups(3, 4))
    still = Learner(policy, Schedule(lr=1e-3, steps=1), dropout=False)
    sampled = batch.with_(logprobs=still.logprobs(batch))
    calm = still.update(sampled, ALGORITHMS["grpo"])
    assert calm["parity/logprob_max"] < 1e-5
    assert calm["loss/grad_norm"] > 0
    restless = Learner(policy, Schedule(lr=1e-3, steps=1))
    again = batch.with_(logprobs=restless.logprobs(batch))
    assert restless.update(again, ALGORITHMS["grpo"])["parity/logprob_max"] > 1e-3
