"""A reference that follows the policy: what it mixes, that nothing else moves, and that resuming goes on with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from rlft.algorithms.base import Algorithm
from rlft.algorithms.catalog import AlgorithmConfig
from rlft.batch import Batch
from rlft.checkpoint import Checkpoints, restore
from rlft.learner import Learner, Schedule
from rlft.material import material
from rlft.policy import Policy
from rlft.reference import Reference
from rlft.settings import validate
from rlft.source import Recorded
from rlft.types import Group, InputError

pytestmark = pytest.mark.usefixtures("one_thread")

MakeGroups = Callable[..., list[Group]]
LORA: dict[str, Any] = {"type": "lora", "r": 4, "target_modules": "all-linear"}
ADAPTERS: dict[str, dict[str, Any] | None] = {
    "lora": LORA,
    "dora": {**LORA, "use_dora": True},
    "pissa": {"type": "lora", "init_lora_weights": "pissa"},
    "none": None,
}


def named(**knobs: Any) -> Algorithm:
    return TypeAdapter(AlgorithmConfig).validate_python(knobs).build()


GRPO = named(type="grpo", kl=0.3)


def following(
    path: Path, every: int, mix: float, adapter: dict[str, Any] | None = LORA, double: bool = False, **schedule: Any
) -> Learner:
    policy = Policy(path, adapter, device="cpu")
    if double:
        policy.model.double()
    settings: dict[str, Any] = {"lr": 1e-2, "steps": 20, **schedule}
    return Learner(policy, Schedule(**settings), reference=Reference(policy, every, mix))


def in_double(batch: Batch) -> Batch:
    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return Batch(**{name: t.double() if t.is_floating_point() else t for name, t in found.items()})


def values(learner: Learner) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in learner.policy.trainable()}


def reference_of(learner: Learner) -> Reference:
    assert learner.reference is not None
    return learner.reference


def paired(groups: list[Group]) -> list[Group]:
    """The first of each two is the chosen one."""
    for group in groups:
        group[0].score, group[1].score = 1.0, 0.0
    return groups


def shake(policy: Policy, scale: float = 0.02) -> None:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, p in policy.trainable():
            p += scale * torch.randn(p.shape, generator=draw).to(p.dtype)


def hashed(policy: Policy) -> str:
    found = hashlib.sha256()
    for name, weight in sorted(policy.plain().items()):
        found.update(name.encode() + weight.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.mark.parametrize("adapter", ["lora", "dora", "none"])
@pytest.mark.parametrize(("every", "mix"), [(1, 0.1), (2, 1.0), (3, 0.6)])
def test_the_reference_is_the_mix_of_arxiv_2404_09656_in_loops(
    tiny_model: Path, make_groups: MakeGroups, adapter: str, every: int, mix: float
) -> None:
    """Optimizer steps count, two a batch here. In float64, entry by entry, from the policy after every one of them."""
    learner = following(tiny_model, every, mix, ADAPTERS[adapter], double=True, minibatches=2)
    batch = in_double(Batch.of(make_groups(3, 4)))
    seen: list[dict[str, Tensor]] = [values(learner)]
    learner.optimizer.register_step_post_hook(lambda *_: seen.append(values(learner)))
    refreshed = [learner.update(batch, GRPO)["reference/refreshed"] for _ in range(4)]
    assert len(seen) == 9
    for name, found in reference_of(learner).values.items():
        expected = seen[0][name].flatten().tolist()
        for n in range(every, 9, every):
            here = seen[n][name].flatten().tolist()
            expected = [mix * p + (1 - mix) * r for p, r in zip(here, expected, strict=True)]
        assert found.flatten().tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
        assert found.dtype == torch.float64
    assert sum(refreshed) == 8 // every
    assert refreshed == [sum(n % every == 0 for n in (2 * i + 1, 2 * i + 2)) for i in range(4)]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_trap_19_it_begins_as_the_policy_and_a_hard_copy_is_the_policy(
    tiny_model: Path, make_groups: MakeGroups, adapter: str
) -> None:
    """Bit for bit, before the first step and right after each copy; between copies it stays where it is."""
    learner = following(tiny_model, 2, 1.0, ADAPTERS[adapter])
    batch = Batch.of(make_groups(2, 3))
    gaps = []
    for _ in range(4):
        kept = learner.logprobs(batch, reference=True)
        gaps.append(float((learner.logprobs(batch) - kept)[batch.mask].abs().max()))
        learner.update(batch, GRPO)
        if len(gaps) % 2:
            assert torch.equal(learner.logprobs(batch, reference=True)[batch.mask], kept[batch.mask])
    assert gaps[0] == gaps[2] == 0
    assert min(gaps[1], gaps[3]) > 1e-4


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_pass_of_the_reference_leaves_no_trace(tiny_model: Path, make_groups: MakeGroups, adapter: str) -> None:
    """Base, policy, what is trainable, what a sync would send, and gradients are those without a moving reference."""
    batch = Batch.of(make_groups(2, 3))
    learner = following(tiny_model, 1, 0.5, ADAPTERS[adapter])
    policy = learner.policy
    trained, targets, base = [(n, id(p)) for n, p in policy.trainable()], policy.targets(), hashed(policy)
    for _ in range(2):
        learner.update(batch, GRPO)
    moved = values(learner)
    sent = {name: tensor.clone() for name, tensor in policy.merged()}
    learner.logprobs(batch, reference=True)
    assert [(n, id(p)) for n, p in policy.trainable()] == trained
    assert policy.targets() == targets
    assert all(torch.equal(p, moved[name]) for name, p in policy.trainable())
    assert all(torch.equal(tensor, sent[name]) for name, tensor in policy.merged())
    assert adapter == "none" or hashed(policy) == base
    found = learner.gradients(batch, named(type="grpo"))
    learner.reference = None
    wanted = learner.gradients(batch, named(type="grpo"))
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_a_pass_that_fails_puts_the_policy_back(tiny_model: Path) -> None:
    learner = following(tiny_model, 1, 1.0)
    trained = [id(p) for _, p in learner.policy.trainable()]
    with pytest.raises(KeyboardInterrupt), reference_of(learner).model():
        raise KeyboardInterrupt
    assert [id(p) for _, p in learner.policy.trainable()] == trained


@pytest.mark.parametrize("mix", [0.01, 0.5, 1.0])
def test_what_mixing_factors_leaves_out(tiny_model: Path, mix: float) -> None:
    """Against mixed weights it is mix (1 - mix) scaling dB dA, so nothing for a hard copy."""
    policy = Policy(tiny_model, LORA, device="cpu")
    policy.model.double()
    shake(policy, 0.3)
    reference = Reference(policy, 1, mix)
    before = {name: value.clone() for name, value in reference.values.items()}
    shake(policy, 0.2)
    reference.stepped(1)
    now = dict(policy.trainable())
    layer: Any = policy.causal_lm.model.layers[0].self_attn.q_proj
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.default.weight"
    a, b = name.format("A"), name.format("B")
    mixed = mix * now[b] @ now[a] + (1 - mix) * before[b] @ before[a]
    lost = mix * (1 - mix) * (now[b] - before[b]) @ (now[a] - before[a])
    found = reference.values[b] @ reference.values[a]
    torch.testing.assert_close(found, (mixed - lost).detach(), rtol=0, atol=1e-12)
    assert bool(lost.any()) is (mix < 1)
    assert layer.scaling["default"] > 0


def test_a_small_mix_of_half_precision_weights_does_not_round_to_nothing(tiny_model: Path) -> None:
    """A share of 1e-3 of a change of 2^-6 is below bfloat16's spacing at 1: it is kept in float32, cast for a pass."""
    policy = Policy(tiny_model, LORA, device="cpu")
    policy.model.to(torch.bfloat16)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.fill_(1.0)
    soft, hard = Reference(policy, 1, 1e-3), Reference(policy, 1, 1.0)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.fill_(1 + 2**-6)
    for n in range(1, 4001):
        soft.stepped(n)
    hard.stepped(1)
    for name, p in policy.trainable():
        assert float(soft.values[name].min()) > 1 + 0.9 * 2**-6
        assert hard.values[name].dtype == torch.bfloat16
        assert torch.equal(hard.values[name], p)
    with soft.model():
        assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("adapter", ["lora", "none"])
