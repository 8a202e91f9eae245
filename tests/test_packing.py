"""Rows that are packed come out as each row alone: values and gradients, in float64, where equal means equal."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    MambaConfig,
    MambaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaModel,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlft.algorithms.base import Algorithm, Outputs, Owned
from rlft.algorithms.catalog import AlgorithmConfig
from rlft.batch import Batch
from rlft.forward import Forward
from rlft.learner import Learner, Schedule
from rlft.packing import Plan, Rows, Ways, exact, most, packed, plan, trunk_of, ways_of
from rlft.policy import Policy
from rlft.segments import NAME
from rlft.types import NAN, Group, InputError, Sample, Task, Trajectory

MakeGroups = Callable[..., list[Group]]
Watching = Callable[[Any], AbstractContextManager[list[dict[str, Any]]]]
LORA: dict[str, Any] = {"type": "lora", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}
HUGE = 1_000_000
REACH = 128.0


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


@pytest.fixture(params=["segments", "masks"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by segments, and with masks as where a model takes no attention function."""
    if request.param == "masks":
        monkeypatch.setattr("rlft.packing.may", lambda trunk: False)


both_ways = pytest.mark.usefixtures("way")


def wide(path: Path, owned: Owned | None = None, packing: str = "on", **options: Any) -> Learner:
    """A learner in float64, its head moved."""
    schedule = {"lr": 1e-2, "steps": 10, "micro_tokens": HUGE, **options.pop("schedule", {})}
    teacher = options.pop("teacher", None)
    policy = Policy(path, LORA, device="cpu", **options)
    learner = Learner(policy, Schedule(**schedule, packing=packing), 0.8, owned=owned or Owned(), teacher=teacher)
    in_double(policy.model)
    learner.own.double()
    draw = torch.Generator().manual_seed(0)
    for p in learner.own.parameters():
        torch.nn.init.normal_(p, 0, 0.1, draw)
    return learner


def double(batch: Batch) -> Batch:
    found = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return Batch(**{name: t.double() if t.is_floating_point() else t for name, t in found.items()})


def row(prompt: list[int], said: list[int], holes: bool = False, score: float = 1.0) -> Trajectory:
    """A trajectory; with holes, every third token after the first is a tool's, and the last."""
    mask = [False] * len(prompt) + [not holes or (i % 3 != 1 and i < len(said) - 1) for i in range(len(said))]
    logprobs = [-2.0 if chosen else NAN for chosen in mask]
    sample = Sample(prompt + said, mask, logprobs, [0.0] * len(mask), version=0)
    return Trajectory(Task("t", ()), (), [sample], score=score)


def drawn(shape: str) -> list[Group]:
    """Groups of a kind: rows of 1 to 30 tokens, one without any choice; prompts shared, mixed or of each row's own."""
    draw = random.Random(3)

    def speak(n: int) -> list[int]:
        return [draw.randrange(3, 300) for _ in range(n)]

    if shape == "spread":
        rows = [row(speak(n), speak(m), m > 4) for n, m in ((1, 0), (1, 1), (1, 29), (2, 3), (9, 12), (12, 2), (1, 2))]
        return [(one,) for one in rows]
    groups = []
    for _ in range(3):
        prompt = speak(draw.randint(8, 20))
        groups.append(tuple(row(prompt, speak(draw.randint(1, 12)), i % 2 == 1, float(i)) for i in range(4)))
    if shape == "shared":
        return groups
    return [*groups[:2], (row(speak(3), speak(20)), row(speak(30), speak(1))), *groups[2:]]


SHAPES = ("spread", "shared", "mixed")


