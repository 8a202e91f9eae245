"""Curricula: numbers worked out by hand, learners of one number that get on faster, and a resume bit for bit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from pydantic import BaseModel

from rlft.curriculum import mixture
from rlft.curriculum.catalog import AlpGmm, Band, Skills, Uniform
from rlft.curriculum.cells import drawn_by, evenness
from rlft.settings import validate
from rlft.source import Curriculum, Deck
from rlft.types import Group, InputError, Sample, Task, Trajectory


def tasks(*columns: dict[str, Any]) -> list[Task]:
    return [Task(f"t{i}", ({"role": "user", "content": f"What is {i}?"},), info) for i, info in enumerate(columns)]


def group(task: Task, *scores: float | None) -> Group:
    return tuple(Trajectory(task, (), [], score=score) for score in scores)


def made(knobs: Any, given: Sequence[Task], seed: int = 0) -> Curriculum:
    built = knobs.build(given, seed)
    assert built is not None
    return built


def teach(curriculum: Curriculum, given: Sequence[Task], *results: tuple[int, Sequence[float | None]]) -> None:
    """One step: rows, and the scores of each one's group."""
    curriculum.learn([row for row, _ in results], [group(given[row], *scores) for row, scores in results])


def share(curriculum: Curriculum, wanted: Callable[[int], bool], draws: int = 4000) -> float:
    """Of the tasks that it chooses in steps of one."""
    return sum(wanted(curriculum.choose(position, 1)[0]) for position in range(draws)) / draws


# --- what is drawn by weight


def test_an_index_is_drawn_by_its_weight() -> None:
    rng = np.random.default_rng(0)
    drawn = Counter(drawn_by(np.array([0.0, 3.0, 1.0, 0.0]), rng) for _ in range(4000))
    assert set(drawn) == {1, 2}
    assert drawn[1] / 4000 == pytest.approx(0.75, abs=0.03)


def test_evenness() -> None:
    assert evenness(np.array([1.0])) == 1.0
    assert evenness(np.full(7, 0.2)) == pytest.approx(1.0)
    assert evenness(np.array([3.0, 0.0])) == 0.0
    # 3/4 and 1/4: (0.75 ln 4/3 + 0.25 ln 4) / ln 2 = (0.215762 + 0.346574) / 0.693147
    assert evenness(np.array([3.0, 1.0])) == pytest.approx(0.811278, abs=1e-6)


# --- uniform


def test_uniform_is_the_order_that_there_always_was() -> None:
    config = validate({"name": "x", "steps": 1, "model": {"path": "tiny-random"}, "data": {"train": "rows.jsonl"},
                       "reward": {"type": "number"}, "algorithm": {"type": "grpo"}})  # fmt: skip
    assert config.data.curriculum == Uniform()
    assert config.data.curriculum.build(tasks({}, {}), 0) is None


# --- band


def test_the_band_by_hand() -> None:
    given = tasks({}, {}, {}, {})
    band = made(Band(rate=0.5), given)
    teach(band, given, (0, [1.0, 1.0]), (1, [1.0, 0.0]), (2, [0.0, 0.0]))
    assert band.state_dict()["estimates"] == [0.75, 0.5, 0.25, 0.5]
    assert band.metrics()["curriculum/in_band"] == 1.0, "one group says little yet"
    teach(band, given, (0, [1.0, 1.0]), (1, [1.0, 1.0, 1.0, 0.0]), (2, [0.0, 0.9]))
    assert band.state_dict()["estimates"] == [0.875, 0.625, 0.125, 0.5], "0.9 is below the level"
    metrics = band.metrics()
    assert metrics["curriculum/seen"] == 0.75
    assert metrics["curriculum/success"] == pytest.approx((0.875 + 0.625 + 0.125) / 3)
    assert metrics["curriculum/in_band"] == pytest.approx(1 / 3)
    # tasks 1 and 3 are in the band: 0.8 / 2 + 0.2 / 4 = 0.45 each, the others 0.05
    by_hand = -(2 * 0.45 * math.log(0.45) + 2 * 0.05 * math.log(0.05)) / math.log(4)
    assert metrics["curriculum/entropy"] == pytest.approx(by_hand)


