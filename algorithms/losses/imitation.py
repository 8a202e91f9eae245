"""Imitation: how strongly each target is imitated, and likelihoods that weigh tokens by the policy's own opinion."""

from __future__ import annotations

import torch
from torch import Tensor

from rlft.algorithms.base import Metrics, Outputs, masked_sum, mean
from rlft.algorithms.losses.policy import credited
from rlft.batch import Batch


def boltzmann(batch: Batch, temperature: float) -> Batch:
    """A = n exp(s / temperature) / sum over the group's n trajectories of exp(s / temperature); the mean is 1.

    Reward-weighted regression (Peters and Schaal 2007), as RISE weighs its attempts (Qu et al. 2024,
    arXiv:2407.18219); dividing by the group's sum is rlft's choice, so that no task outweighs the others. In float64.
    """
    scores, groups = batch.scores.double(), int(batch.group.max()) + 1 if len(batch) else 0
    highest = torch.full((groups,), -torch.inf, dtype=torch.float64, device=scores.device)
    highest = highest.scatter_reduce(0, batch.group, scores, "amax")
    strength = ((scores - highest[batch.group]) / temperature).exp()
    once = 1.0 / batch.trajectory.bincount()[batch.trajectory].double()  # a trajectory of several rows counts once
    none = torch.zeros(groups, dtype=torch.float64, device=scores.device)
    total, count = none.index_add(0, batch.group, strength * once), none.index_add(0, batch.group, once)
    advantages = (strength * (count / total)[batch.group]).to(batch.logprobs.dtype)
    return batch.with_(advantages=torch.where(batch.mask, advantages[:, None], 0.0))


def propagated(outputs: Outputs, batch: Batch, gamma: float) -> tuple[Tensor, Metrics]:
    """- sum w A W log p, where W grows with what goes wrong later: W_t = n D_t / sum D, D_t = l_t + gamma D_(t+1).

    l = - log p of a token, n and the sum over the row's chosen tokens, so that W is 1 on average. The dynamic relation
    propagation of Intuitive Fine-Tuning (Hua et al. 2024, arXiv:2405.11870), as in the authors' code with its defaults
    (to the left, normalised by the sum): the gradient goes through W as well. gamma: 0 leaves the likelihood.
    """
    losses = -torch.where(batch.mask, outputs.logprobs, 0.0)
    later, found = torch.zeros_like(losses[:, 0]), []
    for column in range(losses.shape[1] - 1, -1, -1):
        later = torch.where(batch.mask[:, column], losses[:, column] + gamma * later, later)
        found.append(later)
    dues = torch.where(batch.mask, torch.stack(found[::-1], 1), 0.0)
    count = batch.mask.sum(1, keepdim=True)
    shares = dues * count / dues.sum(1, keepdim=True).clamp(min=torch.finfo(dues.dtype).tiny)
    factors = torch.where(batch.mask, shares if gamma else 1.0, 0.0)
    loss = masked_sum(credited(batch) * factors * losses, batch)
    return loss, _measured(outputs, batch)


def confident(outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
    """- sum w A sg(p) log p: a token counts as much as the policy believes in it already.

    Dynamic Fine-Tuning (Wu et al. 2025, arXiv:2508.05629): plain likelihood has the gradient of a policy gradient whose
    reward is 1 / p; the factor p takes that away, so rare tokens no longer dominate. sg: no gradient.
    """
    own = torch.where(batch.mask, outputs.logprobs, 0.0)
    loss = -masked_sum(credited(batch) * own.detach().exp() * own, batch)
    return loss, _measured(outputs, batch)


def _measured(outputs: Outputs, batch: Batch) -> Metrics:
    return {"policy/nll": mean(-outputs.logprobs, batch.mask), "policy/entropy": mean(outputs.entropy, batch.mask)}
