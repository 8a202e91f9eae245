"""What the loop asks of an engine, and how an engine's copy of a weight is read back and compared.

A digest of a matrix is a few of its columns, exact to the bit, and its product with a random vector of signs, up to
rounding. An engine that packs its weights for a kernel, so that nobody can read them, answers with the kernel itself:
multiplying by a column of the identity returns that column exactly. A training step moves every column of a layer,
so four exact ones tell a stale, missing or half-sent layer from a fresh one; the random product covers the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from rlft.types import Completion, Sampling

COLUMNS = 4
ROUNDING = 2e-6  # of float32 sums over a row, relative to the row's absolute sum


@dataclass(frozen=True)
class Full:
    """Whole weights under their checkpoint names, each fused unit of the engine complete. agent: whose they are."""

    tensors: Iterable[tuple[str, Tensor]]
    agent: int = 0


@dataclass(frozen=True)
class Delta:
    """A PEFT adapter in a folder of its own, one for every version. agent: whose it is."""

    folder: Path
    agent: int = 0


Weights = Full | Delta


class Engine(Protocol):
    """Samples from the policy. All calls come from one event loop."""

    version: int

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        """Continue `prompt`; calls that are open at once are batched together. Raises RunError if the engine fails."""
        ...

    async def load_weights(self, weights: Weights, version: int) -> None:
        """Serve these weights from now on, beside those of other agents, and forget every cached key and value.

        No request may be open.
        """
        ...

    async def units(self, names: Sequence[str]) -> dict[str, str]:
        """What each checkpoint name is loaded into, by the name of the unit; names of one unit must be sent together.

        A name that the engine has no receiver for is missing from the answer.
        """
        ...

    async def read_back(self, names: Sequence[str], seed: int, agent: int = 0) -> dict[str, Tensor]:
        """Digests, by `digest`, of the engine's own serving copies of an agent's weights under checkpoint names.

        Where it serves several (a packed head beside the embedding it is tied to), one under another.
        """
        ...

    async def forget(self) -> None:
        """Drop the prefix cache."""
        ...

    async def kept(self) -> int:
        """How many blocks of keys and values are in the prefix cache; after new weights, every one is stale."""
        ...

    async def close(self) -> None:
        """Free everything; nothing stays behind."""
        ...


@lru_cache(maxsize=64)
def probe(width: int, seed: int) -> Float[Tensor, "k c"]:
    """The columns that a digest of a matrix with `width` inputs is multiplied by; both sides make the same."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + width)
    matrix = torch.zeros(width, COLUMNS + 1)
    picked = torch.randperm(width, generator=generator)[:COLUMNS]
    matrix[picked, torch.arange(len(picked))] = 1.0
    matrix[:, COLUMNS] = torch.randint(0, 2, (width,), generator=generator) * 2.0 - 1.0
    return matrix


def digest(weight: Tensor, seed: int) -> Float[Tensor, "n c"]:
    """The digest of a weight that can be read: a vector is its own, a matrix as said above. Float32, on the CPU."""
    if weight.ndim < 2:
        return weight.detach().float().cpu().reshape(-1, 1)
    flat = weight.detach().reshape(weight.shape[0], -1).float()
    matrix = probe(flat.shape[1], seed)
    picked = matrix[:, :COLUMNS].argmax(0).to(flat.device)
    return torch.cat([flat[:, picked], flat @ matrix[:, COLUMNS:].to(flat.device)], 1).cpu()


@dataclass(frozen=True)
class Mark:
    """What the sender remembers of a tensor: its digest, and how far rounding may take the random product, per row."""

    digest: Float[Tensor, "n c"]
    bound: Float[Tensor, " n"] | None

    @classmethod
    def of(cls, weight: Tensor, seed: int) -> Mark:
        """Of the tensor as it is sent, after the cast."""
        mark = digest(weight, seed)
        if weight.ndim < 2:
            return cls(mark, None)
        rows = torch.linalg.vector_norm(weight.detach().reshape(weight.shape[0], -1), 1, 1, dtype=torch.float32).cpu()
        # A kernel in half precision sums in float32 and rounds the product once.
        return cls(mark, ROUNDING * rows + torch.finfo(weight.dtype).eps * mark[:, COLUMNS].abs() + 1e-7)

    def differs(self, found: Tensor) -> str | None:
        """Why `found` is not the digest of the tensor that was sent; None when it is.

        Where the engine serves several copies of a weight, `found` has their digests one under another.
        """
        n = len(self.digest)
        if found.shape[1:] != self.digest.shape[1:] or not len(found) or len(found) % n:
            return f"its digest has the shape {tuple(found.shape)}, that of what was sent {tuple(self.digest.shape)}"
        reasons = [self._differs(copy) for copy in found.split(n)]
        return next((f"copy {i + 1}: {why}" if i else why for i, why in enumerate(reasons) if why), None)

    def _differs(self, found: Tensor) -> str | None:
        n, width = self.digest.shape
        exact = width if self.bound is None else COLUMNS
        same = torch.equal(self.digest[:, :exact], found[:, :exact])
        near = torch.ones(n, dtype=torch.bool)
        if self.bound is not None:
            near = (self.digest[:, COLUMNS] - found[:, COLUMNS]).abs() <= self.bound
        if same and near.all():
            return None
        if not torch.isfinite(found).all():
            return "it holds values that are not finite"
        if not same:
            rows = (self.digest[:, :exact] != found[:, :exact]).any(1)
            return f"{int(rows.sum())} of {n} rows are not the ones sent"
        return f"{int((~near).sum())} of {n} rows do not add up to what was sent"
