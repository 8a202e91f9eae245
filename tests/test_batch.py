"""Trajectories as tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Literal

import pytest
import torch

from rlft.batch import FILLED_LATER, Batch
from rlft.types import NAN, Group, InputError, Sample, Task, Trajectory

MakeGroups = Callable[..., list[Group]]


def play(*samples: Sample, score: float | None = 1.0, finish: str = "stop") -> Trajectory:
    return Trajectory(Task("t", ()), (), list(samples), score=score, finish=finish)


LONG = Sample([5, 6, 7, 8], [False, True, False, True], [NAN, -1.0, NAN, -2.0], [0.0, 0.0, 0.25, 0.5], 3)
SHORT = Sample([9, 4], [False, True], [NAN, -0.5], [0.0, 0.0], 3)


@pytest.mark.parametrize("side", ["right", "left"])
def test_fields_are_aligned_with_tokens(side: Literal["right", "left"]) -> None:
    batch = Batch.of([(play(LONG), play(SHORT, finish="length"))], side=side)
    start = 0 if side == "right" else 2
    assert batch.tokens[0].tolist() == LONG.tokens
    assert batch.tokens[1, start : start + 2].tolist() == SHORT.tokens
    assert batch.valid[1].tolist() == ([True, True, False, False] if side == "right" else [False, False, True, True])
    assert batch.mask[0].tolist() == LONG.mask
    assert batch.mask[1].nonzero().flatten().tolist() == [start + 1]
    assert batch.rewards[0].tolist() == LONG.rewards
    assert batch.logprobs[0, [1, 3]].tolist() == [-1.0, -2.0]
    assert float(batch.logprobs[1, start + 1]) == -0.5
    assert batch.logprobs[~batch.mask].isnan().all()
    assert batch.truncated.tolist() == [False, True]
    assert batch.lengths.tolist() == [4, 2]


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_sample_can_be_read_back(make_groups: MakeGroups, side: Literal["right", "left"]) -> None:
    groups = make_groups(4, 3, seed=1)
    batch = Batch.of(groups, side=side)
    samples = [s for group in groups for t in group for s in t.samples]
    assert len(batch) == len(samples)
    for row, sample in enumerate(samples):
        here = batch.valid[row]
        assert batch.tokens[row, here].tolist() == sample.tokens
        assert batch.mask[row, here].tolist() == sample.mask
        wanted = torch.tensor(sample.logprobs)
        torch.testing.assert_close(batch.logprobs[row, here], wanted, rtol=0, atol=0, equal_nan=True)
        assert not batch.mask[row, ~here].any()


def test_scores_are_totals_per_trajectory() -> None:
    batch = Batch.of([(play(LONG, SHORT, score=1.0), play(SHORT, score=2.0)), (play(SHORT, score=-1.0),)])
    assert batch.scores.tolist() == [1.75, 1.75, 2.0, -1.0]
    assert batch.trajectory.tolist() == [0, 0, 1, 2]
    assert batch.group.tolist() == [0, 0, 0, 1]


def test_trap_32_a_trajectory_without_a_score_is_left_out() -> None:
    batch = Batch.of([(play(LONG, score=None), play(SHORT, score=0.5)), (play(LONG, score=None),)])
    assert batch.tokens.tolist() == [SHORT.tokens]
    assert batch.scores.tolist() == [0.5]
    assert batch.trajectory.tolist() == [0]


def test_unfilled_fields_are_nan() -> None:
    batch = Batch.of([(play(LONG),)])
    assert all(getattr(batch, name).isnan().all() for name in FILLED_LATER)


def test_of_nothing_is_empty() -> None:
    for groups in ([], [()], [(play(LONG, score=None),)]):
        batch = Batch.of(groups)
        assert len(batch) == 0
        assert batch.tokens.shape == (0, 1)


def test_a_chosen_first_token_is_refused() -> None:
    """Nothing stands before it, so the model gives it no log-prob."""
    with pytest.raises(InputError, match="task t: the prompt is empty"):
        Batch.of([(play(Sample([5, 6], [True, True], [-1.0, -1.0], [0.0, 0.0], 0)),)])


def test_lists_of_a_sample_have_one_length() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        Sample([1, 2], [True], [0.0, 0.0], [0.0, 0.0], 0)


@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_picks_in_order_and_trims(side: Literal["right", "left"]) -> None:
    batch = Batch.of([(play(LONG), play(SHORT, score=2.0), play(SHORT, score=3.0))], side=side)
    part = batch.rows(torch.tensor([2, 1]))
    assert part.tokens.tolist() == [SHORT.tokens, SHORT.tokens]
    assert part.valid.all()
    assert part.scores.tolist() == [3.0, 2.0]
    assert part.trajectory.tolist() == [2, 1]
    same = batch.rows(torch.arange(3))
    for field in fields(Batch):
        torch.testing.assert_close(getattr(same, field.name), getattr(batch, field.name), equal_nan=True)


def test_rows_of_none_is_empty() -> None:
    assert len(Batch.of([(play(LONG),)]).rows(torch.tensor([], dtype=torch.long))) == 0


def test_with_replaces_and_leaves_the_original() -> None:
    batch = Batch.of([(play(LONG),)])
    filled = batch.with_(advantages=torch.ones_like(batch.advantages))
    assert float(filled.advantages.sum()) == 4.0
    assert batch.advantages.isnan().all()
    assert filled.tokens is batch.tokens


def test_to_moves_every_field() -> None:
    moved = Batch.of([(play(LONG),)]).to(torch.device("meta"))
    assert all(getattr(moved, field.name).device.type == "meta" for field in fields(Batch))


def test_total_and_length_of_a_trajectory() -> None:
    trajectory = play(LONG, SHORT, score=1.0)
    assert trajectory.total == 1.75
    assert trajectory.length == 3
    assert play(LONG, score=None).total is None
    assert math.isnan(play(LONG, score=NAN).total or 0.0)
