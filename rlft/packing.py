"""Packing: rows laid end to end in a few sequences without padding, a shared prompt once, none seeing another.

A layout says where each token of a batch is computed, and the forward pass reads its answers from there, so that no
loss and no credit ever notices. Positions restart at each row. Rows that share no prompt are told apart by that restart
alone: transformers builds their masks from it where no mask is given (masking_utils, find_packed_sequence_indices), of
sliding windows too. A prompt that several rows begin with stands before them once; each row goes on counting from it
and attends to it and to itself, by a mask of its own. That the model keeps to it is measured by `exact`.

A mask does not make attention cheaper: a sequence of w tokens costs as if all saw all. So the sequences are kept
short, and the plan with the least tokens * (1 + w / reach) is taken.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlft.batch import Batch
from rlft.prefix import owners, prompt_lengths
from rlft.segments import NAME, Segments, Stretch, may, segments

WIDTHS = (1, 2, 3, 4, 6, 8)  # of sequences that are tried, in lengths of the longest row
Piece = tuple[int, ...]  # rows that stand together behind one prompt


@dataclass(frozen=True)
class Rows:
    """What a plan knows of each row: its tokens, how many are its prompt, and the number of that prompt."""

    whole: list[int]
    prompts: list[int]
    owner: list[int]

    @classmethod
    def of(cls, batch: Batch) -> Rows:
        """The rows of a batch."""
        return cls(batch.lengths.tolist(), prompt_lengths(batch).tolist(), owners(batch))


@dataclass(frozen=True)
class Plan:
    """Which rows stand in which sequence. width: of the longest sequence, to which the others are filled up.

    segmented: attention is computed by segments, not with a mask.
    """

    bins: tuple[tuple[Piece, ...], ...]
    width: int
    segmented: bool = False

    @property
    def tokens(self) -> int:
        """Tokens that a forward pass computes."""
        return len(self.bins) * self.width


def plan(rows: Rows, index: Sequence[int], reach: float, shares: bool) -> Plan:
    """The cheapest way to lay some rows out, in tokens * (1 + width / reach).

    reach: the width at which attention costs as much as all the rest. shares: a prompt may stand before several rows.
    """
    longest = max(rows.whole[i] for i in index)
    share = shares and len({rows.owner[i] for i in index}) < len(index)
    found = [
        _filled(_pieces(rows, index, times * longest, shared), times * longest)
        for shared in ((False, True) if share else (False,))
        for times in WIDTHS
        if times == 1 or (times - 1) * longest < sum(rows.whole[i] for i in index)
    ]
    return min(found, key=lambda one: one.tokens * (1 + one.width / reach))


def whole(rows: Rows, index: Sequence[int]) -> Plan:
    """One sequence without padding, each prompt once: for attention by segments, which no width makes dearer."""
    pieces = [piece for _, piece in _pieces(rows, index, sys.maxsize, True)]
    tokens = sum(rows.whole[i] - (rows.prompts[i] if n else 0) for piece in pieces for n, i in enumerate(piece))
    return Plan((tuple(pieces),), tokens, segmented=True)


def stretches(rows: Rows, pieces: Iterable[Piece]) -> Iterator[Stretch]:
    """The pieces of one sequence end to end: a prompt that several rows share, then each row or what is left of it."""
    start = 0
    for piece in pieces:
        shared = rows.prompts[piece[0]] if len(piece) > 1 else 0
        root = start
        if shared:
            yield Stretch(start, shared)
            start += shared
        for i in piece:
            rest = rows.whole[i] - shared
            if rest:
                yield Stretch(start, rest, root, shared)
            start += rest


def _pieces(rows: Rows, index: Sequence[int], width: int, shared: bool) -> Iterator[tuple[int, Piece]]:
    """Pieces of at most `width` tokens, each with its size; a prompt is repeated where its rows do not fit in one."""
    if not shared:
        yield from ((rows.whole[i], (i,)) for i in index)
        return
    together: dict[int, list[int]] = defaultdict(list)
    for i in index:
        together[rows.owner[i]].append(i)
    for some in together.values():
        size, piece = 0, []
        for i in some:
            rest = rows.whole[i] - rows.prompts[i]
            if piece and size + rest > width:
                yield size, tuple(piece)
                piece = []
            size = size + rest if piece else rows.whole[i]
            piece.append(i)
        yield size, tuple(piece)


def _filled(pieces: Iterable[tuple[int, Piece]], width: int) -> Plan:
    """Each piece into the first sequence that has room, the largest first."""
    sizes: list[int] = []
    bins: list[list[Piece]] = []
    for size, piece in sorted(pieces, key=lambda one: -one[0]):
        place = next((k for k, full in enumerate(sizes) if full + size <= width), len(bins))
        if place == len(bins):
            sizes.append(0)
            bins.append([])
        sizes[place] += size
        bins[place].append(piece)
    return Plan(tuple(map(tuple, bins)), max(sizes))


def most(fits: Callable[[int], bool], count: int) -> int:
    """The largest number up to `count` that fits, found by doubling and halving; 1 if not even that does."""
    low, high = 1, 2
    while high <= count and fits(high):
        low, high = high, 2 * high
    high = min(high, count + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def cut(
    whole: Sequence[int], groups: Sequence[int], unit: int, computed: Callable[[Sequence[int]], int], budget: int
) -> Iterator[list[int]]:
    """Row numbers of micro-batches of at most `budget` computed tokens; a group and like lengths together.

    whole: each row's tokens. computed: how many some rows take. `unit` neighbours are never parted, over budget or not.
    """
    longest: dict[int, int] = {}
    for group, length in zip(groups, whole, strict=True):
        longest[group] = max(longest.get(group, 0), length)
    starts = range(0, len(whole), unit)
    order = sorted(starts, key=lambda i: (-longest[groups[i]], groups[i], -max(whole[i : i + unit])))
    rows = [i for start in order for i in range(start, start + unit)]
    while rows:
        some = unit * most(partial(_within, computed, rows, unit, budget), len(rows) // unit)
        some = _ends(groups, rows, unit, some)
        yield rows[:some]
        rows = rows[some:]


def _ends(groups: Sequence[int], rows: list[int], unit: int, some: int) -> int:
    """So many rows or fewer that no group is parted, whose prompt would be computed twice; unless it is the first."""
    if some == len(rows) or groups[rows[some - 1]] != groups[rows[some]]:
        return some
    first = next(i for i, row in enumerate(rows) if groups[row] == groups[rows[some]])
    return first if first and first % unit == 0 else some


def _within(computed: Callable[[Sequence[int]], int], rows: list[int], unit: int, budget: int, count: int) -> bool:
    """The first `count` units make one micro-batch."""
    return computed(rows[: count * unit]) <= budget


@dataclass(frozen=True)
class Layout:
    """Where each token of a batch is computed: cell counts through `tokens` row by row; what padding has is not used.

    attention: None (causal, rows told apart by positions), which tokens are there, or who sees whom. embedded: what the
    model reads in place of the tokens' own embeddings. segments: how attention is computed in place of a mask.
    """

    tokens: Int[Tensor, "n w"]
    positions: Int[Tensor, "n w"]
    attention: Tensor | None
    cell: Int[Tensor, "b t"]
    used: Bool[Tensor, " nw"]
    embedded: Float[Tensor, "n w d"] | None = None
    segments: Segments | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The arguments of a transformers model."""
        read = {"input_ids": self.tokens} if self.embedded is None else {"inputs_embeds": self.embedded}
        return {
            **read,
            "attention_mask": self.attention,
            "position_ids": self.positions,
            "use_cache": False,
            **({} if self.segments is None else {"segments": self.segments}),
        }


