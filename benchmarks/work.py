"""Useful floating-point operations of a learner's step, and the rate that plain matrix products of its shapes reach.

Useful is: per distinct token (a shared prompt's once) 2 N forward and 2 N backward to the inputs, N being the weights
of the layers; the adapter's own products, forward and both backward; the head at trained positions, forward and
backward; attention of each token to those before it. Nothing else counts: no norm, no softmax, no recomputation.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.spec import Row


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes."""

    layers: int
    hidden: int
    inner: int
    keys: int
    vocabulary: int
    rank: int = 16

    @classmethod
    def of(cls, config: Any) -> Shape:
        """From a transformers config."""
        head = config.hidden_size // config.num_attention_heads
        keys = config.num_key_value_heads * head
        return cls(config.num_hidden_layers, config.hidden_size, config.intermediate_size, keys, config.vocab_size)

    @property
    def products(self) -> list[tuple[int, int]]:
        """Inputs and outputs of a layer's matrices."""
        d, inner, keys = self.hidden, self.inner, self.keys
        return [(d, d), (d, keys), (d, keys), (d, d), (d, inner), (d, inner), (inner, d)]


def useful(rows: list[Row], shape: Shape, shared: bool = True) -> float:
    """Operations of one forward and backward pass over these rows."""
    prompts = {tuple(row.prompt) for row in rows} if shared else [row.prompt for row in rows]
    said = sum(len(row.said) - 1 for row in rows)  # the last token is nobody's context
    tokens = sum(map(len, prompts)) + said
    weights = sum(a * b for a, b in shape.products)
    adapter = sum(shape.rank * (a + b) for a, b in shape.products)
    dense = shape.layers * (4 * weights + 6 * adapter) * tokens
    head = 4 * shape.vocabulary * shape.hidden * sum(len(row.said) for row in rows)
    pairs = sum(len(p) ** 2 / 2 for p in prompts)
    pairs += sum(len(r.said) * len(r.prompt) + len(r.said) ** 2 / 2 for r in rows)
    attention = shape.layers * 12 * shape.hidden * pairs  # scores and values, forward and twice backward
    return dense + head + attention


def ceiling(shape: Shape, tokens: int, seconds: float = 2.0) -> dict[str, float]:
    """Operations a second of plain products of a layer's sizes, by torch (`mm`) and by oneDNN, in turn."""
    x = {a: torch.randn(tokens, a) for a, _ in shape.products}
    weights = [(torch.randn(b, a), x[a]) for a, b in shape.products]
    work = sum(2.0 * tokens * a * b for a, b in shape.products)
    ways: dict[str, Any] = {
        "torch": lambda w, y: torch.mm(y, w.t()),
        "onednn": lambda w, y: torch.ops.mkldnn._linear_pointwise(y, w, None, "none", [], ""),
    }
    found = {}
    for name, way in ways.items():
        rates: list[float] = []
        until = time.perf_counter() + seconds / len(ways)
        while time.perf_counter() < until or len(rates) < 2:
            begun = time.perf_counter()
            for w, y in weights:
                way(w, y)
            rates.append(work / (time.perf_counter() - begun))
        rates.sort()
        found[name] = rates[len(rates) // 2]
    return found