@pytest.mark.parametrize("mix", [0.3, 1.0])
def test_trap_37_a_resumed_run_has_the_reference_of_the_uninterrupted_one(
    tmp_path: Path, tiny_model: Path, make_groups: MakeGroups, adapter: str, mix: float
) -> None:
    """Saved after three optimizer steps, between two refreshes of every two; every number and bit is equal."""
    pairs = paired(make_groups(4, 2, sampled=False))
    batch, dpo = Batch.of(pairs), named(type="dpo")
    first = following(tiny_model, 2, mix, ADAPTERS[adapter])
    for _ in range(3):
        first.update(batch, dpo)
    kept = Checkpoints(tmp_path, 1).save(3, first, Recorded(pairs, 2, 0))
    expected = [first.update(batch, dpo) for _ in range(3)]
    assert [row["reference/refreshed"] for row in expected] == [1, 0, 1]

    second = following(tiny_model, 2, mix, ADAPTERS[adapter])
    assert restore(kept, second, None) == 3
    assert [second.update(batch, dpo) for _ in range(3)] == expected
    for name, value in reference_of(first).values.items():
        assert torch.equal(value, reference_of(second).values[name])
    for name, p in first.trained().items():
        assert torch.equal(p, second.trained()[name])


def test_what_a_checkpoint_says_of_the_reference(tmp_path: Path, tiny_model: Path, make_groups: MakeGroups) -> None:
    pairs = paired(make_groups(2, 2, sampled=False))
    batch, dpo, source = Batch.of(pairs), named(type="dpo"), Recorded(pairs, 2, 0)
    moved = following(tiny_model, 1, 1.0)
    moved.update(batch, dpo)
    kept = Checkpoints(tmp_path / "moved", 1).save(1, moved, source)
    still = Learner(Policy(tiny_model, LORA, device="cpu"), Schedule(lr=1e-2, steps=8))
    with pytest.raises(InputError, match=r"reference\.every: the reference in .* has followed the policy"):
        restore(kept, still, None)
    smaller = following(tiny_model, 1, 1.0, {**LORA, "target_modules": ["q_proj"]})
    with pytest.raises(InputError, match="reference is not one of this config's model and adapter"):
        reference_of(smaller).load(reference_of(moved).values)

    still = Learner(Policy(tiny_model, LORA, device="cpu"), Schedule(lr=1e-2, steps=8))
    start = still.logprobs(batch)
    still.update(batch, dpo)
    kept = Checkpoints(tmp_path / "still", 1).save(1, still, source)
    later = following(tiny_model, 5, 1.0)
    restore(kept, later, None)
    assert torch.equal(later.logprobs(batch, reference=True)[batch.mask], start[batch.mask]), "it has not moved so far"


