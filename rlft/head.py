"""Log-probs straight from hidden states: the head for the vocabulary and the softmax in one, a few rows at a time.

There never is a matrix of all tokens by all words. The gradient of a log-prob with respect to its hidden state is
(W[target] - sum_v p_v W[v]) / temperature, and the loss only multiplies it by one number per token. So it is made in
the forward pass, where the probabilities are at hand, and what is kept for the backward is one vector per token. The
entropy's gradient is seldom asked for; then the words are gone through once more. For a head that is not trained.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlft.kernels import ROWS as BLOCK
from rlft.kernels import entropy_slope, product, scaled, softened
from rlft.packing import calm

ROWS = 256  # of 49,152 words 50 MB in float32; fewer would read the head's weight too often

# What transformers' models call it.
ALTERING = ("final_logit_softcapping", "logits_scaling", "logit_scale", "output_multiplier")


def spoken(
    hidden: Float[Tensor, "n d"], head: nn.Linear, targets: Int[Tensor, " n"], temperature: float
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Log-probs of the targets at a temperature, and each distribution's entropy in nats; see `kernels.score`."""
    return _Spoken.apply(hidden, head.weight, head.bias, targets, temperature)


def untrained(head: Any) -> bool:
    """Whether this is a linear layer and nothing else, that no optimizer moves and nobody watches."""
    plain = type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks
    return plain and not any(p.requires_grad for p in head.parameters())


def altered(config: Any) -> bool:
    """Whether a model of this text config caps or scales its logits, by its word, where nothing can be measured."""
    return any(getattr(config, name, None) not in (None, 1, 1.0) for name in ALTERING)


def with_hidden(out: Any, hidden: Tensor) -> Any:
    """What a trunk gave, with another last hidden state."""
    if isinstance(out, tuple):
        return (hidden, *out[1:])
    out.last_hidden_state = hidden
    return out


@torch.no_grad()
def plain_head(model: Any, trunk: nn.Module) -> nn.Linear | None:
    """The model's head, if its logits are this linear layer of the trunk's last hidden state and nothing more.

    Measured on a hidden state that is made up and large, so that a cap shows as well as a scale.
    """
    inner = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    head: Any = inner.get_output_embeddings()
    if not untrained(head):
        return None
    weight, draw = head.weight, torch.Generator().manual_seed(0)
    large = (30 * torch.randn(1, 2, weight.shape[1], generator=draw)).to(weight.device, weight.dtype)

    hook = trunk.register_forward_hook(lambda _, __, out: with_hidden(out, large))
    try:
        with calm(trunk):
            found = model(input_ids=torch.tensor([[5, 6]], device=weight.device), use_cache=False).logits
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError):
        return None
    finally:
        hook.remove()
    wanted = head(large)
    same = found.shape == wanted.shape
    return head if same and torch.allclose(found.to(wanted), wanted, rtol=1e-5, atol=1e-5) else None


class _Spoken(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        found = []
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            logits = product(hidden[rows], weight, bias)
            for block, target in zip(logits.split(BLOCK), targets[rows].split(BLOCK), strict=True):
                logprobs, entropy, _, odds, total = softened(block, target, temperature)
                found.append((logprobs, entropy))
                if slopes is not None:
                    change = odds.div_(-total[:, None])
                    block.copy_(change.scatter_add_(1, target[:, None], torch.ones_like(change[:, :1])))
            if slopes is not None:
                slopes[rows] = product(logits, weight.t())
        logprobs, entropy = (torch.cat(part) for part in zip(*found, strict=True))
        ctx.save_for_backward(hidden, weight, bias, slopes, entropy)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, slopes, entropies = ctx.saved_tensors
        to_logprobs, to_entropy = grads
        if to_logprobs is None and to_entropy is None:
            return None, None, None, None, None
        found = torch.zeros_like(hidden)
        if to_logprobs is not None:
            found += slopes * (to_logprobs / ctx.temperature).to(hidden.dtype)[:, None]
        if to_entropy is not None:
            share = (to_entropy / ctx.temperature)[:, None]
            for start in range(0, len(hidden), ROWS):
                rows = slice(start, start + ROWS)
                logged = scaled(product(hidden[rows], weight, bias), ctx.temperature).log_softmax(-1)
                change = entropy_slope(logged, entropies[rows]) * share[rows]
                found[rows] += product(change.to(weight.dtype), weight.t())
        return found, None, None, None, None
