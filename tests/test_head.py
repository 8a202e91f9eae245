"""Log-probs from hidden states without a matrix of logits: the numbers and gradients of the whole computation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GraniteConfig, GraniteForCausalLM

import rlft.forward as forward
from rlft.batch import Batch
from rlft.head import altered, plain_head, spoken, untrained
from rlft.packing import trunk_of
from rlft.policy import Policy
from rlft.types import Group

SMALL: dict[str, Any] = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip


def drawn(n: int, bias: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, nn.Linear, Tensor]:
    torch.manual_seed(n)
    head = nn.Linear(24, 70, bias=bias).to(dtype).requires_grad_(False)
    hidden = (3 * torch.randn(n, 24, dtype=dtype)).requires_grad_()
    return hidden, head, torch.randint(0, 70, (n,))


def written_out(hidden: Tensor, head: nn.Linear, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logged = (head(hidden) / temperature).log_softmax(-1)
    return logged.gather(-1, targets[:, None])[:, 0], -(logged.exp() * logged).sum(-1)


@pytest.mark.parametrize("n", [1, 31, 600])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("asked", ["logprobs", "entropy", "both"])
def test_values_and_gradients_of_the_whole_computation(n: int, bias: bool, asked: str) -> None:
    hidden, head, targets = drawn(n, bias)
    weigh = torch.randn(2, n, dtype=torch.float64)
    found, wanted = (way(hidden, head, targets, 0.7) for way in (spoken, written_out))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    parts = {"logprobs": [0], "entropy": [1], "both": [0, 1]}[asked]
    sums = [torch.stack([(said[i] * weigh[i]).sum() for i in parts]).sum() for said in (found, wanted)]
    slopes = [torch.autograd.grad(one, hidden)[0] for one in sums]
    assert float((slopes[0] - slopes[1]).abs().max()) <= 1e-12 * float(slopes[1].abs().max())


def test_without_gradients_nothing_is_kept() -> None:
    hidden, head, targets = drawn(40, False)
    with torch.no_grad():
        logprobs, entropy = spoken(hidden.detach(), head, targets, 1.0)
    wanted = written_out(hidden, head, targets, 1.0)
    torch.testing.assert_close((logprobs, entropy), tuple(part.detach() for part in wanted))
    assert not logprobs.requires_grad


def test_trap_40_extreme_logits_stay_finite() -> None:
    hidden, head, targets = drawn(5, False, torch.float32)
    large = (hidden.detach() * 1e4).requires_grad_()
    logprobs, entropy = spoken(large, head, targets, 1.0)
    (slope,) = torch.autograd.grad(logprobs.sum() + entropy.sum(), large)
    for part in (logprobs, entropy, slope):
        assert torch.isfinite(part).all()


def test_a_head_that_is_trained_or_watched_is_not_plain() -> None:
    head = nn.Linear(4, 8)
    assert not untrained(head)
    head.requires_grad_(False)
    assert untrained(head)
    head.register_forward_hook(lambda *given: None)
    assert not untrained(head)


@pytest.mark.parametrize(
    ("model", "plain"),
    [
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=30.0)), False),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=None)), True),
        (lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)), False),
        (lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=1.0)), True),
    ],
)
def test_what_a_model_does_to_its_logits_is_measured(model: Any, plain: bool) -> None:
    made = model().requires_grad_(False)
    trunk: Any = trunk_of(made)
    before = torch.get_rng_state()
    assert (plain_head(made, trunk) is not None) is plain
    assert altered(made.config.get_text_config()) is not plain, "the memory plan asks the config"
    assert torch.equal(before, torch.get_rng_state())
    assert not trunk._forward_hooks


@pytest.mark.parametrize("adapter", [{"type": "lora", "r": 4, "target_modules": "all-linear"}, None])
def test_the_learner_makes_no_logits_where_the_head_stays(
    tiny_model: Path,
    make_groups: Callable[..., list[Group]],
    adapter: dict[str, Any] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With an adapter none are made; where the head is trained they are."""
    policy = Policy(tiny_model, adapter, device="cpu")
    calls = []

    def passed(*given: Any) -> Any:
        calls.append(given)
        return as_it_is(*given)

    as_it_is = forward.passed
    monkeypatch.setattr(forward, "passed", passed)
    forward.Forward(policy, 1.0, packing="on")(Batch.of(make_groups(2)))
    assert bool(calls) is (adapter is None)
