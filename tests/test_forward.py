"""The head: what it says of each token, that it is aligned, and that its gradient reaches the trunk. In float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, GPTJConfig, MambaConfig, PreTrainedConfig, RwkvConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlft.algorithms.base import Algorithm, Owned
from rlft.algorithms.catalog import AlgorithmConfig
from rlft.batch import Batch
from rlft.learner import Learner, Schedule
from rlft.policy import Policy
from rlft.types import NAN, Group, Sample, Task, Trajectory

MakeGroups = Callable[..., list[Group]]
LORA: dict[str, Any] = {"type": "lora", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}
HUGE = 1_000_000


class Norm(LlamaRMSNorm):
    """RMSNorm in the dtype of its input."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        mean = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(mean + self.variance_epsilon)


def named(**knobs: Any) -> Algorithm:
    return TypeAdapter(AlgorithmConfig).validate_python(knobs).build()


def headed(
    path: Path, owned: Owned | None = None, adapter: dict[str, Any] | None = LORA, shaken: bool = True, **schedule: Any
) -> Learner:
    """A learner with a head that is not zero, everything in float64."""
    policy = Policy(path, adapter, device="cpu")
    schedule = {"lr": 1e-2, "steps": 100, "micro_tokens": HUGE, **schedule}
    learner = Learner(policy, Schedule(**schedule), owned=owned or Owned(head=1))
    policy.model.double()
    learner.own.double()
    for module in policy.model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = Norm
    if shaken:
        draw = torch.Generator().manual_seed(0)
        for p in learner.own.parameters():
            torch.nn.init.normal_(p, 0, 0.1, draw)
    return learner


def double(batch: Batch) -> Batch:
    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return Batch(**{name: t.double() if t.is_floating_point() else t for name, t in found.items()})


def turns(groups: list[Group]) -> list[Group]:
    """The environment says every third token, and the last; every other trajectory was cut."""
    for n, trajectory in enumerate(t for group in groups for t in group):
        (sample,) = trajectory.samples
        first = sample.mask.index(True)
        for i in range(first + 1, len(sample.mask)):
            sample.mask[i] = (i - first) % 3 != 1 and i < len(sample.mask) - 1
        trajectory.finish = "length" if n % 2 else "stop"
    return groups


def row_by_row(learner: Learner, batch: Batch) -> list[Tensor]:
    """What the head says of each row's tokens, each row alone and without padding."""
    head, found = learner.own.get_submodule("head"), []
    for tokens, valid in zip(batch.tokens, batch.valid, strict=True):
        out = learner.policy.model(input_ids=tokens[valid][None], output_hidden_states=True)
        found.append(head(out.hidden_states[-1][0]))
    return found


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("k", [1, 3])
def test_trap_28_scores_and_values_are_those_of_each_row_alone(
    tiny_model: Path, make_groups: MakeGroups, side: Literal["right", "left"], k: int
) -> None:
    """values[:, i] is what the head says before token i, scores[:, i] having read it."""
    learner = headed(tiny_model, Owned(head=k))
    batch = double(Batch.of(turns(make_groups(2, 3, seed=1)), side=side))
    outputs = learner.forward(batch)
    assert outputs.scores is not None
    assert outputs.values is not None
    assert outputs.scores.shape == (*batch.tokens.shape, k)
    for i, wanted in enumerate(row_by_row(learner, batch)):
        torch.testing.assert_close(outputs.scores[i][batch.valid[i]], wanted, rtol=1e-9, atol=1e-9)
        before = torch.cat([torch.zeros(1, dtype=torch.float64), wanted[:-1, 0]])
        chosen = batch.mask[i][batch.valid[i]]
        torch.testing.assert_close(outputs.values[i][batch.mask[i]], before[chosen], rtol=1e-9, atol=1e-9)
    assert not outputs.scores[~batch.valid].any()
    assert not outputs.values[~batch.mask].any()