def padded(tokens: Int[Tensor, "b t"], valid: Bool[Tensor, "b t"]) -> Layout:
    """Every row a sequence of its own, as it stands."""
    cell = torch.arange(tokens.numel(), device=tokens.device).view(tokens.shape)
    return Layout(tokens, (valid.long().cumsum(1) - 1).clamp(min=0), valid.long(), cell, valid.flatten())


def packed(tokens: Int[Tensor, "b t"], valid: Bool[Tensor, "b t"], rows: Rows, made: Plan) -> Layout:
    """The rows as planned. Padding at a sequence's end sees itself alone, so nothing there is NaN."""
    shape, here = (len(made.bins), made.width), valid.cpu()  # row by row, so not on a GPU
    cell = torch.zeros(here.shape, dtype=torch.long)
    branch, root = torch.full(shape, -1), torch.full(shape, -1)
    count = 0
    for number, pieces in enumerate(made.bins):
        end = 0
        for piece in pieces:
            start, shared = end, rows.prompts[piece[0]] if len(piece) > 1 else 0
            trunk = count
            branch[number, start : start + shared] = root[number, start : start + shared] = trunk
            end, count = start + shared, count + 1
            for i in piece:
                rest = rows.whole[i] - shared
                places = torch.cat([torch.arange(start, start + shared), torch.arange(end, end + rest)])
                cell[i, here[i]] = number * made.width + places
                branch[number, end : end + rest], root[number, end : end + rest] = count, trunk
                end, count = end + rest, count + 1
    sharing = any(len(piece) > 1 for pieces in made.bins for piece in pieces)
    parts, attention = None, None
    if made.segmented:
        parts = segments(list(stretches(rows, made.bins[0])), made.width, tokens.device)
        attention = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)  # so that no mask is made
    elif sharing:
        attention = _seen(branch.to(tokens.device), root.to(tokens.device))
    cell = cell.to(tokens.device)
    filled = cell[valid]
    ids, at = torch.zeros(2, made.tokens, dtype=torch.long, device=tokens.device)
    ids[filled], at[filled] = tokens[valid], (valid.long().cumsum(1) - 1)[valid]
    used = torch.zeros(made.tokens, dtype=torch.bool, device=tokens.device)
    used[filled] = True
    return Layout(ids.view(shape), at.view(shape), attention, cell, used, segments=parts)


