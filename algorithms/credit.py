"""Who earned what: functions that fill `advantages`. All compare trajectories, not rows: a trajectory that an
environment split into several samples counts once. Computed in float64."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlft.algorithms.base import Credit, row_sum
from rlft.batch import Batch
from rlft.types import least


def uniform(batch: Batch) -> Batch:
    """1 on every chosen token: what was selected is imitated."""
    return _spread(batch, torch.ones(len(batch), dtype=torch.float64, device=batch.tokens.device))


def centred(batch: Batch) -> Batch:
    """score - group mean, unscaled: Dr. GRPO (Liu et al. 2025, arXiv:2503.20783). Groups without spread get 0."""
    return _by_group(batch, lambda scores, each, _: scores - each.mean())


def group_relative(batch: Batch, scale: bool = True, epsilon: float = 1e-4) -> Batch:
    """(score - group mean) / (group std + epsilon), the std with n - 1; without `scale`, `centred`.

    GRPO (Shao et al. 2024, arXiv:2402.03300, section 4.1); epsilon and n - 1 as in TRL. A group of one, or one whose
    scores are equal up to rounding, gets exactly 0.
    """
    if not scale:
        return centred(batch)
    return _by_group(batch, lambda scores, each, _: (scores - each.mean()) / (each.std() + epsilon))


def batch_scaled(batch: Batch, epsilon: float = 1e-4) -> Batch:
    """(score - group mean) / (std of all scores of the batch + epsilon), the std with n - 1.

    "Lite PPO" (Liu et al. 2025, arXiv:2508.08221); epsilon and n - 1 as in TRL's `scale_rewards="batch"`.
    """
    filled, each = centred(batch), _each(batch)
    return _scaled(filled, 0.0 if len(each) < 2 else float(1 / (each.std() + epsilon)))


def leave_one_out(batch: Batch) -> Batch:
    """score - mean of the other scores in the group = n / (n - 1) * (score - group mean); 0 for a group of one.

    RLOO (Ahmadian et al. 2024, arXiv:2402.14740; Kool et al. 2019).
    """
    return _by_group(batch, lambda scores, each, _: (scores - each.mean()) * len(each) / (len(each) - 1))


def raw(batch: Batch) -> Batch:
    """The score itself, no baseline (Williams 1992)."""
    return _spread(batch, batch.scores.double())


def batch_centred(batch: Batch) -> Batch:
    """score - mean over all trajectories of the batch; exactly 0 where all are equal up to rounding."""
    each = _each(batch)
    if not len(each) or _equal(each):
        return _spread(batch, torch.zeros_like(batch.scores, dtype=torch.float64))
    return _spread(batch, batch.scores.double() - each.mean())


def against(batch: Batch, baseline: float) -> Batch:
    """score - a number that was known before the batch was sampled, so that the gradient is not biased by it."""
    return _spread(batch, batch.scores.double() - baseline)


def informed(batch: Batch) -> Batch:
    """`centred`, times groups / (groups with spread): groups that teach nothing do not dilute the others.

    GPG with F_norm = 1 and alpha = B / (B - M), M the groups without spread (Chu et al. 2025, arXiv:2504.02546), as the
    authors' code has it: there the loss is divided by the share of groups with spread. verl counts scores other than 0
    in place of groups. The paper's resampling until a share beta_th of the groups has spread is not part of it.
    """
    found = _groups(batch)
    telling = sum(len(scores[first]) > 1 and not _equal(scores[first]) for _, scores, first in found)
    return _scaled(centred(batch), len(found) / max(telling, 1))


def length_weighted(batch: Batch) -> Batch:
    """score - sum(length * score) / sum(length) over the group: the baseline of least variance.

    OPO (Hao et al. 2025, arXiv:2505.23585), as in verl, under its assumption that a trajectory's squared gradient grows
    with its length, which is counted in chosen tokens over all its rows.
    """
    return _by_group(batch, lambda scores, each, lengths: scores - (lengths * each).sum() / lengths.sum().clamp(min=1))


def mean_scaled(batch: Batch) -> Batch:
    """(score - group mean) / group mean: for scores 0 and 1, the gradient of log(success rate).

    MaxRL (Tajwar et al. 2026, arXiv:2602.02710), as in the authors' code but without its 1e-6 beside the mean. A group
    whose mean is not above 0 gets 0: with scores of 0 and 1 nobody succeeded there.
    """

    def advantage(scores: Tensor, each: Tensor, _: Tensor) -> Tensor:
        centre = each.mean()
        return (scores - centre) / centre if centre > 0 else torch.zeros_like(scores)

    return _by_group(batch, advantage)


def pass_at(batch: Batch, k: int, at_least: float) -> Batch:
    """The analytic advantage of pass@k over a group of n with m failures (score below `at_least`).

    R = 1 - C(m, k) / C(n, k), sigma = sqrt(R (1 - R)); a success gets (1 - R) / sigma, a failure
    (1 - R - C(m - 1, k - 1) / C(n - 1, k - 1)) / sigma (Chen et al. 2025, arXiv:2508.10751, the analytical
    derivation, as in the authors' code but without its 1e-6 beside sigma). 0 where every k-subset passes or none does,
    and in groups smaller than k.
    """

    def advantage(scores: Tensor, each: Tensor, _: Tensor) -> Tensor:
        n, m = len(each), int((each < least(at_least)).sum())
        rate = 1 - math.comb(m, k) / math.comb(n, k) if n >= k else 0.0
        if not 0 < rate < 1:
            return torch.zeros_like(scores)
        failed = 1 - rate - math.comb(m - 1, k - 1) / math.comb(n - 1, k - 1)
        passed = scores >= least(at_least)
        return torch.where(passed, torch.full_like(scores, 1 - rate), failed) / math.sqrt(rate * (1 - rate))

    return _by_group(batch, advantage)


def whitened(batch: Batch, credit: Credit) -> Batch:
    """What `credit` gives, minus its mean and over its std (n - 1) over the chosen tokens of the whole batch.

    REINFORCE++'s global normalisation (Hu et al. 2025, arXiv:2501.03262), over tokens as in verl and in the authors'
    OpenRLHF; around `centred` it is the paper's variant with a baseline. Fewer than two tokens, or no spread beyond
    rounding, give exactly 0.
    """
    filled = credit(batch)
    picked = filled.advantages[batch.mask].double()
    if picked.numel() < 2 or _equal(picked):
        return filled.with_(advantages=torch.zeros_like(filled.advantages))
    white = (filled.advantages.double() - picked.mean()) / (picked.std() + 1e-8)
    return filled.with_(advantages=torch.where(batch.mask, white, 0.0).to(filled.advantages.dtype))


def charged(batch: Batch, credit: Credit, kl: float) -> Batch:
    """`credit` of score - kl * sum over the trajectory's tokens of (old log p - ref log p): KL in the reward.

    The k1 estimate, the only one whose place is the reward: E[k1 grad log p] is the gradient of the KL (Ahmadian et
    al. 2024, arXiv:2402.14740; as in TRL's RLOO). Scores in the result are those of the reward alone.
    """
    per_row = row_sum(batch.old_logprobs - batch.ref_logprobs, batch).double()
    same = (batch.trajectory[:, None] == batch.trajectory).double()
    lower = batch.with_(scores=batch.scores.double() - kl * (same @ per_row))
    return credit(lower).with_(scores=batch.scores)


def charged_to_go(batch: Batch, credit: Credit, kl: float) -> Batch:
    """`credit`, less kl * the sum of (old log p - ref log p) over this and the row's later tokens.

    REINFORCE++'s per-token KL reward with discount 1 (Hu et al. 2025, arXiv:2501.03262).
    """
    filled = credit(batch)
    cost = torch.where(batch.mask, (batch.old_logprobs - batch.ref_logprobs).double(), 0.0)
    later = cost.flip(1).cumsum(1).flip(1)
    paid = torch.where(batch.mask, filled.advantages.double() - kl * later, 0.0)
    return filled.with_(advantages=paid.to(filled.advantages.dtype))


def to_go(batch: Batch, credit: Credit, share: float) -> Batch:
    """`credit`, plus `share` of what is paid at this and the row's later tokens.

    Payments stand in `rewards`: an environment's, a reward's that judges turn by turn, or a block's gain in the chance
    of success (`progress`). Of the latter, what is still to come has the mean 0 at every place, the chance there being
    its baseline, as in VinePPO (Kazemnejad et al. 2024, arXiv:2410.01679).
    """
    filled = credit(batch)
    paid = torch.where(batch.valid, batch.rewards, 0.0).double()
    later = paid.flip(1).cumsum(1).flip(1)
    more = torch.where(batch.mask, filled.advantages.double() + share * later, 0.0)
    return filled.with_(advantages=more.to(filled.advantages.dtype))


def overlong(batch: Batch, credit: Credit, limit: int, buffer: int) -> Batch:
    """`credit` after DAPO's soft punishment (Yu et al. 2025, arXiv:2503.14476, eq. 13) is added to the scores.

    For n chosen tokens of a trajectory: 0 up to limit - buffer, then linear down to -1 at `limit`, -1 beyond.
    """
    tokens = batch.mask.sum(1).double()
    lengths = (batch.trajectory[:, None] == batch.trajectory).double() @ tokens
    punished = ((limit - buffer - lengths) / buffer).clamp(-1, 0)
    return credit(batch.with_(scores=batch.scores.double() + punished)).with_(scores=batch.scores)


def without_truncated(batch: Batch, credit: Credit) -> Batch:
    """`credit`, then rows that the engine cut off are masked out: no gradient and no share of the average.

    DAPO's overlong filtering (arXiv:2503.14476), as TRL's `mask_truncated_completions`. Their scores still count in
    the baseline of their group.
    """
    filled = credit(batch)
    kept = batch.mask & ~batch.truncated[:, None]
    return filled.with_(mask=kept, advantages=torch.where(kept, filled.advantages, 0.0))


def _by_group(batch: Batch, advantage: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Batch:
    """advantage(scores of rows, scores of trajectories, their lengths) per group; 0 without two unequal scores."""
    advantages = torch.zeros(len(batch), dtype=torch.float64, device=batch.tokens.device)
    tokens = batch.mask.sum(1).double()
    for rows, scores, first in _groups(batch):
        each = scores[first]
        if len(each) < 2 or _equal(each):
            continue
        mine = batch.trajectory[rows][first][:, None] == batch.trajectory[rows]
        advantages[rows] = advantage(scores, each, mine.double() @ tokens[rows])
    return _spread(batch, advantages)


def _each(batch: Batch) -> Float[Tensor, " n"]:
    """The score of every trajectory once."""
    parts = [scores[first] for _, scores, first in _groups(batch)]
    return torch.cat(parts) if parts else batch.scores.double()


def _scaled(batch: Batch, factor: float) -> Batch:
    """The same with its advantages times a number."""
    return batch.with_(advantages=batch.advantages * factor)


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