def test_values_without_gradient_are_those_with_one(tiny_model: Path, make_groups: MakeGroups) -> None:
    """Whatever the micro-batches; the bootstrap stands after the last token, where the engine cut, else 0."""
    batch = double(Batch.of(turns(make_groups(3, 3, seed=2, longest=14))))
    whole = headed(tiny_model)
    outputs = whole.forward(batch)
    assert outputs.values is not None
    for budget in (1, 40, HUGE):
        values, after = headed(tiny_model, micro_tokens=budget).values(batch)
        torch.testing.assert_close(values[batch.mask], outputs.values[batch.mask].detach(), rtol=1e-9, atol=1e-9)
        assert values[~batch.mask].isnan().all()
        for i, wanted in enumerate(row_by_row(whole, batch)):
            expected = float(wanted[-1, 0].detach()) if batch.truncated[i] else 0.0
            assert float(after[i]) == pytest.approx(expected, abs=1e-9)
    assert 0 < int(batch.truncated.sum()) < len(batch)


def test_trap_31_values_begin_at_exactly_zero_whatever_the_seed(tiny_model: Path, make_groups: MakeGroups) -> None:
    batch = Batch.of(make_groups(2, 2))
    for seed in (0, 1):
        learner = Learner(Policy(tiny_model, LORA, device="cpu", seed=seed), Schedule(1e-2, 1), owned=Owned(head=1))
        values, after = learner.values(batch.with_(truncated=torch.ones_like(batch.truncated)))
        assert not values[batch.mask].any()
        assert not after.any()


def test_a_head_leaves_the_log_probs_alone(tiny_model: Path, make_groups: MakeGroups) -> None:
    """And takes no random number, so that a run with a critic samples what one without does."""
    batch = double(Batch.of(make_groups(2, 3)))
    plain, with_head = headed(tiny_model, Owned()), headed(tiny_model)
    torch.testing.assert_close(with_head.logprobs(batch), plain.logprobs(batch), rtol=1e-9, atol=1e-9, equal_nan=True)
    states = []
    for owned in (Owned(), Owned(head=2)):
        policy = Policy(tiny_model, LORA, device="cpu")
        Learner(policy, Schedule(1e-2, 1), owned=owned)
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[1])


def error(learner: Learner, batch: Batch) -> Tensor:
    outputs = learner.forward(batch)
    assert outputs.values is not None
    return ((outputs.values - 1)[batch.mask] ** 2).sum()


def test_the_gradient_reaches_head_and_trunk(tiny_model: Path, make_groups: MakeGroups) -> None:
    batch = double(Batch.of(make_groups(2, 2)))
    learner = headed(tiny_model)
    error(learner, batch).backward()
    nothing = {name for name, p in learner.trained().items() if p.grad is None or not p.grad.any()}
    assert not any(name.startswith("own.") for name in nothing)
    assert nothing == {name for name in nothing if "lm_head" in name}


def test_detached_it_ends_at_the_head(tiny_model: Path, make_groups: MakeGroups) -> None:
    batch = double(Batch.of(make_groups(2, 2)))
    learner = headed(tiny_model, Owned(head=1, detached=True))
    error(learner, batch).backward()
    assert {name for name, p in learner.trained().items() if p.grad is not None} == {"own.head.weight", "own.head.bias"}


def test_trap_18_what_the_trunk_has_at_padding_reaches_no_gradient(tiny_model: Path, make_groups: MakeGroups) -> None:
    batch = double(Batch.of(make_groups(2, 3)))
    learner = headed(tiny_model, packing="off")
    error(learner, batch).backward()
    wanted = {name: p.grad.clone() for name, p in learner.trained().items() if p.grad is not None}
    learner.optimizer.zero_grad()

    def spoil(module: Any, given: Any, out: Any) -> None:
        out.last_hidden_state = torch.where(batch.valid[:, :, None], out[0], torch.nan)

    hook = learner.policy.causal_lm.model.register_forward_hook(spoil)
    try:
        error(learner, batch).backward()
    finally:
        hook.remove()
    for name, gradient in wanted.items():
        torch.testing.assert_close(learner.trained()[name].grad, gradient, rtol=1e-9, atol=1e-9)