def _seen(branch: Int[Tensor, "n w"], root: Int[Tensor, "n w"]) -> Bool[Tensor, "n 1 w w"]:
    """Who sees whom: what stands before it in its own row, and the prompt that the row begins with."""
    width = branch.shape[1]
    before = torch.ones(width, width, dtype=torch.bool, device=branch.device).tril()
    own = branch[:, :, None] == branch[:, None, :]
    prompt = root[:, :, None] == branch[:, None, :]
    return ((own | prompt) & before)[:, None]


def trunk_of(model: nn.Module) -> nn.Module | None:
    """The model below its head for the vocabulary, whatever is wrapped around it; None if it is not transformers'."""
    inner = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    below = getattr(inner, inner.base_model_prefix or "-", None) if inner is not None else None
    return below if isinstance(below, nn.Module) else None


def apart(config: Any, shares: bool) -> bool:
    """Whether a model's config lets rows be packed, with one prompt before several rows or not; `exact` measures it."""
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    windowed = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    if kinds - {"full_attention", "sliding_attention"} or getattr(text, "attention_chunk_size", None):
        return False
    return not (shares and (windowed or "sliding_attention" in kinds))


@dataclass(frozen=True)
class Ways:
    """How rows may be laid out: packed, behind a shared prompt, and with attention by segments."""

    packs: bool = False
    shares: bool = False
    segmented: bool = False

    def plan(self, rows: Rows, index: Sequence[int], reach: float) -> Plan:
        """Of rows that are packed; see `plan`."""
        return whole(rows, index) if self.segmented else plan(rows, index, reach, self.shares)


def ways_of(trunk: Any) -> Ways:
    """What is exact in this model, measured; where attention by segments is, the model goes over to it."""
    if may(trunk):
        before = trunk.config._attn_implementation
        trunk.set_attn_implementation(NAME)
        if exact(trunk, shares=True, segmented=True):
            return Ways(True, True, True)
        trunk.set_attn_implementation(before)
    packs = exact(trunk, shares=False)
    return Ways(packs, packs and exact(trunk, shares=True))


def exact(trunk: Any, shares: bool, segmented: bool = False) -> bool:
    """Whether packed rows come out as each row alone does, measured on three short rows that begin alike.

    Against each row alone the sums run in another order, so that bound is wide: 4 eps of the dtype, at least 3e-4, of
    the largest number. Whether a row sees another is measured apart: the last one stays and the others become other
    tokens, in the same shapes, so that the order of the sums stays too. Windows and chunks that short rows do not fill
    are read from the config. shares: with one prompt before all rows. segmented: with attention by segments.
    """
    if not apart(trunk.config, shares):
        return False
    device = next(trunk.parameters()).device
    tokens = torch.tensor([[5, 6, 7, 8, 9, 0], [5, 6, 3, 0, 0, 0], [5, 6, 4, 2, 0, 0]], device=device)
    valid = torch.arange(6, device=device) < torch.tensor([[5], [3], [4]], device=device)
    rows = Rows([5, 3, 4], [2, 2, 2], [0, 0, 0])
    made = Plan((((0, 1, 2),) if shares else ((0,), (1,), (2,)),), 8 if shares else 12)
    made = whole(rows, range(3)) if segmented else made
    others = tokens.clone()
    others[:2, 2 if shares else 0 :] += 1
    with torch.no_grad(), calm(trunk):
        try:
            short = [row[there] for row, there in zip(tokens, valid, strict=True)]
            alone = torch.cat([trunk(input_ids=row[None], use_cache=False)[0][0] for row in short])
            found, beside = (_laid(trunk, packed(some, valid, rows, made))[valid] for some in (tokens, others))
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, NotImplementedError):
            return False
    rounding, size = 4 * torch.finfo(alone.dtype).eps, float(alone.abs().max())
    leaked = float((found - beside)[-4:].abs().max())  # of the last row, which stayed as it was
    return leaked <= rounding * size and float((found - alone).abs().max()) <= max(rounding, 3e-4) * size


def _laid(trunk: Any, layout: Layout) -> Tensor:
    """What a trunk gives for each token of the batch that was laid out so."""
    return trunk(**layout.given)[0].flatten(0, 1)[layout.cell]


@contextmanager
def calm(module: nn.Module) -> Iterator[None]:
    """Without dropout; afterwards every part is as it was."""
    were = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in were:
            part.training = training
