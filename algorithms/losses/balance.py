"""Trajectory balance: sample in proportion to a reward, instead of looking for its maximum (GFlowNets).

A completion y of prompt x should have the probability p(y) = [ref(y)] exp(s(y) / beta) / Z(x). Its residual

    d(y) = log Z + log p(y) [- log ref(y)] - s(y) / beta

is 0 for all y exactly there, whoever sampled y. log Z is learned, or estimated within each group, where the mean of
d vanishes: then the loss is the variance of d over the group, and has its gradient. A chain of tokens has one way to be
built, so the backward policy is 1.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlft.algorithms.base import Loss, Metrics, Outputs, Prepare, Stat, mean, row_mean, row_sum, row_weights
from rlft.batch import Batch
from rlft.types import InputError

Partition = Literal["group", "learned"]


def trajectory_balance(beta: float, reference: bool, partition: Partition) -> Loss:
    """sum over rows of W d^2, W the row's share. learned: log Z is `Outputs.scalars["log_z"]`, else `baseline`.

    Malkin et al. 2022, arXiv:2201.13259; by group: VarGrad (Richter et al. 2020, arXiv:2010.10435), as for language
    models in Trajectory Balance with Asynchrony (Bartoldson et al. 2025, arXiv:2503.18929) and its authors' code, where
    log Z has no gradient either.
    One learned log Z serves all prompts alike, which is right only where they have the same Z.
    """

    def loss(outputs: Outputs, batch: Batch) -> tuple[Tensor, Metrics]:
        log_z = outputs.scalars["log_z"].to(batch.scores.device) if partition == "learned" else batch.baseline
        gap = log_z + imbalance(outputs.logprobs, batch, beta, reference)
        rows = batch.mask.any(1)
        gap = torch.where(rows, gap, 0.0)
        metrics = {
            "balance/residual": row_mean(gap.abs(), rows),
            "balance/log_z": Stat(float(torch.where(rows, log_z.detach(), 0.0).double().sum()), int(rows.sum())),
            "policy/entropy": mean(outputs.entropy, batch.mask),
        }
        return (row_weights(batch) * gap.square()).sum(), metrics

    return loss


def imbalance(logprobs: Float[Tensor, "b t"], batch: Batch, beta: float, reference: bool) -> Float[Tensor, " b"]:
    """log p(y) [- log ref(y)] - s(y) / beta per row: the residual without log Z."""
    found = row_sum(logprobs, batch) - batch.scores / beta
    return found - row_sum(batch.ref_logprobs, batch) if reference else found


def group_partition(beta: float, reference: bool) -> Prepare:
    """baseline = the group's mean of - imbalance before the step: its estimate of log Z. Needs now_logprobs.

    Raises InputError where a trajectory has several rows, since its probability is that of all together, and where a
    group's prompts differ, since log Z is that of one prompt.
    """

    def prepare(step: Batch) -> Batch:
        _single(step)
        estimates = -imbalance(step.now_logprobs, step, beta, reference).double()
        rows = step.mask.any(1)
        log_z = torch.zeros_like(estimates)
        for group in step.group.unique():
            own = (step.group == group) & rows
            if own.any():
                _one_prompt(step.rows(own.nonzero().flatten()))
                log_z[own] = estimates[own].mean()
        return step.with_(baseline=log_z.to(step.scores.dtype))

    return prepare


def single_rows(step: Batch) -> Batch:
    """The step as it is. Raises InputError where a trajectory has several rows."""
    _single(step)
    return step


def _single(step: Batch) -> None:
    if len(step.trajectory.unique()) < len(step):
        raise InputError(
            "algorithm: balance is a matter of whole trajectories, and here some have several samples: use an "
            "environment that does not rewrite the history"
        )


def _one_prompt(group: Batch) -> None:
    """Raises InputError where the rows do not begin alike up to the first chosen token."""
    first = group.mask.int().argmax(1).tolist()
    prompts = {tuple(group.tokens[i, :n][group.valid[i, :n]].tolist()) for i, n in enumerate(first)}
    if len(prompts) > 1:
        raise InputError(
            f"algorithm: log Z is that of one prompt, and the members of a group were shown {len(prompts)}: use an "
            "environment that opens alike for all of them"
        )