def test_only_the_policy_itself_has_the_head(tiny_model: Path, make_groups: MakeGroups) -> None:
    """Full fine-tuning: the reference is another model, whose trunk the head does not watch."""
    learner = headed(tiny_model, adapter=None)
    learner.policy.frozen().double()
    batch = double(Batch.of(make_groups(2, 2)))
    assert learner.policy.reference_kind == "frozen copy"
    assert learner.logprobs(batch, reference=True)[batch.mask].isfinite().all()
    assert learner.forward(batch, model=learner.policy.frozen()).scores is None


@pytest.mark.parametrize("knobs", [{"type": "ppo", "kl": 0.1}, {"type": "reward_model", "centre": 0.01}])
def test_trap_07_gradients_of_a_head_do_not_depend_on_the_cut(
    tiny_model: Path, make_groups: MakeGroups, knobs: dict[str, Any]
) -> None:
    algorithm, groups = named(**knobs), make_groups(3, 4, seed=3)
    for group in groups:
        for i, trajectory in enumerate(group):
            trajectory.score = float(i)
    batch = double(Batch.of(algorithm.select(groups)))
    wanted = headed(tiny_model).gradients(batch, algorithm)
    order = torch.randperm(len(batch) // algorithm.unit, generator=torch.Generator().manual_seed(0))
    rows = (order[:, None] * algorithm.unit + torch.arange(algorithm.unit)).flatten()
    for budget, given in ((1, batch), (60, batch), (60, batch.rows(rows))):
        found = headed(tiny_model, micro_tokens=budget).gradients(given, algorithm)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            size = float(gradient.abs().max())
            assert float((found[name] - gradient).abs().max()) <= 1e-9 * max(size, 1e-6), name


# --- what is owned, in the optimizer ----------------------------------------------------------------------------------


def test_what_is_owned_is_trained_but_never_sent(tiny_model: Path) -> None:
    learner = headed(tiny_model, Owned(head=2, learned={"log_z": 1.5}))
    own = {"own.head.weight", "own.head.bias", "own.log_z"}
    assert own == {name for name in learner.names if name.startswith("own.")}
    moved = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    assert moved == {id(p) for p in learner.trained().values()}
    weights = learner.weights()
    assert not any("own" in name.split(".") for name, _ in [*weights.trainable(), *weights.merged()])
    assert not own & set(weights.targets())


def test_the_norm_that_is_clipped_holds_what_is_owned(tiny_model: Path, make_groups: MakeGroups) -> None:
    batch, algorithm = double(Batch.of(make_groups(2, 3))), named(type="ppo")
    gradients = headed(tiny_model).gradients(batch, algorithm)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    assert {"own.head.weight", "own.head.bias"} < set(gradients)
    found = headed(tiny_model).update(batch, algorithm)["loss/grad_norm"]
    assert found == pytest.approx(float(norm), rel=1e-9)


@pytest.mark.parametrize("alone", [0, 1, 3])
def test_at_the_start_only_what_is_owned_moves(tiny_model: Path, make_groups: MakeGroups, alone: int) -> None:
    """For so many optimizer steps, two of which are in an update."""
    algorithm = named(type="ppo", critic_warmup=alone)
    learner = headed(tiny_model, algorithm.owned, epochs=2, weight_decay=0.1)
    batch = double(Batch.of(make_groups(2, 3)))
    for update in range(3):
        before = {name: p.detach().clone() for name, p in learner.trained().items()}
        learner.update(batch, algorithm)
        moved = {name for name, p in learner.trained().items() if not torch.equal(p, before[name])}
        assert {"own.head.weight", "own.head.bias"} <= moved
        assert bool(moved - {"own.head.weight", "own.head.bias"}) == (2 * (update + 1) > alone)


# --- it learns --------------------------------------------------------------------------------------------------------


def spelled(score: float, tokens: list[int], logprob: float = NAN) -> Trajectory:
    n = len(tokens)
    mask = [i >= 2 for i in range(n)]
    sample = Sample(tokens, mask, [logprob if m else NAN for m in mask], [0.0] * n, version=0)
    return Trajectory(Task("t", ()), (), [sample], score=score)


def test_the_critic_learns_what_is_to_be_expected(tiny_model: Path) -> None:
    """Two prompts, one always right, the other never: after some updates the values know, and the error is gone."""
    algorithm = named(type="ppo", cliprange_value=None, whiten=False, gae_lambda=1.0)
    learner = headed(tiny_model, algorithm.owned, shaken=False)
    groups = [tuple(spelled(s, [10 + int(s), 12, 20 + i, 30 + i]) for i in range(4)) for s in (0.0, 1.0)]
    batch = double(Batch.of(groups))
    batch = batch.with_(logprobs=learner.logprobs(batch))
    seen = [learner.update(batch, algorithm) for _ in range(40)]
    assert seen[0]["value/loss"] == pytest.approx(0.25)
    assert seen[0]["value/explained_variance"] == pytest.approx(0.0)
    assert seen[-1]["value/loss"] < 0.01
    assert seen[-1]["value/explained_variance"] > 0.9
    values, _ = learner.values(batch)
    assert float((values - batch.scores[:, None])[batch.mask].abs().max()) < 0.3


def test_the_policy_learns_from_the_critic(tiny_model: Path) -> None:
    """One token to choose, sampled anew from the policy at every step; the right one becomes likely."""
    algorithm = named(type="ppo", cliprange_value=None, critic_warmup=2)
    learner = headed(tiny_model, algorithm.owned, shaken=False, lr=3e-2)
    draw, prompt = torch.Generator().manual_seed(0), [10, 12]
    shares = []
    for _ in range(25):
        with torch.no_grad():
            logits = learner.policy.model.eval()(input_ids=torch.tensor([prompt])).logits[0, -1]
        odds = logits.softmax(0)
        shares.append(float(odds[:150].sum()))
        drawn = torch.multinomial(odds, 16, replacement=True, generator=draw).tolist()
        group = tuple(spelled(float(t < 150), [*prompt, t], float(odds[t].log())) for t in drawn)
        learner.update(double(Batch.of([group])), algorithm)
    assert shares[0] == shares[2]  # the policy waits for the critic
    assert shares[0] < 0.8
    assert shares[-1] > 0.95


WITHOUT_SDPA = {
    "bloom": BloomConfig(vocab_size=320, hidden_size=32, n_layer=2, n_head=2),
    "gptj": GPTJConfig(vocab_size=320, n_embd=32, n_layer=2, n_head=2, rotary_dim=8, n_positions=128),
    "mamba": MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4),
    "rwkv": RwkvConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
}


@pytest.mark.parametrize("name", WITHOUT_SDPA)
def test_a_model_without_fused_attention_is_read_as_each_row_alone(
    tmp_path: Path, make_groups: MakeGroups, name: str
) -> None:
    """Attention as the model has it, a state instead of keys and values, prompts that rows share."""
    config: PreTrainedConfig = WITHOUT_SDPA[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    policy = Policy(tmp_path, None, device="cpu")
    batch = Batch.of(make_groups(2, 3, longest=12))
    learner = Learner(policy, Schedule(lr=0.1, steps=1))
    found = learner.logprobs(batch)
    for i in range(len(batch)):
        tokens, chosen = batch.tokens[i][batch.valid[i]], batch.mask[i][batch.valid[i]]
        with torch.no_grad():
            alone = policy.model(input_ids=tokens[None]).logits[0].log_softmax(-1)
        wanted = alone[:-1].gather(1, tokens[1:, None])[:, 0][chosen[1:]]
        torch.testing.assert_close(found[i][batch.mask[i]], wanted, rtol=1e-4, atol=1e-4)