def test_what_was_never_drawn_is_first_then_the_band() -> None:
    given = tasks({}, {}, {}, {})
    band = made(Band(rate=1.0), given, seed=5)
    order = [Deck(4, 5).at(i) for i in range(4)]
    assert band.choose(0, 3) == order[:3]
    assert band.choose(0, 3) == order[:3], "asked again it says the same"
    teach(band, given, *((row, [1.0, 0.0] if row == order[0] else [0.0]) for row in order[:3]))
    assert band.choose(3, 2)[0] == order[3]
    teach(band, given, (order[3], [0.0]))
    assert share(band, lambda row: row == order[0]) == pytest.approx(0.8 + 0.2 / 4, abs=0.03)
    assert sorted(band.choose(4, 4)) == [0, 1, 2, 3], "no task twice in a step while there are others"
    assert sorted(Counter(band.choose(4, 6)).values()) == [1, 1, 2, 2]


def test_where_nothing_is_in_the_band_the_nearest_is_drawn() -> None:
    given = tasks({}, {}, {})
    band = made(Band(rate=1.0, random=0.0), given)
    teach(band, given, (0, [1.0]), (1, [0.0] * 9 + [1.0]), (2, [0.0]))
    assert share(band, lambda row: row == 1, 50) == 1.0  # 0.1 is 0.1 below the band, the others are 0.2 off
    assert band.metrics()["curriculum/in_band"] == 0.0


def test_once_the_tasks_of_the_band_are_taken_the_nearest_come() -> None:
    given = tasks({}, {}, {}, {}, {})
    band = made(Band(rate=1.0, random=0.0), given)
    rates = {0: [1.0, 0.0], 1: [1.0], 2: [0.0] * 9 + [1.0], 3: [0.0], 4: [0.0] * 6 + [1.0]}
    teach(band, given, *rates.items())
    for position in range(20):
        chosen = band.choose(position, 5)
        assert (chosen[:3], set(chosen[3:])) == ([0, 4, 2], {1, 3}), "0, 0.06, 0.1 and 0.2 outside of the band"


