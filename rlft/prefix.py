"""Shared prompts: the samples of a task begin with the same tokens, which are computed once.

The prompt's pass leaves keys and values behind; they are expanded over the group, and the completions attend to them.
Gradients flow back through the expansion, so they are those of the unshared computation (tests/test_learner.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from rlft.batch import Batch


@dataclass(frozen=True)
class Split:
    """A batch as its distinct prompts, left-padded, and each row's rest, right-padded.

    owner: the prompt of each row. A row's rest begins with the first token that the policy chose.
    """

    prompts: Int[Tensor, "p s"]
    seen: Bool[Tensor, "p s"]
    owner: Int[Tensor, " b"]
    rest: Int[Tensor, "b r"]
    valid: Bool[Tensor, "b r"]
    mask: Bool[Tensor, "b r"]

    @property
    def starts(self) -> Int[Tensor, " b"]:
        """The position of each row's first rest token."""
        return self.seen.sum(1)[self.owner]


def prompt_lengths(batch: Batch) -> Int[Tensor, " b"]:
    """Tokens before the first one that the policy chose; the whole row where it chose none."""
    before = batch.mask.long().cumsum(1) == 0
    return (before & batch.valid).sum(1)


def owners(batch: Batch) -> list[int]:
    """Which of its distinct prompts each row begins with."""
    number: dict[tuple[int, ...], int] = {}
    rows = zip(batch.tokens, batch.valid, prompt_lengths(batch).tolist(), strict=True)
    return [number.setdefault(tuple(row[valid][:n].tolist()), len(number)) for row, valid, n in rows]


def split(batch: Batch) -> Split | None:
    """The batch taken apart; None where no two rows share a prompt, a prompt is empty, or a row has no choice."""
    if not len(batch) or not batch.mask.any(1).all():
        return None
    lengths = prompt_lengths(batch).tolist()
    rows = [batch.tokens[i][batch.valid[i]] for i in range(len(batch))]
    masks = [batch.mask[i][batch.valid[i]] for i in range(len(batch))]
    number: dict[tuple[int, ...], int] = {}
    owner = [number.setdefault(tuple(row[:n].tolist()), len(number)) for row, n in zip(rows, lengths, strict=True)]
    if len(number) == len(batch) or 0 in lengths:
        return None
    device = batch.tokens.device
    wide = max(map(len, number))
    prompts = torch.zeros(len(number), wide, dtype=torch.long, device=device)
    seen = torch.zeros_like(prompts, dtype=torch.bool)
    for tokens, i in number.items():
        prompts[i, wide - len(tokens) :] = torch.tensor(tokens, device=device)
        seen[i, wide - len(tokens) :] = True
    wide = max(len(row) - n for row, n in zip(rows, lengths, strict=True))
    rest = torch.zeros(len(rows), wide, dtype=torch.long, device=device)
    valid, mask = torch.zeros_like(rest, dtype=torch.bool), torch.zeros_like(rest, dtype=torch.bool)
    for i, (row, chosen, n) in enumerate(zip(rows, masks, lengths, strict=True)):
        rest[i, : len(row) - n] = row[n:]
        valid[i, : len(row) - n] = True
        mask[i, : len(row) - n] = chosen[n:]
    return Split(prompts, seen, torch.tensor(owner, device=device), rest, valid, mask)
