"""Credit and averages over turns, against loops over the trajectories themselves."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from rlft.algorithms import catalog, turns
from rlft.algorithms.base import Algorithm, Outputs
from rlft.batch import Batch
from rlft.types import NAN, Group, Sample, Task, Trajectory

Double = Callable[[Batch], Batch]
READ = TypeAdapter(catalog.AlgorithmConfig)
Turn = tuple[int, list[int], float]  # the row, its columns, what it was paid


def build(**knobs: Any) -> Algorithm:
    return READ.validate_python({"type": "rise", **knobs}).build()


def episodes(seed: int, sizes: tuple[int, ...] = (3, 2)) -> list[Group]:
    """Trajectories of one to four turns in one or two samples, some paid on the way and some at the end."""
    draw = random.Random(seed)

    def sample(count: int) -> Sample:
        mask: list[bool] = []
        paid: list[float] = []
        for _ in range(count):
            before, said = draw.randint(1, 3), draw.randint(1, 4)
            mask += [False] * before + [True] * said
            paid += [0.0] * (before + said - 1) + [draw.choice([0.0, 0.5, 1.0, -1.0])]
        after = draw.randint(0, 2)  # the environment may have the last word
        mask, paid = mask + [False] * after, paid + [0.0] * after
        logprobs = [-draw.expovariate(0.5) if chosen else NAN for chosen in mask]
        return Sample([draw.randrange(3, 300) for _ in mask], mask, logprobs, paid, version=0)

    def play(group: int) -> Trajectory:
        samples = [sample(draw.randint(1, 2)) for _ in range(draw.randint(1, 2))]
        return Trajectory(Task(f"task-{group}", ()), (), samples, score=draw.choice([0.0, 0.0, 0.75]))

    return [tuple(play(g) for _ in range(size)) for g, size in enumerate(sizes)]


def listed(groups: list[Group]) -> list[list[list[Turn]]]:
    """Per group and trajectory its turns, read off the samples; the score belongs to the last."""
    found, row = [], 0
    for group in groups:
        members = []
        for trajectory in group:
            own: list[Turn] = []
            for sample in trajectory.samples:
                columns: list[int] = []
                for j, chosen in enumerate([*sample.mask, False]):
                    if chosen:
                        columns.append(j)
                    elif columns:
                        own.append((row, columns, sum(sample.rewards[c] for c in columns)))
                        columns = []
                row += 1
            assert trajectory.score is not None
            own[-1] = (*own[-1][:2], own[-1][2] + trajectory.score)
            members.append(own)
        found.append(members)
    return found


def survivors(members: list[list[Turn]], keep: str) -> list[Turn]:
    kept = []
    for own in members:
        for k, turn in enumerate(own):
            earlier = [paid for _, _, paid in own[:k]]
            dropped = (keep == "better" and k and turn[2] <= earlier[-1]) or (
                keep == "best" and any(turn[2] < e for e in earlier)
            )
            if not dropped:
                kept.append(turn)
    return kept


def reference(groups: list[Group], logprobs: Tensor, temperature: float, scale: str, keep: str) -> tuple[float, Tensor]:
    """- 1 / turns * sum over turns of exp(r / T) [/ the task's mean] * mean over tokens of log p, and its slopes."""
    kept = [survivors(members, keep) for members in listed(groups)]
    count = sum(map(len, kept))
    value, slopes = 0.0, torch.zeros_like(logprobs)
    for group in kept:
        weights = [math.exp(paid / temperature) for _, _, paid in group]
        mean = sum(weights) / len(weights) if scale == "task" else 1.0
        for (row, columns, _), weight in zip(group, weights, strict=True):
            for column in columns:
                share = -weight / mean / len(columns) / count
                value += share * float(logprobs[row, column])
                slopes[row, column] += share
    return value, slopes


@pytest.mark.parametrize(("keep", "kept"), [("better", [True, False, False]), ("best", [True, True, True])])
@pytest.mark.parametrize("paid", [0.1, 0.3, 0.7, 1.0, 100.1])
def test_rounding_makes_no_turn_better(keep: Any, kept: list[bool], paid: float) -> None:
    """A batch is float32, where three times 0.1 is not the total of 0.3."""
    mask = [False, True] * 3
    sample = Sample([5] * 6, mask, [NAN] * 6, [0.0, paid] * 3, 0)
    batch = Batch.of([(Trajectory(Task("t", ()), (), [sample], score=0.0),)])
    assert turns.reward_weighted(batch, 0.4, keep=keep).mask[0, 1::2].tolist() == kept


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", ["task", "none"])
@pytest.mark.parametrize("keep", ["all", "better", "best"])
def test_value_and_gradient_in_loops(double: Double, seed: int, scale: str, keep: str) -> None:
    groups = episodes(seed)
    algorithm = build(temperature=0.4, scale=scale, keep=keep)
    batch = algorithm.weigh(algorithm.credit(double(Batch.of(groups))))
    torch.testing.assert_close(torch.where(batch.mask, batch.weights, 0.0).sum(), torch.tensor(1.0).double())
    logprobs = torch.where(double(Batch.of(groups)).mask, batch.logprobs, 0.0).requires_grad_()
    loss, _ = algorithm.loss(Outputs(logprobs, torch.zeros_like(logprobs.detach())), batch)
    loss.backward()
    value, slopes = reference(groups, logprobs.detach(), 0.4, scale, keep)
    assert loss.item() == pytest.approx(value, rel=1e-9)
    torch.testing.assert_close(logprobs.grad, slopes, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_trap_7_it_adds_over_micro_batches(double: Double, size: int) -> None:
    algorithm = build()
    batch = algorithm.weigh(algorithm.credit(double(Batch.of(episodes(5)))))

    def loss(part: Batch) -> float:
        logprobs = torch.where(part.mask, part.logprobs, 0.0)
        return float(algorithm.loss(Outputs(logprobs, torch.zeros_like(logprobs)), part)[0])

    parts = [batch.rows(index) for index in torch.randperm(len(batch)).split(size)]
    assert sum(map(loss, parts)) == pytest.approx(loss(batch), rel=1e-9)


def test_by_hand(double: Double) -> None:
    """A wrong answer, then a right one, against a task with one right answer: T = 1."""

    def play(rewards: list[float], mask: str) -> Trajectory:
        chosen = [c == "x" for c in mask]
        logprobs = [-1.0 if c else NAN for c in chosen]
        return Trajectory(Task("t", ()), (), [Sample([5] * len(mask), chosen, logprobs, rewards, 0)], score=0.0)

    two = play([0, 0, 0, 0, 0, 0, 1], ".xx.xxx")
    batch = double(Batch.of([(two,), (play([0, 1], ".x"),)]))
    credited = turns.reward_weighted(batch, 1.0)
    mean = (1 + math.e) / 2
    low, high = 1 / mean, math.e / mean
    assert credited.advantages[0].tolist() == pytest.approx([0, low, low, 0, high, high, high])
    assert credited.advantages[1, :2].tolist() == pytest.approx([0, 1])
    third = 1 / 3
    assert turns.by_turn(credited).weights[0].tolist() == pytest.approx([0, third / 2, third / 2, 0, *[third / 3] * 3])
    assert turns.by_turn(credited).weights[1, :2].tolist() == pytest.approx([0, third])


def test_trap_18_junk_between_the_turns(double: Double) -> None:
    batch = double(Batch.of(episodes(1)))
    clean = turns.by_turn(turns.reward_weighted(batch, 0.4))
    junk = torch.where(batch.mask, batch.rewards, math.nan)
    dirty = turns.by_turn(turns.reward_weighted(batch.with_(rewards=junk), 0.4))
    for field in ("advantages", "weights"):
        torch.testing.assert_close(getattr(dirty, field), getattr(clean, field), rtol=0, atol=0)
    assert not clean.advantages[~batch.mask].any()
    assert not clean.weights[~batch.mask].any()


def test_trap_3_the_environments_words_have_no_share(double: Double) -> None:
    """Longer replies between the turns change neither the loss nor a gradient."""

    def play(between: int) -> Trajectory:
        mask = [False] + [True] * 2 + [False] * between + [True] * 3
        rewards = [0.0, 0.0, 0.5, *[0.0] * (between + 2), 1.0]
        logprobs = [-1.5 if chosen else NAN for chosen in mask]
        return Trajectory(Task("t", ()), (), [Sample([7] * len(mask), mask, logprobs, rewards, 0)], score=0.0)

    def slopes(between: int) -> list[float]:
        algorithm = build()
        batch = algorithm.weigh(algorithm.credit(double(Batch.of([(play(between),)]))))
        logprobs = torch.where(batch.mask, batch.logprobs, 0.0).requires_grad_()
        algorithm.loss(Outputs(logprobs, torch.zeros_like(logprobs.detach())), batch)[0].backward()
        assert logprobs.grad is not None
        assert not logprobs.grad[~batch.mask].any()
        return logprobs.grad[batch.mask].tolist()

    assert slopes(1) == slopes(40)


def test_padding_on_the_left_changes_nothing(double: Double) -> None:
    groups = episodes(2)
    right, left = (
        turns.by_turn(turns.reward_weighted(double(Batch.of(groups, side)), 0.4)) for side in ("right", "left")
    )
    for field in ("advantages", "weights"):
        assert getattr(left, field)[left.mask].tolist() == getattr(right, field)[right.mask].tolist()


def test_the_order_of_trajectories_does_not_matter(double: Double) -> None:
    groups = episodes(3)
    turned = [group[::-1] for group in groups]
    one, two = (turns.reward_weighted(double(Batch.of(g)), 0.4, keep="best") for g in (groups, turned))
    totals = [sorted(round(a, 9) for a in b.advantages[b.mask].tolist()) for b in (one, two)]
    assert totals[0] == totals[1]


@pytest.mark.parametrize("scale", ["task", "none"])
def test_trap_40_huge_rewards_stay_finite(double: Double, scale: Any) -> None:
    groups = episodes(0)
    batch = double(Batch.of(groups))
    found = turns.reward_weighted(batch.with_(rewards=batch.rewards * 1e6, scores=batch.scores * 1e6), 0.1, scale)
    assert torch.isfinite(found.advantages).all()


def test_an_empty_batch(double: Double) -> None:
    batch = double(Batch.of([]))
    assert turns.by_turn(turns.reward_weighted(batch, 0.4)).weights.numel() == 0


@pytest.mark.parametrize("knobs", [{"temperature": 0.0}, {"keep": "worst"}, {"scale": "batch"}, {"clip": 0.2}])
def test_wrong_knobs_are_refused(knobs: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        build(**knobs)


# --- turns compared with each other -----------------------------------------------------------------------------------


def compared(groups: list[Group], knobs: dict[str, Any]) -> Tensor:
    """Advantages by loops over the trajectories: the episode's own, and each turn's beside the turns it is like."""
    batch = Batch.of(groups)
    advantages = torch.zeros(batch.tokens.shape, dtype=torch.float64)
    scaled = knobs.get("scale", "group") == "group"

    def beside(values: list[float]) -> list[float]:
        mean = math.fsum(values) / len(values)
        if max(values) - min(values) < 1e-9:
            return [0.0] * len(values)
        std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)) + 1e-4 if scaled else 1.0
        return [(v - mean) / std for v in values]

    for group, members in zip(groups, listed(groups), strict=True):
        whole = beside([float(t.total or 0.0) for t in group])
        found: dict[Any, list[tuple[float, Turn]]] = {}
        for trajectory, own, base in zip(group, members, whole, strict=True):
            score = trajectory.score or 0.0
            earned = [paid - (score if k == len(own) - 1 else 0.0) for k, (_, _, paid) in enumerate(own)]
            spread = knobs.get("outcome") == "spread"
            earned = [e + (score / len(own) if spread else score * (k == len(own) - 1)) for k, e in enumerate(earned)]
            for k, turn in enumerate(own):
                row, columns, _ = turn
                later = math.fsum(knobs.get("gamma", 0.95) ** j * e for j, e in enumerate(earned[k:]))
                before = columns[0]
                while before and not batch.mask[row, before - 1]:
                    before -= 1
                key = k if knobs.get("alike") == "turn" else tuple(batch.tokens[row, before : columns[0]].tolist())
                found.setdefault(key, []).append((later, turn))
                advantages[row, columns] += base
        for turns_alike in found.values():
            values = beside([later for later, _ in turns_alike])
            for value, (_, (row, columns, _)) in zip(values, turns_alike, strict=True):
                advantages[row, columns] += knobs.get("share", 1.0) * value
    return advantages


def meeting(seed: int) -> list[Group]:
    """Episodes whose observations are of two kinds, so that many turns follow the same one."""
    groups = episodes(seed, (4, 3))
    draw = random.Random(seed)
    for group in groups:
        for trajectory in group:
            for sample in trajectory.samples:
                kind = draw.randint(7, 8)
                for j, chosen in enumerate(sample.mask):
                    if not chosen:
                        kind = draw.randint(7, 8) if j and sample.mask[j - 1] else kind
                        sample.tokens[j] = kind
    return groups


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"alike": "turn"},
        {"gamma": 0.0, "scale": "none"},
        {"outcome": "spread", "share": 0.5, "alike": "turn"},
        {"gamma": 1.0, "outcome": "spread"},
    ],
    ids=str,
)
def test_gigpo_in_loops(double: Double, seed: int, knobs: dict[str, Any]) -> None:
    groups = meeting(seed)
    batch = double(Batch.of(groups))
    found = READ.validate_python({"type": "gigpo", **knobs}).build().credit(batch).advantages
    torch.testing.assert_close(found, compared(groups, knobs), rtol=1e-6, atol=1e-6)


