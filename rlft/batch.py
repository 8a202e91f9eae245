"""Trajectories as tensors. Every [b, t] field is aligned with `tokens`: entry i says something about token i.

The one shift of a causal model (logits at i-1 predict token i) happens inside `Learner.forward` and nowhere else.
A field that nobody has filled yet is NaN, so that using it fails loudly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlft.types import NAN, Group, InputError, Sample, Trajectory

FILLED_LATER = (
    "old_logprobs", "now_logprobs", "now_entropy", "ref_logprobs", "teacher_logprobs", "values",
    "advantages", "returns", "weights",
)  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Rows are samples, columns are tokens; padding is where `valid` is False.

    mask: the policy chose the token. logprobs: under the policy that sampled it, NaN where nobody sampled.
    rewards: the environment's, per token. scores: the trajectory's total, once per row. truncated: the engine stopped
    it at the limit. trajectory, group: which of each the row belongs to, counted from 0. drawn: 0 for the group's own
    samples, else the number of the algorithm's Draw. version: of the weights that sampled the row, -1 where none did.
    agent: whose these are, where there are several.
    weights: the share of each token in the loss; they sum to 1 (under a budget to at most 1) over an optimizer step.
    corrections: what a token's surrogate is multiplied by because another policy sampled it; 1 where nothing is
    corrected. now_logprobs, now_entropy: before the optimizer step in hand; nats. values: before the token was chosen;
    bootstrap: after a truncated row's last token, else 0. baseline: a number per row, from the whole step, that a loss
    compares with.
    targets: numbers to predict, NaN where a row lacks one. user: whose preference it is, 0 where that is not known.
    """

    tokens: Int[Tensor, "b t"]
    valid: Bool[Tensor, "b t"]
    mask: Bool[Tensor, "b t"]
    logprobs: Float[Tensor, "b t"]
    rewards: Float[Tensor, "b t"]
    scores: Float[Tensor, " b"]
    truncated: Bool[Tensor, " b"]
    trajectory: Int[Tensor, " b"]
    group: Int[Tensor, " b"]
    drawn: Int[Tensor, " b"]
    version: Int[Tensor, " b"]
    agent: Int[Tensor, " b"]
    old_logprobs: Float[Tensor, "b t"]
    now_logprobs: Float[Tensor, "b t"]
    now_entropy: Float[Tensor, "b t"]
    ref_logprobs: Float[Tensor, "b t"]
    teacher_logprobs: Float[Tensor, "b t"]
    values: Float[Tensor, "b t"]
    advantages: Float[Tensor, "b t"]
    returns: Float[Tensor, "b t"]
    weights: Float[Tensor, "b t"]
    corrections: Float[Tensor, "b t"]
    bootstrap: Float[Tensor, " b"]
    baseline: Float[Tensor, " b"]
    targets: Float[Tensor, "b k"]
    user: Int[Tensor, " b"]

    @classmethod
    def of(cls, groups: Sequence[Group], side: Literal["right", "left"] = "right") -> Batch:
        """The scored trajectories of `groups`, padded to the longest. One without a score is left out."""
        rows: list[tuple[Sample, Trajectory, int, int]] = []
        trajectories = 0
        for g, group in enumerate(groups):
            for trajectory in group:
                if trajectory.total is None:
                    continue
                if any(sample.mask[:1] == [True] for sample in trajectory.samples):
                    raise InputError(f"task {trajectory.task.id}: the prompt is empty: nothing predicts a first token")
                rows += [(sample, trajectory, trajectories, g) for sample in trajectory.samples]
                trajectories += 1
        samples = [row[0] for row in rows]
        width = max((len(sample.tokens) for sample in samples), default=1)

        def pad(name: str, fill: Any, dtype: torch.dtype) -> Tensor:
            out = torch.full((len(samples), width), fill, dtype=dtype)
            for i, sample in enumerate(samples):
                values = torch.tensor(getattr(sample, name), dtype=dtype)
                start = 0 if side == "right" else width - len(values)
                out[i, start : start + len(values)] = values
            return out

        tokens = pad("tokens", -1, torch.long)
        unfilled = torch.full(tokens.shape, torch.nan)
        return cls(
            tokens=tokens.clamp(min=0),
            valid=tokens >= 0,
            mask=pad("mask", False, torch.bool),
            logprobs=pad("logprobs", torch.nan, torch.float32),
            rewards=pad("rewards", 0.0, torch.float32),
            scores=torch.tensor([row[1].total for row in rows], dtype=torch.float32),
            truncated=torch.tensor([row[1].finish == "length" for row in rows], dtype=torch.bool),
            trajectory=torch.tensor([row[2] for row in rows], dtype=torch.long),
            group=torch.tensor([row[3] for row in rows], dtype=torch.long),
            drawn=torch.tensor([row[1].drawn for row in rows], dtype=torch.long),
            version=torch.tensor([row[0].version for row in rows], dtype=torch.long),
            agent=torch.tensor([row[0].agent for row in rows], dtype=torch.long),
            **{name: unfilled.clone() for name in FILLED_LATER},
            corrections=torch.ones(tokens.shape),
            bootstrap=torch.full((len(rows),), torch.nan),
            baseline=torch.full((len(rows),), torch.nan),
            targets=_table([row[1].targets for row in rows]),
            user=torch.tensor([row[1].user for row in rows], dtype=torch.long),
        )

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def lengths(self) -> Int[Tensor, " b"]:
        """Tokens per row without padding."""
        return self.valid.sum(1)

    def with_(self, **changes: Tensor) -> Batch:
        """The same batch with some fields replaced."""
        return replace(self, **changes)

    def rows(self, index: Tensor) -> Batch:
        """Some rows, without the columns that are padding in all of them."""
        picked = {f.name: getattr(self, f.name)[index] for f in fields(self)}
        used = picked["valid"].any(0).nonzero().flatten()
        if len(used):
            keep = slice(int(used[0]), int(used[-1]) + 1)
            picked = {k: v[:, keep] if v.ndim == 2 and k != "targets" else v for k, v in picked.items()}
        return Batch(**picked)

    def to(self, device: torch.device) -> Batch:
        """Every tensor on `device`."""
        return Batch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def place(into: Float[Tensor, "b t"], rows: Int[Tensor, " n"], mask: Bool[Tensor, "n t"], picked: Tensor) -> None:
    """Write one value per chosen token of some rows, whose mask over all columns is `mask`."""
    row, column = mask.nonzero(as_tuple=True)
    into[rows[row], column] = picked.to(into)


def note_advantages(batch: Batch, chosen: Sequence[Group]) -> None:
    """Write the mean advantage of each trajectory in a credited batch, which was made of `chosen`, to its metrics."""
    scored = [t for group in chosen for t in group if t.total is not None]
    for row, index in enumerate(batch.trajectory.tolist()):
        mask = batch.mask[row]
        if mask.any():
            scored[index].metrics["advantage/mean"] = float(batch.advantages[row][mask].mean())


def _table(numbers: Sequence[Sequence[float]]) -> Float[Tensor, "b k"]:
    """Rows of numbers as wide as the longest; NaN where one has fewer."""
    width = max(map(len, numbers), default=0)
    rows = [[*row, *[NAN] * (width - len(row))] for row in numbers]
    return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), width)