def alone(learner: Learner, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Each row's distributions at the temperature, and its hidden states: one plain pass per row without padding."""
    logits, hidden = [], []
    for tokens, valid in zip(batch.tokens, batch.valid, strict=True):
        out = learner.policy.model(input_ids=tokens[valid][None], output_hidden_states=True)
        logits.append(out.logits[0] / 0.8)
        hidden.append(out.hidden_states[-1][0])
    return logits, hidden


def in_loops(learner: Learner, batch: Batch) -> Outputs:
    """What a forward pass gives, token by token from each row alone."""
    logits, hidden = alone(learner, batch)
    zero = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    logprobs, entropy, values = zero.clone(), zero.clone(), zero.clone()
    scores, kept = torch.zeros(*zero.shape, 2, dtype=torch.float64), []
    for i in range(len(batch)):
        places = batch.valid[i].nonzero().flatten().tolist()
        for k, j in enumerate(places):
            scores[i, j] = learner.own.get_submodule("head")(hidden[i][k])
            if batch.mask[i, j]:
                distribution = logits[i][k - 1].log_softmax(-1)
                logprobs[i, j] = distribution[batch.tokens[i, j]]
                entropy[i, j] = -(distribution.exp() * distribution).sum()
                values[i, j] = scores[i, j - 1, 0]
                kept.append(logits[i][k - 1])
    return Outputs(logprobs, entropy, values, scores, torch.stack(kept))


def mixed_up(outputs: Outputs) -> Tensor:
    """A number that depends on all that a pass gives, differently on each entry."""
    draw = torch.Generator().manual_seed(1)
    parts = [outputs.logprobs, outputs.entropy, outputs.values, outputs.scores, outputs.logits]
    return sum(
        (
            (part * torch.randn(part.shape, generator=draw, dtype=part.dtype)).sum()
            for part in parts
            if part is not None
        ),
        torch.zeros((), dtype=torch.float64),
    )


def gradients(learner: Learner, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*learner.trained().items(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters), strict=True))


def close(found: Any, wanted: Any, tolerance: float) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)


@both_ways
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_trap_29_packed_rows_are_those_of_each_row_alone(
    tiny_model: Path, shape: str, side: Literal["right", "left"], recomputed: bool
) -> None:
    """Log-probs, entropies, logits, the head's scores and values, and the gradient of them all."""
    learner = wide(tiny_model, Owned(head=2), gradient_checkpointing=recomputed)
    learner.policy.model.train()
    batch = double(Batch.of(drawn(shape), side=side))
    assert (shape == "spread") == all(len(piece) == 1 for pieces in plan_of(learner, batch).bins for piece in pieces)
    found, wanted = learner.forward(batch, logits=True), in_loops(learner, batch)
    for name in ("logprobs", "entropy", "values", "scores", "logits"):
        close(getattr(found, name), getattr(wanted, name), 1e-10)
    slope = gradients(learner, mixed_up(wanted))
    for name, gradient in gradients(learner, mixed_up(found)).items():
        assert float(slope[name].abs().max()) > 0
        assert float((gradient - slope[name]).abs().max()) <= 1e-10 * float(slope[name].abs().max()), name


@both_ways
@pytest.mark.parametrize("shape", SHAPES)
def test_trap_29_in_float32(tiny_model: Path, shape: str) -> None:
    policy = Policy(tiny_model, LORA, device="cpu")
    batch = Batch.of(drawn(shape))
    one, each = (Forward(policy, 1.0, packing=packing)(batch) for packing in ("on", "off"))
    scale = float(each.logprobs.detach().abs().max())
    assert float((one.logprobs - each.logprobs).abs().max()) <= 1e-6 * scale
    assert float((one.entropy - each.entropy).abs().max()) <= 1e-6 * scale