def test_gigpo_by_hand(double: Double) -> None:
    """Two episodes of two turns. Both begin alike; then they see different things, and nobody is there to compare."""

    def episode(seen: int, paid: float, score: float) -> Trajectory:
        mask, tokens = [False, True, False, True], [5, 9, seen, 9]
        sample = Sample(tokens, mask, [NAN, -1.0, NAN, -1.0], [0.0, paid, 0.0, 0.0], 0)
        return Trajectory(Task("t", ()), (), [sample], score=score)

    batch = double(Batch.of([(episode(6, 0.0, 1.0), episode(7, 0.5, 0.0))]))
    knobs = {"type": "gigpo", "scale": "none", "gamma": 0.5}
    found = READ.validate_python(knobs).build().credit(batch).advantages
    # Totals 1 and 0.5: +-0.25. First turns return 0.5 * 1 = 0.5 and 0.5: equal. Second turns follow 6 and 7.
    assert found[:, 1].tolist() == found[:, 3].tolist() == [0.25, -0.25]
    found = READ.validate_python(knobs | {"alike": "turn"}).build().credit(batch).advantages
    assert found[:, 1].tolist() == [0.25, -0.25], "the first turns return the same"
    assert found[:, 3].tolist() == [0.75, -0.75], "the second ones 1 and 0"


def test_gigpo_without_turns_is_grpo(double: Double, make_groups: Any) -> None:
    """One turn an episode: with no share of the turns, and twice the advantage with all of it."""
    batch = double(Batch.of(make_groups(3, 4)))
    grpo = READ.validate_python({"type": "grpo"}).build().credit(batch).advantages
    for share, times in ((0.0, 1), (1.0, 2)):
        found = READ.validate_python({"type": "gigpo", "share": share}).build().credit(batch).advantages
        torch.testing.assert_close(found, times * grpo, rtol=1e-9, atol=1e-9)