def test_a_step_without_data_counts_like_in_the_schedule(tiny_model: Path, make_groups: MakeGroups) -> None:
    learner = following(tiny_model, 2, 1.0)
    batch = Batch.of(make_groups(2, 3))
    learner.update(batch, GRPO)
    assert learner.update(Batch.of([]), GRPO)["reference/refreshed"] == 1
    assert torch.equal(learner.logprobs(batch)[batch.mask], learner.logprobs(batch, reference=True)[batch.mask])
    still = Learner(learner.policy, Schedule(lr=1e-2, steps=2))
    assert "reference/refreshed" not in still.update(batch, GRPO)


PLAIN: dict[str, Any] = {
    "name": "follows",
    "steps": 1,
    "model": {"path": "tiny-random"},
    "data": {"train": {"type": "generated"}},
    "reward": {"type": "number"},
    "algorithm": {"type": "grpo", "kl": 0.1},
    "reference": {"every": 4, "mix": 0.6},
}


def test_it_is_refused_where_nothing_is_measured_from_it() -> None:
    assert material(validate(PLAIN)).config.reference.every == 4
    with pytest.raises(InputError, match=r"reference\.every: grpo with these knobs measures from no reference"):
        material(validate({**PLAIN, "algorithm": {"type": "grpo"}}))
    with pytest.raises(InputError, match=r"^reference\.mix: with 0\.5 .* set reference\.every"):
        validate({**PLAIN, "reference": {"mix": 0.5}})
    for wrong in ({"every": -1}, {"every": 1, "mix": 0.0}, {"every": 1, "mix": 1.1}):
        with pytest.raises(InputError, match=r"^reference\."):
            validate({**PLAIN, "reference": wrong})