@both_ways
@pytest.mark.parametrize("shape", SHAPES)
def test_trap_29_positions_restart_at_each_row_and_no_token_is_computed_twice(
    tiny_model: Path, watched: Watching, shape: str
) -> None:
    batch, learner = double(Batch.of(drawn(shape))), wide(tiny_model)
    learner.forward(batch)  # which measures what may be done
    with watched(learner.policy) as read:
        learner.forward(batch)
    (given,) = read
    rows = Rows.of(batch)
    layout = packed(batch.tokens, batch.valid, rows, plan_of(learner, batch))
    assert torch.equal(given["input_ids"], layout.tokens)
    for cell, valid, tokens in zip(layout.cell, batch.valid, batch.tokens, strict=True):
        assert torch.equal(given["position_ids"].flatten()[cell[valid]], torch.arange(int(valid.sum())))
        assert torch.equal(given["input_ids"].flatten()[cell[valid]], tokens[valid])
    assert given["input_ids"].numel() < batch.tokens.numel() / 1.5


@both_ways
@pytest.mark.parametrize("shape", SHAPES)
def test_trap_29_attention_never_crosses_from_row_to_row(tiny_model: Path, shape: str) -> None:
    """Every token of a row's own changed, no other row's numbers change; and no gradient goes there."""
    learner = wide(tiny_model, Owned(head=1))
    groups = drawn(shape)
    batch = double(Batch.of(groups))
    whole = learner.forward(batch)
    first = next(i for i in range(len(batch)) if int(batch.mask[i].sum()) > 3)
    said = batch.mask[first].long().cumsum(0) > 0
    other = batch.with_(tokens=torch.where(said & (torch.arange(len(batch)) == first)[:, None], 7, batch.tokens))
    assert plan_of(learner, other) == plan_of(learner, batch)
    changed = learner.forward(other)
    rest = torch.arange(len(batch)) != first
    for name in ("logprobs", "entropy", "values", "scores"):
        close(getattr(changed, name)[rest], getattr(whole, name)[rest], 1e-12)
    assert float((changed.logprobs - whole.logprobs)[first].abs().max()) > 1e-3


def plan_of(learner: Learner, batch: Batch) -> Plan:
    return ways_of(trunk_of(learner.policy.model)).plan(Rows.of(batch), range(len(batch)), REACH)


@both_ways
@pytest.mark.parametrize("shape", SHAPES)
def test_trap_29_no_gradient_reaches_what_another_row_read(tiny_model: Path, shape: str) -> None:
    learner, batch = wide(tiny_model), double(Batch.of(drawn(shape)))
    learner.forward(batch)  # which measures what may be done
    read: list[Tensor] = []

    def keep(_: Any, __: Any, out: Tensor) -> Tensor:
        read.append(out.detach().requires_grad_())
        return read[-1]

    hook = learner.policy.causal_lm.get_input_embeddings().register_forward_hook(keep)
    outputs = learner.forward(batch)
    hook.remove()
    rows = Rows.of(batch)
    layout = packed(batch.tokens, batch.valid, rows, plan_of(learner, batch))
    for i in batch.mask.any(1).nonzero().flatten().tolist():
        (slope,) = torch.autograd.grad(outputs.logprobs[i].sum(), read[0], retain_graph=True)
        touched = slope.flatten(0, 1).abs().sum(1) > 0
        last = int(batch.mask[i].nonzero().max())
        own = torch.zeros_like(touched)
        own[layout.cell[i, :last][batch.valid[i, :last]]] = True
        assert torch.equal(touched, own)


