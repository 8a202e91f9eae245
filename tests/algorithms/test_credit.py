"""Advantages: numbers worked out by hand, and the papers' formulas as loops in float64."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import pytest
import torch

from rlft.algorithms import credit
from rlft.batch import Batch
from rlft.types import NAN, Group, Sample, Task, Trajectory

Scored = Callable[..., Batch]


def of_rows(batch: Batch) -> list[float]:
    """The advantage of each row; asserts that it stands on every chosen token and 0 on the others."""
    filled = batch.advantages
    assert torch.equal(filled[~batch.mask], torch.zeros_like(filled[~batch.mask]))
    rows = [row[mask] for row, mask in zip(filled, batch.mask, strict=True)]
    assert all(torch.allclose(row, row[0].expand(len(row)), rtol=0, atol=0, equal_nan=True) for row in rows)
    return [float(row[0]) for row in rows]


def close(found: Sequence[float], wanted: Sequence[float]) -> bool:
    return found == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_uniform_is_one_on_chosen_tokens(scored: Scored) -> None:
    assert of_rows(credit.uniform(scored([[0.0, 5.0], [None, 2.0]]))) == [1.0, 1.0, 1.0]


def test_group_relative_by_hand(scored: Scored) -> None:
    """Scores 1 0 0 1: mean 1/2, squared distances 4 * 1/4, std sqrt(1/3) = 0.57735; 0.5 / 0.57745 = 0.8658754."""
    found = of_rows(credit.group_relative(scored([[1.0, 0.0, 0.0, 1.0]])))
    assert found == pytest.approx([0.8658754, -0.8658754, -0.8658754, 0.8658754], abs=1e-7)


def test_group_relative_without_scale_by_hand(scored: Scored) -> None:
    batch = scored([[1.0, 2.0, 6.0], [0.0, 1.0]])
    assert close(of_rows(credit.group_relative(batch, scale=False)), [-2.0, -1.0, 3.0, -0.5, 0.5])


def test_leave_one_out_by_hand(scored: Scored) -> None:
    """1 - (2 + 6) / 2 = -3; 2 - (1 + 6) / 2 = -1.5; 6 - (1 + 2) / 2 = 4.5."""
    assert close(of_rows(credit.leave_one_out(scored([[1.0, 2.0, 6.0]]))), [-3.0, -1.5, 4.5])


def grpo(scores: list[float]) -> list[float]:
    mean, std = math.fsum(scores) / len(scores), statistics.stdev(scores)
    return [(score - mean) / (std + 1e-4) for score in scores]


def dr_grpo(scores: list[float]) -> list[float]:
    return [score - math.fsum(scores) / len(scores) for score in scores]


def rloo(scores: list[float]) -> list[float]:
    return [score - math.fsum(scores[:i] + scores[i + 1 :]) / (len(scores) - 1) for i, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        (credit.group_relative, grpo),
        (lambda batch: credit.group_relative(batch, scale=False), dr_grpo),
        (credit.leave_one_out, rloo),
    ],
    ids=["grpo", "dr_grpo", "rloo"],
)
@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_formula_in_loops(
    scored: Scored, function: Callable[[Batch], Batch], formula: Callable[[list[float]], list[float]], shift: float
) -> None:
    draw = torch.Generator().manual_seed(1)
    groups = [[shift + float(s) for s in torch.randn(size, generator=draw)] for size in (2, 3, 5, 16)]
    batch = scored(groups)
    # Batch.of rounds scores to float32; the formula starts from the same numbers.
    exact = [[float(s) for s in torch.tensor(group)] for group in groups]
    found = of_rows(function(batch))
    wanted = [a for group in exact for a in formula(group)]
    assert found == pytest.approx(wanted, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("function", [credit.group_relative, credit.leave_one_out])
def test_trap_08_equal_scores_give_exactly_zero(scored: Scored, function: Callable[[Batch], Batch]) -> None:
    groups = [[0.1] * 8, [0.1 + 0.2, 0.3], [1e6 + 0.1] * 3, [0.0, 0.0], [-0.7] * 7]
    assert of_rows(function(scored(groups))) == [0.0] * 22
    one_bit_more = torch.tensor(0.3).nextafter(torch.tensor(1.0)).item()
    assert of_rows(function(scored([[0.3, one_bit_more, 0.3], [one_bit_more, 0.3]]))) == [0.0] * 5


def test_trap_08_a_small_but_real_difference_counts(scored: Scored) -> None:
    found = of_rows(credit.group_relative(scored([[0.1, 0.1, 0.1001]])))
    assert found[0] == found[1] < 0 < found[2]


@pytest.mark.parametrize("function", [credit.group_relative, credit.leave_one_out])
def test_trap_09_group_of_one(scored: Scored, function: Callable[[Batch], Batch]) -> None:
    assert of_rows(function(scored([[3.0], [None, 0.5]]))) == [0.0, 0.0]


@pytest.mark.parametrize("function", [credit.group_relative, credit.leave_one_out])
def test_trap_32_no_score_leaves_the_others_as_if_alone(scored: Scored, function: Callable[[Batch], Batch]) -> None:
    with_gap = of_rows(function(scored([[1.0, None, 0.0, 0.25, None]])))
    assert with_gap == of_rows(function(scored([[1.0, 0.0, 0.25]])))
    assert with_gap != of_rows(function(scored([[1.0, 0.0, 0.0, 0.25, 0.0]])))[:3]


def test_trap_32_a_score_that_is_not_a_number_stays_one(scored: Scored) -> None:
    """So that the loss is not finite and the learner stops; silence would be worse."""
    assert all(math.isnan(a) for a in of_rows(credit.group_relative(scored([[1.0, NAN, 0.0]]))))


def split(score: float, samples: int) -> Trajectory:
    """A trajectory that the environment cut into several samples."""
    rows = [Sample([3, 4], [False, True], [NAN, NAN], [0.0, 0.0], -1) for _ in range(samples)]
    return Trajectory(Task("t", ()), (), rows, score=score)


@pytest.mark.parametrize("function", [credit.group_relative, credit.leave_one_out])
def test_a_trajectory_of_several_samples_counts_once(
    double: Callable[[Batch], Batch], function: Callable[[Batch], Batch]
) -> None:
    whole: Group = (split(1.0, 1), split(2.0, 1), split(6.0, 1))
    cut: Group = (split(1.0, 3), split(2.0, 1), split(6.0, 2))
    a, b, c = of_rows(function(double(Batch.of([whole]))))
    batch = double(Batch.of([cut]))
    assert close(of_rows(function(batch)), [a, a, a, b, c, c])
    order = torch.tensor([4, 0, 3, 1, 5, 2])
    assert close(of_rows(function(batch.rows(order))), [c, a, b, a, c, a])


@pytest.mark.parametrize("function", [credit.group_relative, credit.leave_one_out])
def test_any_row_order_gives_every_row_the_same(scored: Scored, function: Callable[[Batch], Batch]) -> None:
    batch = scored([[1.0, 0.0, 0.3], [0.2, 0.9], [5.0, 5.0, 5.0, 6.0]])
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(3))
    found, shuffled = of_rows(function(batch)), of_rows(function(batch.rows(order)))
    assert close(shuffled, [found[i] for i in order.tolist()])


@pytest.mark.parametrize("function", [credit.group_relative, credit.leave_one_out])
def test_advantages_of_a_group_sum_to_zero(scored: Scored, function: Callable[[Batch], Batch]) -> None:
    assert sum(of_rows(function(scored([[0.3, 1.7, -2.0, 0.11]])))) == pytest.approx(0.0, abs=1e-12)


def test_dtype_of_the_batch_is_kept(scored: Scored) -> None:
    assert credit.group_relative(scored([[1.0, 0.0]])).advantages.dtype == torch.float64
