"""Attention of packed rows by segments: each row attends to its prompt and to itself, and nothing else is computed.

Packed rows stand in one sequence, and a mask does not make attention cheaper: t tokens cost t * t. Here the rows'
queries are gathered into blocks of like lengths, each beside the keys that its rows may see, a shared prompt's
included, and what is computed falls to the pairs that count, and little more. It is given to transformers under a name
of its own, through its interface for attention functions; a model that does not pass the segments on, or that does
more than softmax(q k) v in its attention, is found out by `packing.exact` and goes on with masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "rlft_segments"
WASTE, SMALL = 0.3, 4096  # of a block's pairs, what may be padding: this share, or so many (what a call costs)


class Stretch(NamedTuple):
    """Tokens that stand together, from cell `start`, and the prompt that they see besides themselves (0: none)."""

    start: int
    length: int
    prompt: int = 0
    prompted: int = 0

    @property
    def pairs(self) -> int:
        """Of queries and keys, as if each of its tokens saw all."""
        return self.length * (self.length + self.prompted)


@dataclass(frozen=True)
class Block:
    """Stretches of like lengths, filled up. seen: which keys a query sees; None: those up to itself."""

    queries: Int[Tensor, "n q"]
    keys: Int[Tensor, "n k"]
    seen: Bool[Tensor, "n 1 q k"] | None


@dataclass(frozen=True)
class Segments:
    """The blocks of a sequence. places: where each cell's answer stands in the answers of all blocks end to end."""

    blocks: tuple[Block, ...]
    places: Int[Tensor, " t"]


def segments(stretches: Sequence[Stretch], tokens: int, device: Any = None) -> Segments:
    """Of a sequence of `tokens` cells, each in one stretch."""
    blocks, places, count = [], torch.zeros(tokens, dtype=torch.long), 0
    for some in _alike(stretches):
        wide = max(one.length for one in some)
        for number, (start, length, *_) in enumerate(some):
            places[start : start + length] = count + number * wide + torch.arange(length)
        blocks.append(_block(some, wide, device))
        count += len(some) * wide
    return Segments(tuple(blocks), places.to(device))


def _alike(stretches: Iterable[Stretch]) -> Iterator[list[Stretch]]:
    """Stretches that are filled up to the longest of them without much waste, with prompts or without."""
    some: list[Stretch] = []
    for one in sorted(stretches, key=lambda s: (s.prompted == 0, -s.length, -s.prompted, s.start)):
        if some and not _fits([*some, one]):
            yield some
            some = []
        some.append(one)
    if some:
        yield some


def _fits(some: list[Stretch]) -> bool:
    if (some[0].prompted == 0) != (some[-1].prompted == 0):
        return False
    wide, before = some[0].length, max(one.prompted for one in some)
    real = sum(one.pairs for one in some)
    return len(some) * wide * (wide + before) - real <= max(WASTE * real, SMALL)


def _block(some: list[Stretch], wide: int, device: Any) -> Block:
    start, length, prompt, prompted = torch.tensor(some, device=device).T[:, :, None]
    most = max(one.prompted for one in some)
    own = torch.arange(wide, device=device)
    queries = start + own.clamp(max=length - 1)  # what fills up repeats the last token
    if not most:
        return Block(queries, queries, None)
    before = torch.arange(most, device=device)
    keys = torch.cat([prompt + torch.minimum(before, prompted - 1), queries], 1)
    causal = (own[:, None] >= own).expand(len(some), -1, -1)
    told = (before < prompted)[:, None].expand(-1, wide, -1)
    return Block(queries, keys, torch.cat([told, causal], 2)[:, None])


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers; without segments it is transformers' `sdpa`."""
    if segments is None:
        given = {"dropout": dropout, "scaling": scaling}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given, **kwargs)
    q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
    grouped = q.shape[1] != k.shape[1]
    if grouped and query.device.type != "cpu":  # no fused kernel there takes a mask with fewer heads of keys
        k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], 1) for heads in (k, v))
        grouped = False
    said = []
    for block in segments.blocks:
        made = torch.nn.functional.scaled_dot_product_attention(
            _gathered(q, block.queries),
            _gathered(k, block.keys),
            _gathered(v, block.keys),
            attn_mask=block.seen,
            dropout_p=dropout,
            is_causal=block.seen is None,
            scale=scaling,
            enable_gqa=grouped,
        )
        said.append(made.transpose(1, 2).flatten(0, 1))
    return torch.cat(said).index_select(0, segments.places)[None], None


def _gathered(heads: Tensor, cells: Tensor) -> Tensor:
    """[t, h, d] to [n, h, w, d]."""
    return heads.index_select(0, cells.flatten()).view(*cells.shape, *heads.shape[1:]).transpose(1, 2)


def may(trunk: Any) -> bool:
    """Whether this model takes an attention function from us: it has transformers' own now, and its interface."""
    asked = getattr(trunk, "_can_set_attn_implementation", None)
    return asked is not None and trunk.config._attn_implementation in ("sdpa", NAME) and asked()


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