def test_trap_18_what_the_trunk_has_where_nothing_stands_reaches_no_gradient(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlft.packing.may", lambda trunk: False)  # by segments nothing is filled up
    learner, batch = wide(tiny_model, Owned(head=1)), double(Batch.of(drawn("mixed")))
    layout = packed(batch.tokens, batch.valid, Rows.of(batch), plan_of(learner, batch))
    assert not layout.used.all()
    wanted = gradients(learner, mixed_up(learner.forward(batch)))

    def spoil(module: Any, given: Any, out: Any) -> None:
        out.last_hidden_state = torch.where(layout.used.view(layout.tokens.shape)[:, :, None], out[0], torch.nan)

    hook = learner.policy.causal_lm.model.register_forward_hook(spoil)
    found = gradients(learner, mixed_up(learner.forward(batch)))
    hook.remove()
    for name, gradient in wanted.items():
        close(found[name], gradient, 1e-12)


# --- the model's own guesses among what it reads ---------------------------------------------------------------------


def guessed(learner: Learner, batch: Batch, share: float) -> Tensor:
    """Log-probs of the chosen tokens with guesses among the embeddings, row by row and position by position."""
    model, embed = learner.policy.model, learner.policy.causal_lm.get_input_embeddings().weight.detach()
    found = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    for i in batch.mask.any(1).nonzero().flatten().tolist():
        places = batch.valid[i].nonzero().flatten().tolist()
        tokens = batch.tokens[i][batch.valid[i]]
        with torch.no_grad():
            first = model(input_ids=tokens[None]).logits[0]
            read = embed[tokens].clone()
            for k, place in enumerate(places):
                if batch.mask[i, place]:
                    read[k] = (1 - share) * embed[tokens[k]] + share * embed[int(first[k - 1].argmax())]
        logits = model(inputs_embeds=read[None]).logits[0] / 0.8
        for k, place in enumerate(places):
            if batch.mask[i, place]:
                found[i, place] = logits[k - 1].log_softmax(-1)[tokens[k]]
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("packing", ["on", "off"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_guesses_are_read_in_the_share_that_is_asked_for(
    tiny_model: Path, shape: str, packing: str, recomputed: bool
) -> None:
    """Value and gradient; a share of 0 is the plain pass, a share of 1 reads guesses only."""
    learner = wide(tiny_model, packing=packing, gradient_checkpointing=recomputed)
    learner.policy.model.train()
    batch = double(Batch.of(drawn(shape)))
    plain = learner.forward(batch).logprobs
    for share in (0.2, 1.0):
        found, wanted = learner.forward(batch, residual=share).logprobs, guessed(learner, batch, share)
        close(found, wanted, 1e-10)
        assert float((found - plain).abs().max()) > 1e-3
        slope = gradients(learner, wanted.square().sum())
        for name, gradient in gradients(learner, found.square().sum()).items():
            assert float((gradient - slope[name]).abs().max()) <= 1e-10 * float(slope[name].abs().max()), name
    close(learner.forward(batch, residual=1e-14).logprobs, plain, 1e-10)


# --- the learner ------------------------------------------------------------------------------------------------------


def named(**knobs: Any) -> Algorithm:
    return TypeAdapter(AlgorithmConfig).validate_python(knobs).build()


KNOBS: dict[str, dict[str, Any]] = {
    "groups": {"type": "grpo", "kl": 0.2},
    "pairs": {"type": "dpo"},
    "critic": {"type": "ppo", "kl": 0.1, "entropy": 0.01},
    "recorded": {"type": "sft"},
    "residual": {"type": "ift", "targets": "all"},
    "reward model": {"type": "reward_model", "centre": 0.01},
    "distributions": {"type": "gkd"},
}


@pytest.mark.parametrize("name", KNOBS)
@pytest.mark.parametrize("budget", [1, 50, HUGE])
def test_trap_29_updates_are_those_of_padded_rows(
    tiny_model: Path, make_groups: MakeGroups, name: str, budget: int
) -> None:
    """Trap 7 as well: the budget of a micro-batch changes nothing."""
    algorithm, groups = named(**KNOBS[name]), make_groups(3, 4, seed=3, longest=14)
    for group in groups:
        for i, trajectory in enumerate(group):
            trajectory.score = float(i)
    batch = double(Batch.of(algorithm.select(groups)))
    found = []
    for packing, micro_tokens in (("off", HUGE), ("on", budget)):
        teacher = None
        if "teacher_logprobs" in algorithm.needs or algorithm.distributions:
            teacher = Policy(tiny_model, LORA, device="cpu", seed=5).model.eval().requires_grad_(False)
            in_double(teacher)
        schedule = {"micro_tokens": micro_tokens, "optimizer": "sgd", "lr": 0.1}
        learner = wide(tiny_model, algorithm.owned, packing, schedule=schedule, teacher=teacher)
        metrics = [learner.update(batch, algorithm) for _ in range(2)]
        found.append((metrics, {k: p.detach() for k, p in learner.trained().items()}))
    assert found[0][0][0]["loss/grad_norm"] > 1e-3
    close(found[1][0], found[0][0], 1e-9)
    close(found[1][1], found[0][1], 1e-9)


def test_a_loss_of_the_head_alone_makes_no_logits(tiny_model: Path, make_groups: MakeGroups) -> None:
    """Nor do a critic's values before the update; an algorithm that reads log-probs makes them."""
    groups = make_groups(3, 4, seed=3)
    for group in groups:
        for i, trajectory in enumerate(group):
            trajectory.score = float(i)
    for knobs, calls in (({"type": "reward_model"}, 0), ({"type": "ppo"}, 1)):
        algorithm = named(**knobs)
        learner = wide(tiny_model, algorithm.owned)
        made: list[int] = []
        learner.policy.causal_lm.lm_head.register_forward_hook(lambda *_, made=made: made.append(1))
        batch = double(Batch.of(algorithm.select(groups)))
        metrics = learner.update(batch, algorithm)
        assert len(made) == calls
        assert metrics["loss/grad_norm"] > 0
    outputs = learner.forward(batch, vocabulary=False)
    assert outputs.logprobs[batch.mask].isnan().all()
    close(outputs.values, learner.forward(batch).values, 0.0)


# --- which models -----------------------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
RECURRENT: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "lru_width": 64,
}  # fmt: skip
HEADS: dict[str, Any] = {**SMALL, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}


def trunk(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    made: dict[str, Callable[[], PreTrainedModel]] = {
        "llama": lambda: LlamaModel(LlamaConfig(**HEADS)),
        "eager": lambda: LlamaModel._from_config(LlamaConfig(**HEADS), attn_implementation="eager"),
        "learned positions": lambda: GPT2Model(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2)),
        "windows": lambda: MistralModel(MistralConfig(**HEADS, sliding_window=4)),
        "states": lambda: MambaModel(MambaConfig(**SMALL, state_size=4)),
    }
    return made[name]()


@pytest.mark.parametrize(
    ("name", "packs", "shares", "segmented"),
    [
        ("llama", True, True, True),
        ("learned positions", True, True, True),
        ("eager", True, False, False),  # its masks are numbers to be added
        ("windows", True, False, False),
        ("states", False, False, False),
    ],
)
def test_what_may_be_packed_is_measured(name: str, packs: bool, shares: bool, segmented: bool) -> None:
    model = trunk(name).train()
    next(model.children()).eval()
    were = [module.training for module in model.modules()]
    assert exact(model, shares=False) is packs
    assert exact(model, shares=True) is shares
    before = model.config._attn_implementation
    assert ways_of(model).segmented is segmented
    assert model.config._attn_implementation == (NAME if segmented else before)
    assert [module.training for module in model.modules()] == were


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_little_of_another_row_is_too_much(dtype: torch.dtype) -> None:
    """State layers that tell rows apart by a restart of their own hand on less than a coarse bound notices."""
    for scale, packs in ((0.0, True), (0.05, False)):
        model = trunk("llama")
        nn.Module.to(model, dtype)

        def leak(module: nn.Module, given: Any, out: Tensor, scale: float = scale) -> Tensor:
            return out + scale * torch.cat([torch.zeros_like(out[:, :4]), out[:, :-4]], 1)

        model.get_submodule("norm").register_forward_hook(leak)
        assert exact(model, shares=False) is packs
        assert exact(model, shares=True) is packs
        assert ways_of(model) == Ways(packs, packs, packs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_layers_are_not_packed(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = RecurrentGemmaModel(RecurrentGemmaConfig(**RECURRENT))
    nn.Module.to(model, dtype)
    assert not exact(model, shares=False)
    assert not exact(model, shares=True)


def test_rows_longer_than_a_sliding_window(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = MistralConfig(**HEADS, sliding_window=4, initializer_range=0.3)
    MistralForCausalLM(config).save_pretrained(tmp_path)
    policy = Policy(tmp_path, LORA, device="cpu")
    policy.model.double()
    batch = double(Batch.of(drawn("mixed")))
    one, each = (Forward(policy, 1.0, packing=packing)(batch) for packing in ("on", "off"))
    close(one.logprobs, each.logprobs, 1e-6)  # its norm rounds to float32


def test_on_is_refused_and_auto_pads_where_rows_would_mix(tiny_model: Path, watched: Watching) -> None:
    policy = Policy(tiny_model, LORA, device="cpu")
    policy.causal_lm.config.layer_types = ["chunked_attention"] * 2
    with pytest.raises(InputError, match=r"learner\.packing: .*learner\.packing=auto"):
        Forward(policy, 1.0, packing="on")
    batch = Batch.of(drawn("spread"))
    padding = Forward(policy, 1.0, packing="auto")
    padding(batch)
    with watched(policy) as read:
        padding(batch)
    assert read[0]["input_ids"].shape == batch.tokens.shape


def test_the_trunk_is_found_whatever_is_around_it(tiny_model: Path) -> None:
    policy = Policy(tiny_model, LORA, device="cpu")
    assert trunk_of(nn.ModuleList([policy.model])) is policy.causal_lm.model
    assert trunk_of(nn.Linear(2, 2)) is None


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shares", [False, True])
def test_a_plan_holds_every_row_once_and_wastes_no_more_than_padding(seed: int, shares: bool) -> None:
    draw = random.Random(seed)
    prompts = [draw.randint(1, 40) for _ in range(4)]
    owner = [draw.randrange(4) for _ in range(draw.randint(1, 30))]
    whole = [prompts[o] + draw.randint(0, draw.choice([5, 80])) for o in owner]
    rows = Rows(whole, [prompts[o] for o in owner], owner)
    made = plan(rows, range(len(owner)), REACH, shares)
    pieces = [piece for pieces in made.bins for piece in pieces]
    assert sorted(i for piece in pieces for i in piece) == list(range(len(owner)))
    for some in made.bins:
        size = sum(sum(whole[i] for i in p) - (len(p) - 1) * rows.prompts[p[0]] for p in some)
        assert size <= made.width
    assert all(len({owner[i] for i in piece}) == 1 for piece in pieces)
    assert shares or all(len(piece) == 1 for piece in pieces)
    width = max(whole)
    assert made.tokens * (1 + made.width / REACH) <= len(whole) * width * (1 + width / REACH) + 1e-9


def test_plans_by_hand() -> None:
    apart = Rows([10, 4, 6, 3], [1, 1, 1, 1], [0, 1, 2, 3])
    assert plan(apart, range(4), 1e9, True).tokens == 23
    assert plan(apart, range(3), 1.0, True) == Plan((((0,),), ((2,), (1,))), 10)
    group = Rows([10, 11, 9], [8, 8, 8], [0, 0, 0])
    assert plan(group, range(3), 1e9, True) == Plan((((0, 1, 2),),), 14)
    assert plan(group, range(3), 1e9, False).tokens == 30
    short = Rows([10] * 4, [2] * 4, [0] * 4)  # behind one prompt 34 tokens that all pay for 34: more than 40 for 10
    assert plan(short, range(4), 1e9, True).tokens == 34
    assert plan(short, range(4), 1.0, True).width == 10


@pytest.mark.parametrize("limit", range(12))
@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_the_most_that_fits(limit: int, count: int) -> None:
    assert most(lambda n: n <= limit, count) == max(1, min(limit, count))