def test_tasks_with_the_same_columns_share_an_estimate_and_take_turns() -> None:
    given = tasks(*({"level": i // 3} for i in range(6)))
    band = made(Band(by=("level",), rate=1.0, random=0.0), given)
    easy, hard = sorted(band.choose(0, 2))
    assert (easy // 3, hard // 3) == (0, 1), "one of each comes first"
    teach(band, given, (easy, [1.0]), (hard, [1.0, 0.0]))
    assert band.state_dict()["estimates"] == [1.0, 0.5]
    assert band.metrics()["curriculum/in_band"] == 0.5
    assert sorted(band.choose(2, 3)) == [3, 4, 5], "none twice in a step, also where a turn begins again"
    seen = [hard]
    for position in range(2, 7):
        (row,) = band.choose(position, 1)
        seen.append(row)
        teach(band, given, (row, [1.0, 0.0]))
    assert sorted(seen[:3]) == sorted(seen[3:]) == [3, 4, 5], "each had its turn before one comes again"


def test_what_says_nothing_of_the_policy_moves_no_estimate() -> None:
    given = tasks({})
    sample = Sample([1, 2], [False, True], [0.0, -1.0], [0.0, 0.5], 0)
    paid = Trajectory(given[0], (), [sample], score=0.5)
    told = Trajectory(given[0], (), [], score=0.0, drawn=1)
    nothing = Trajectory(given[0], (), [])
    part = Trajectory(given[0], (), [], score=0.0, metrics={"reward/right": 1.0})

    def estimate(knobs: Band, *members: Trajectory) -> float:
        band = made(knobs, given)
        band.learn([0], [members])
        return band.state_dict()["estimates"][0]

    assert estimate(Band(rate=1.0), told, nothing) == 0.5
    assert estimate(Band(rate=1.0), paid, told) == 1.0, "the score and what the environment paid"
    assert estimate(Band(rate=1.0), part) == 0.0
    assert estimate(Band(rate=1.0, component="right"), part, nothing) == 1.0


# --- mixtures


def test_one_gaussian_is_mean_and_covariance() -> None:
    points = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    found = mixture.fit(points, 1, np.random.default_rng(0))
    assert found.means == pytest.approx(np.array([[1.0, 1.0]]))
    assert np.allclose(found.covariances, np.eye(2) + mixture.RIDGE * np.eye(2), atol=1e-12)
    # each point: -ln 2 pi - (1 + 1) / 2; five free numbers
    whole = 4 * (-math.log(2 * math.pi) - 1)
    assert found.log_likelihood(points) == pytest.approx(whole, abs=1e-5)
    assert found.parameters == 5
    assert mixture.criterion(found, points, "aic") == pytest.approx(2 * 5 - 2 * whole, abs=1e-4)
    assert mixture.criterion(found, points, "bic") == pytest.approx(5 * math.log(4) - 2 * whole, abs=1e-4)


def test_densities_of_two_gaussians_by_hand() -> None:
    two = mixture.Mixture(np.array([0.5, 0.5]), np.array([[-1.0], [1.0]]), np.ones((2, 1, 1)))
    logs = two.log_densities(np.array([[0.0], [1.5]]))
    odds = logs[:, 1] - logs[:, 0]
    assert odds == pytest.approx([0.0, 3.0])  # ((x + 1)^2 - (x - 1)^2) / 2 = 2 x
    assert math.exp(logs[0, 0]) == pytest.approx(0.5 * math.exp(-0.5) / math.sqrt(2 * math.pi))
    assert mixture.parameters(2, 1) == 5
    assert mixture.parameters(3, 2) == 17


def test_clusters_far_apart_are_found_and_counted() -> None:
    corners = np.array([[0.0, 0.0], [0.02, 0.0], [0.0, 0.02], [0.02, 0.02]])
    points = np.concatenate([corners + np.array([x, y]) for x, y in ((0, 0), (1, 0), (0, 1))] * 2)
    found = mixture.best(points, 5, "bic", np.random.default_rng(3))
    assert len(found.shares) == 3
    assert found.shares == pytest.approx([1 / 3] * 3, abs=1e-6)
    means = sorted(map(tuple, found.means.round(6).tolist()))
    assert means == [(0.01, 0.01), (0.01, 1.01), (1.01, 0.01)]
    assert np.allclose(found.covariances, (1e-4 + mixture.RIDGE) * np.eye(2), atol=1e-9)  # 0.01^2 around each mean


def test_points_that_are_all_the_same_have_a_mixture_too() -> None:
    found = mixture.best(np.full((30, 2), 0.5), 4, "aic", np.random.default_rng(0))
    assert np.isfinite(found.log_likelihood(np.full((1, 2), 0.5)))
    assert len(mixture.best(np.eye(3)[:, :2], 4, "aic", np.random.default_rng(0)).shares) == 1, "three points are few"


@pytest.mark.parametrize("k", [2, 3, 6])
def test_maximisation_never_makes_a_mixture_less_likely(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    points = np.random.default_rng(k).normal(size=(60, 2))
    reached = []
    for rounds in range(8):
        monkeypatch.setattr(mixture, "ROUNDS", rounds)
        reached.append(mixture.fit(points, k, np.random.default_rng(1)).log_likelihood(points))
    assert all(after >= before - 1e-3 for before, after in pairwise(reached))
    assert reached[-1] > reached[0]


# --- absolute learning progress


def test_progress_is_measured_from_the_nearest_task_of_the_steps_before() -> None:
    given = tasks(*({"difficulty": d} for d in (0, 4, 10, 10)))  # 0, 0.4, 1 and 1 again
    alp = made(AlpGmm(columns=("difficulty",)), given)
    teach(alp, given, (0, [0.5, 0.5]), (2, [0.0, 0.0]))
    assert alp.state_dict()["window"] == [[0, 0.0], [2, 0.0]], "there is nothing before"
    teach(alp, given, (0, [1.0]), (1, [0.25]), (3, [0.0, 1.0]), (2, [1.0]), (0, [None]))
    # 0.4 is nearest to 0, where 0.5 was before: |0.25 - 0.5|; both rows at 1 are measured from 0
    assert alp.state_dict()["window"][2:] == [[0, 0.5], [1, 0.25], [2, 0.5], [2, 1.0]]
    assert alp.state_dict()["last"] == [1.0, 0.25, 0.75], "at 1 the mean of 0.5 and 1"
    metrics = alp.metrics()
    assert metrics["curriculum/difficulty/difficulty"] == (0 + 4 + 10 + 10 + 0) / 5
    assert metrics["curriculum/progress"] == pytest.approx(2.25 / 6)
    assert metrics["curriculum/success"] == pytest.approx((1.0 + 0.25 + 2 * 0.75) / 4)
    assert (metrics["curriculum/gaussians"], metrics["curriculum/entropy"]) == (0.0, 1.0)


def test_where_results_change_is_drawn_more_often() -> None:
    given = tasks(*({"difficulty": d} for d in range(40)))
    alp = made(AlpGmm(columns=("difficulty",), every=80), given)
    assert share(alp, lambda row: row < 10) == pytest.approx(0.25, abs=0.03), "before the first fit all alike"
    for now in (0.0, 1.0):  # results change from 0 to 1 for the ten easiest, and nowhere else
        for row in range(40):
            teach(alp, given, (row, [now if row < 10 else 0.0]))
    assert alp.state_dict()["mixture"] is not None
    assert share(alp, lambda row: row < 10) > 0.7
    assert share(alp, lambda row: row >= 20) == pytest.approx(0.2 * 0.5, abs=0.05), "the share that is random"


def test_a_fit_is_made_every_so_many_results_of_as_many() -> None:
    given = tasks(*({"difficulty": d} for d in range(5)))
    alp = made(AlpGmm(columns=("difficulty",), every=8), given)
    fits = []
    for i in range(24):
        teach(alp, given, (i % 5, [float(i % 3)]))
        state = alp.state_dict()
        fits.append(state["mixture"])
        assert len(state["window"]) == min(i + 1, 8)
    assert fits[6] is None
    assert fits[7] == fits[14] != fits[15] == fits[22] != fits[23]


# --- skills


def test_the_profile_by_hand() -> None:
    given = tasks({"skills": ["add", "carry"]}, {"skills": "add"}, {"skills": "carry, borrow"}, {"skills": ["add"]})
    skills = made(Skills(rate=0.5), given)
    teach(skills, given, (0, [1.0, 0.0]), (1, [1.0, 1.0]))
    # add: 1 -> 0.75 -> 0.375; carry: 1 -> 0.75; borrow was not tried
    metrics = skills.metrics()
    assert metrics["curriculum/missing/add"] == 0.375
    assert metrics["curriculum/missing/carry"] == 0.75
    assert metrics["curriculum/missing/borrow"] == 1.0
    assert metrics["curriculum/missing"] == pytest.approx((0.375 + 0.75 + 1.0) / 3)
    assert metrics["curriculum/seen"] == 0.75, "rows 1 and 3 need the same"
    # weights 0.5625, 0.375, 0.875, 0.375 sum to 2.1875: row 2 is drawn 0.8 * 0.4 + 0.2 / 4 = 0.37 of the time
    assert share(skills, lambda row: row == 2) == pytest.approx(0.37, abs=0.03)
    p = [0.8 * w / 2.1875 + 0.05 for w in (0.5625, 0.375, 0.875, 0.375)]
    assert metrics["curriculum/entropy"] == pytest.approx(-sum(x * math.log(x) for x in p) / math.log(4))


def test_where_nothing_is_missing_all_are_drawn_alike() -> None:
    given = tasks({"skills": "a"}, {"skills": "b"}, {"skills": "b"})
    skills = made(Skills(rate=1.0), given)
    teach(skills, given, (0, [1.0]), (1, [1.0]))
    assert skills.metrics()["curriculum/entropy"] == pytest.approx(1.0)
    assert share(skills, lambda row: row == 0) == pytest.approx(1 / 3, abs=0.03)


# --- columns


@pytest.mark.parametrize(("knobs", "columns", "said"), [
    (Band(by=("topic",)), [{"level": 1}], "data.curriculum.by: data.train has no column 'topic'; it has level"),
    (Band(by=("topic",)), [{"topic": 1}, {"topic": None}], r"1 row\(s\) of data.train have nothing in column 'topic'"),
    (AlpGmm(columns=("d",)), [{"d": 1}, {"d": "hard"}, {"d": True}], r"'d' has 2 value\(s\) that are no finite number"),
    (AlpGmm(columns=("d",)), [{"d": 1}, {"d": math.nan}], r"no finite number; choose a column of numbers. Rows: t1"),
    (AlpGmm(columns=("d",)), [{"d": 1}, {"d": 10**400}], r"1 value\(s\) that are no finite number"),
    (AlpGmm(columns=("d",)), [{"d": 1}, {"d": 1.0}], "column 'd' has one value alone, so it says nothing; leave it"),
    (Skills(), [{"skills": "a"}, {"skills": " , "}], r"1 row\(s\) of data.train have no skill in 'skills'; label them"),
    (Skills(column="topics"), [{"a": 1}], "data.curriculum.column: data.train has no column 'topics'; it has a"),
])  # fmt: skip
def test_columns_that_cannot_be_read_are_refused(knobs: BaseModel, columns: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(InputError, match=said):
        made(knobs, tasks(*columns))
