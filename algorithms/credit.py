"""Who earned what: functions that fill `advantages`. All compare trajectories, not rows: a trajectory that an
environment split into several samples counts once. Computed in float64."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlft.batch import Batch


def uniform(batch: Batch) -> Batch:
    """1 on every chosen token: what was selected is imitated."""
    return _spread(batch, torch.ones(len(batch), dtype=torch.float64, device=batch.tokens.device))


def group_relative(batch: Batch, scale: bool = True, epsilon: float = 1e-4) -> Batch:
    """(score - group mean) / (group std + epsilon), the std with n - 1; without `scale`, score - group mean.

    GRPO (Shao et al. 2024, arXiv:2402.03300, eq. 2 ff.); epsilon and n - 1 as in TRL. Without scale: Dr. GRPO
    (Liu et al. 2025, arXiv:2503.20783). A group of one, or one whose scores are equal up to rounding, gets exactly 0.
    """
    advantages = torch.zeros(len(batch), dtype=torch.float64, device=batch.tokens.device)
    for rows, scores, first in _groups(batch):
        each = scores[first]
        if len(each) < 2 or _equal(each):
            continue
        centred = scores - each.mean()
        advantages[rows] = centred / (each.std() + epsilon) if scale else centred
    return _spread(batch, advantages)


def leave_one_out(batch: Batch) -> Batch:
    """score - mean of the other scores in the group = n / (n - 1) * (score - group mean); 0 for a group of one.

    RLOO (Ahmadian et al. 2024, arXiv:2402.14740; Kool et al. 2019).
    """
    advantages = torch.zeros(len(batch), dtype=torch.float64, device=batch.tokens.device)
    for rows, scores, first in _groups(batch):
        each = scores[first]
        if len(each) < 2 or _equal(each):
            continue
        advantages[rows] = (scores - each.mean()) * len(each) / (len(each) - 1)
    return _spread(batch, advantages)


def _groups(batch: Batch) -> list[tuple[Tensor, Float[Tensor, " n"], Bool[Tensor, " n"]]]:
    """Per group: its rows, their scores, and which of them is the first row of its trajectory."""
    found = []
    for group in batch.group.unique():
        rows = (batch.group == group).nonzero().flatten()
        trajectory = batch.trajectory[rows]
        earliest = (trajectory[:, None] == trajectory).int().argmax(1)
        first = earliest == torch.arange(len(rows), device=rows.device)
        found.append((rows, batch.scores[rows].double(), first))
    return found


def _equal(scores: Float[Tensor, " n"]) -> bool:
    """No spread beyond rounding (trap: eight times 0.1 must not become 1e-9 / 1e-9)."""
    return bool(scores.max() - scores.min() <= 1e-6 * scores.abs().max().clamp(min=1e-3))


def _spread(batch: Batch, advantages: Float[Tensor, " b"]) -> Batch:
    """One number per row onto its chosen tokens, 0 on the others."""
    filled = torch.where(batch.mask, advantages.to(batch.logprobs.dtype)[:, None], 0.0)
    return batch.with_(advantages=filled)
