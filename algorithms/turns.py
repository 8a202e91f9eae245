"""Credit and averages from turn to turn, for episodes in which the policy speaks more than once.

A turn is an unbroken run of chosen tokens in a row; the rows of a trajectory follow each other in time. Computed in
float64.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rlft.algorithms.base import Credit
from rlft.algorithms.losses.terms import LIMIT
from rlft.batch import Batch
from rlft.types import ROUNDING

EPSILON = 1e-4  # beside a std, as in `credit.group_relative`
Keep = Literal["all", "better", "best"]
Alike = Literal["state", "turn"]
Outcome = Literal["last", "spread"]


def numbered(batch: Batch) -> Int[Tensor, "b t"]:
    """The turn that each chosen token belongs to, counted from 0 over the whole batch in order; -1 on all others."""
    before = torch.zeros_like(batch.mask)
    before[:, 1:] = batch.mask[:, :-1]
    number = (batch.mask & ~before).flatten().long().cumsum(0).view_as(batch.tokens) - 1
    return torch.where(batch.mask, number, -1)


def by_turn(batch: Batch) -> Batch:
    """Every turn alike, its tokens alike within it: 1 / (turns * length), as where each turn is a sample of its own."""
    number = numbered(batch)
    length = number[batch.mask].bincount().double()
    weights = torch.zeros(batch.tokens.shape, dtype=torch.float64, device=batch.tokens.device)
    weights[batch.mask] = 1 / (length[number[batch.mask]] * max(len(length), 1))
    return batch.with_(weights=weights.to(batch.logprobs.dtype))


def earned(
    batch: Batch, number: Int[Tensor, "b t"], outcome: Outcome = "last"
) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """What each turn was paid, and the row it stands in; number: from `numbered`.

    What a trajectory scored beyond the payments belongs to its last turn, or with "spread" to all its turns alike.
    """
    row = batch.mask.nonzero()[:, 0]
    turn = number[batch.mask]
    count = int(turn.max()) + 1 if len(turn) else 0
    paid = torch.zeros(count, dtype=torch.float64, device=turn.device)
    paid.index_add_(0, turn, batch.rewards[batch.mask].double())
    where = torch.zeros(count, dtype=torch.long, device=turn.device).index_copy_(0, turn, row)
    trajectory = batch.trajectory[where]
    for one in trajectory.unique():
        own = (trajectory == one).nonzero().flatten()
        beyond = batch.scores[where[own[0]]].double() - paid[own].sum()
        paid[own if outcome == "spread" else own[-1:]] += beyond / (len(own) if outcome == "spread" else 1)
    return paid, where


def turn_relative(
    batch: Batch, credit: Credit, share: float, gamma: float, alike: Alike, outcome: Outcome, scale: bool
) -> Batch:
    """`credit`, plus `share` of what each turn's discounted return is beside that of the turns it compares with.

    G = sum of gamma^j times what the j-th turn from here on earns; A = (G - mean) / (std + 1e-4), the std with n - 1,
    or without `scale` G - mean; 0 for a turn that has nobody to compare with, or where all are equal up to rounding.
    Compared are turns of one group: with "state" those that followed the same observation, token by token (GiGPO, Feng
    et al. 2025, arXiv:2505.10978, equations 6 to 8, whose gamma is 0.95 and whose share is 1); with "turn" those of
    one number in their trajectories. gamma 0 counts only what a turn earned itself, as the turn-level advantage of
    MT-GRPO (Zeng et al. 2025, arXiv:2505.11821) does; that leaves the last turn out, which is not done here.
    """
    filled, number = credit(batch), numbered(batch)
    paid, where = earned(batch, number, outcome)
    returns, keys = torch.zeros_like(paid), dict[int, tuple[Any, ...]]()
    seen = _observations(batch, number, len(paid)) if alike == "state" else []
    for one in batch.trajectory[where].unique():
        own, later = (batch.trajectory[where] == one).nonzero().flatten().tolist(), 0.0
        for place, turn in reversed(list(enumerate(own))):
            later = float(paid[turn]) + gamma * later
            returns[turn] = later
            keys[turn] = (int(batch.group[where[turn]]), seen[turn] if seen else place)
    advantages = torch.zeros_like(paid)
    for key in set(keys.values()):
        turns = torch.tensor([turn for turn, other in keys.items() if other == key], device=paid.device)
        advantages[turns] = _beside(returns[turns], scale)
    more = torch.zeros_like(filled.advantages)
    more[batch.mask] = (share * advantages[number[batch.mask]]).to(more.dtype)
    return filled.with_(advantages=filled.advantages + more)


def _observations(batch: Batch, number: Int[Tensor, "b t"], count: int) -> list[tuple[int, ...]]:
    """What stands before each turn, back to the turn before or to the beginning of its row."""
    seen: list[tuple[int, ...]] = [()] * count
    for row in range(len(batch)):
        begun = 0
        for turn in number[row][batch.mask[row]].unique().tolist():
            own = (number[row] == turn).nonzero().flatten()
            heard = batch.valid[row, begun : own[0]]
            seen[turn] = tuple(batch.tokens[row, begun : own[0]][heard].tolist())
            begun = int(own[-1]) + 1
    return seen


def _beside(returns: Float[Tensor, " n"], scale: bool) -> Float[Tensor, " n"]:
    """Each less their mean, over their std if `scale`; 0 where they are equal but for rounding."""
    spread = returns.max() - returns.min()
    if len(returns) < 2 or spread <= ROUNDING * returns.abs().max().clamp(min=1.0):
        return torch.zeros_like(returns)
    beside = returns - returns.mean()
    return beside / (returns.std() + EPSILON) if scale else beside


def reward_weighted(
    batch: Batch, temperature: float, scale: Literal["task", "none"] = "task", keep: Keep = "all"
) -> Batch:
    """A = exp(r / temperature) on a turn that was paid r: reward-weighted regression over turns.

    RISE (Qu et al. 2024, arXiv:2407.18219), as in the authors' code, where each attempt is a row of its own with this
    weight. scale: "task" divides by the mean weight of the task's turns that are kept, so that no task outweighs the
    others. That is rlft's choice; the same number taken from every r of a task beforehand changes nothing. "none": the
    exponent is at most LIMIT. keep, as in the authors' code: "better" drops turns not paid more than the one before,
    "best" those paid less than any before; the first of a trajectory stays. What is dropped is masked out.
    """
    number = numbered(batch)
    paid, where = earned(batch, number)
    if not len(paid):
        return batch.with_(advantages=torch.zeros_like(batch.logprobs))
    kept = _kept(paid, batch.trajectory[where], keep)
    strength = (paid / temperature).clamp(max=LIMIT).exp()
    if scale == "task":
        group = batch.group[where]
        for one in group[kept].unique():
            own = (group == one) & kept
            relative = ((paid - paid[own].max()) / temperature).exp()
            strength = torch.where(own, relative / relative[own].mean(), strength)
    mask = batch.mask.clone()
    mask[batch.mask] = kept[number[batch.mask]]
    advantages = torch.zeros_like(batch.logprobs)
    advantages[mask] = strength[number[mask]].to(advantages.dtype)
    return batch.with_(mask=mask, advantages=advantages)


def _kept(paid: Float[Tensor, " n"], trajectory: Int[Tensor, " n"], keep: Keep) -> Tensor:
    """Which turns are trained on; those of a trajectory stand in order. What differs by rounding is equal."""
    kept = torch.ones_like(paid, dtype=torch.bool)
    if keep == "all":
        return kept
    for one in trajectory.unique():
        own = (trajectory == one).nonzero().flatten()
        values = paid[own]
        slack = ROUNDING * values.abs().max().clamp(min=1.0)
        if keep == "better":
            kept[own[1:]] = values[1:] > values[:-1] + slack
        else:
            kept[own] = values >= values.cummax(0).values - slack
    return kept
