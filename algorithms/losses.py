"""Objectives to minimise, as weighted sums over chosen tokens. Pure: tensors in, a tensor and statistics out."""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.algorithms.base import Loss, Metrics, Outputs, masked_sum, mean, peak
from rlft.batch import Batch

LIMIT = 20.0  # a log-ratio beyond this is e^20: bounded so that exp never overflows; far outside any clip range


def likelihood(outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
    """- sum w * A * log p: REINFORCE with the advantage given, and maximum likelihood where A is 1.

    Williams 1992; on-policy its gradient is that of `clipped` with a single optimizer step.
    """
    advantages = torch.where(batch.mask, batch.advantages, 0.0)
    loss = -masked_sum(advantages * outputs.logprobs, batch)
    return loss, {"policy/nll": mean(-outputs.logprobs, batch.mask), **_entropy(outputs, batch)}


def clipped(outputs: Outputs, batch: Batch, low: float, high: float) -> tuple[Tensor, Metrics]:
    """- sum w * min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(log p - old log p).

    PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347, eq. 7) per token, as in GRPO.
    """
    gap = _difference(outputs.logprobs, batch.old_logprobs, batch)
    ratio = gap.clamp(-LIMIT, LIMIT).exp()
    advantages = torch.where(batch.mask, batch.advantages, 0.0)
    bounded = ratio.clamp(1 - low, 1 + high)
    loss = -masked_sum(torch.minimum(ratio * advantages, bounded * advantages), batch)
    outside = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    metrics = {
        "policy/ratio_max": peak(ratio, batch.mask),
        "policy/clip_fraction": mean(outside.to(ratio.dtype), batch.mask),
        **_entropy(outputs, batch),
    }
    return loss, metrics


def reference_kl(outputs: Outputs, batch: Batch, coefficient: float) -> tuple[Tensor, Metrics]:
    """coefficient * sum w * (exp(d) - d - 1), d = ref log p - log p: the k3 estimate of KL(policy || reference).

    Schulman 2020, "Approximating KL divergence"; the term of GRPO's eq. 4. Never negative.
    """
    gap = _difference(batch.ref_logprobs, outputs.logprobs, batch).clamp(-LIMIT, LIMIT)
    kl = gap.exp() - gap - 1
    return coefficient * masked_sum(kl, batch), {"kl/ref": mean(kl, batch.mask)}


def total(*terms: Loss) -> Loss:
    """The sum of several objectives, their statistics side by side."""

    def summed(outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        parts = [term(outputs, batch) for term in terms]
        loss = torch.stack([loss for loss, _ in parts]).sum()
        return loss, {name: stat for _, metrics in parts for name, stat in metrics.items()}

    return summed


def _difference(a: Tensor, b: Tensor, batch: Batch) -> Tensor:
    """a - b on chosen tokens, exactly 0 elsewhere, so that a NaN there reaches neither exp nor its gradient."""
    return torch.where(batch.mask, a, 0.0) - torch.where(batch.mask, b, 0.0)


def _entropy(outputs: Outputs, batch: Batch) -> Metrics:
    return {"policy/entropy": mean(outputs.entropy, batch.mask)}
