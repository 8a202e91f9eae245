"""Attention by segments against softmax(q k) v written out, with the mask that says who sees whom."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn

from rlft.packing import Plan, Rows, cut, stretches, whole
from rlft.segments import Stretch, attend, segments


def placed(draw: random.Random, prompts: int, size: int, alone: int) -> list[Stretch]:
    """Some prompts with their rows behind them, and rows of their own, end to end."""
    found, start = [], 0

    def put(length: int, prompt: int = 0, prompted: int = 0) -> int:
        nonlocal start
        found.append(Stretch(start, length, prompt, prompted))
        start += length
        return start - length

    for _ in range(prompts):
        asked = draw.randint(1, 20)
        root = put(asked)
        for _ in range(draw.randint(1, size)):
            put(draw.randint(1, 30), root, asked)
    for _ in range(alone):
        put(draw.randint(1, 60))
    return found


def by_hand(q: Tensor, k: Tensor, v: Tensor, some: list[Stretch], scale: float) -> Tensor:
    """[h, t, d], token by token."""
    k, v = (heads.repeat_interleave(q.shape[0] // heads.shape[0], 0) for heads in (k, v))
    out = torch.zeros_like(q)
    for start, length, prompt, prompted in some:
        for i in range(start, start + length):
            seen = [*range(prompt, prompt + prompted), *range(start, i + 1)]
            odds = torch.einsum("hd,hkd->hk", q[:, i], k[:, seen]).mul(scale).softmax(-1)
            out[:, i] = torch.einsum("hk,hkd->hd", odds, v[:, seen])
    return out


@pytest.mark.parametrize("groups", [(0, 0, 5), (3, 6, 0), (2, 5, 4), (1, 1, 0)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_each_row_sees_its_prompt_and_itself(groups: tuple[int, int, int], heads: tuple[int, int]) -> None:
    """In value and in the gradient of each of the three."""
    some = placed(random.Random(sum(groups)), *groups)
    tokens = sum(one.length for one in some)
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(h, tokens, 8, dtype=torch.float64, requires_grad=True) for h in (heads[0], heads[1], heads[1])
    )
    weigh = torch.randn(heads[0], tokens, 8, dtype=torch.float64)
    wanted = by_hand(q, k, v, some, 0.3)
    parts = segments(some, tokens)
    found = attend(nn.Identity(), q[None], k[None], v[None], None, scaling=0.3, segments=parts)[0]
    torch.testing.assert_close(found[0].transpose(0, 1), wanted, rtol=1e-12, atol=1e-12)
    slopes = torch.autograd.grad((wanted * weigh).sum(), (q, k, v))
    gradients = torch.autograd.grad((found[0].transpose(0, 1) * weigh).sum(), (q, k, v))
    for gradient, slope in zip(gradients, slopes, strict=True):
        torch.testing.assert_close(gradient, slope, rtol=1e-11, atol=1e-12)


def test_little_is_filled_up() -> None:
    """The pairs that are computed are at most half as many again as those that count, beside small change."""
    draw = random.Random(0)
    some = [Stretch(0, 100)] + [Stretch(0, round(2 ** draw.uniform(4, 9)), 0, 100) for _ in range(64)]
    parts = segments(some, sum(one.length for one in some))
    computed = sum(block.queries.numel() * block.keys.shape[1] for block in parts.blocks)
    assert computed <= 1.3 * sum(one.pairs for one in some) + 4096 * len(parts.blocks)
    assert len(parts.blocks) < 16


def test_a_plan_has_no_padding_and_each_prompt_once() -> None:
    rows = Rows([12, 15, 9, 7, 5], [10, 10, 4, 4, 5], [0, 0, 1, 1, 2])
    made = whole(rows, [0, 1, 2, 3, 4])
    assert made == Plan((((0, 1), (2, 3), (4,)),), 10 + 2 + 5 + 4 + 5 + 3 + 5, segmented=True)
    assert list(stretches(rows, made.bins[0])) == [
        Stretch(0, 10), Stretch(10, 2, 0, 10), Stretch(12, 5, 0, 10),
        Stretch(17, 4), Stretch(21, 5, 17, 4), Stretch(26, 3, 17, 4), Stretch(29, 5, 29, 0),
    ]  # fmt: skip


def test_a_row_that_is_its_prompt_adds_nothing() -> None:
    rows = Rows([10, 14], [10, 10], [0, 0])
    assert list(stretches(rows, whole(rows, [0, 1]).bins[0])) == [Stretch(0, 10), Stretch(10, 4, 0, 10)]


def test_a_group_is_not_parted_between_micro_batches_where_it_fits_in_one() -> None:
    lengths, groups = [10] * 12, [0] * 4 + [1] * 4 + [2] * 4
    found = list(cut(lengths, groups, 1, lambda some: 10 * len(some), 60))
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert list(cut(lengths, groups, 1, lambda some: 10 * len(some), 30))[:2] == [[0, 1, 2], [3]]
    assert list(cut(lengths, [0] * 12, 2, lambda some: 10 * len(some), 50)) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]
