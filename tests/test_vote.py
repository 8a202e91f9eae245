"""Answers put together by vote and by a verifier, with numbers worked out by hand; and a verifier trained for it."""

from __future__ import annotations

import asyncio
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import TypeAdapter
from rich.console import Console

from rlft.after import evaluate
from rlft.evaluate import summary
from rlft.interval import told, wilson
from rlft.rewards.base import Config as Judge
from rlft.rewards.base import scored
from rlft.rewards.catalog import RewardConfig
from rlft.session import begin
from rlft.settings import load, validate
from rlft.terminal import Terminal
from rlft.types import Group, InputError, Sample, Task, Trajectory
from rlft.vote import Vote, best, clustered, largest, majority, rerank, verified, voting, weighted

PAGE = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
# Seven samples of one task: A three times, B twice, C once, and one without an answer.
SAID = ["A", "A", "B", "C", "B", "A", None]
CLUSTERS = [[0, 1, 5], [2, 4], [3]]
SCORES = [0.2, 0.3, 0.9, 0.95, 0.8, 0.1, 1.0]


async def equal(one: Any, other: Any) -> bool:
    return one == other


def config(**knobs: Any) -> Judge:
    return TypeAdapter(RewardConfig).validate_python(knobs)


def play(text: str, right: float | None = None, **info: Any) -> Trajectory:
    """A completion, and the verdict that the reward `correct` gave it."""
    asked = {"role": "user", "content": "?"}
    sample = Sample([5, 6], [False, True], [0.0, 0.0], [0.0, 0.0], version=0)
    metrics = {} if right is None else {"reward/correct": right}
    return Trajectory(
        Task("t", (asked,), info), (asked, {"role": "assistant", "content": text}), [sample], 0.0, metrics
    )


def split(judge: Judge, *texts: str, **info: Any) -> list[list[int]]:
    """The clusters of these completions as a reward reads them."""
    return [
        list(c) for c in asyncio.run(clustered([judge.said(play(t, **info)) for t in texts], judge.same())).clusters
    ]


def test_wilsons_interval_is_that_of_the_tables() -> None:
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    cases = [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
    for hits, n, low, high in cases:
        assert wilson(hits / n, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1.0, 20) == pytest.approx((1 - 0.1611, 1.0), abs=5e-5)
    assert wilson(1.0, 3)[1] <= 1


def test_accuracy_has_its_interval() -> None:
    found = summary([play("x", float(i < 15)) for i in range(148)], "correct")
    assert told(found, "eval/accuracy") == "0.101 (0.062 to 0.160)"


def test_the_same_answers_are_a_cluster_and_none_is_in_none() -> None:
    ballot = asyncio.run(clustered(SAID, equal))
    assert ballot.clusters == CLUSTERS
    assert (ballot.answered, ballot.undecided) == (6, 0)


def test_what_is_not_the_same_as_itself_is_no_answer_and_undecided_pairs_are_apart() -> None:
    async def odd(one: Any, other: Any) -> bool | None:
        return False if 0 in (one, other) else None if one != other else True

    ballot = asyncio.run(clustered([0, 1, 2, 1, 0], odd))
    assert ballot.clusters == [[1, 3], [2]]
    assert (ballot.answered, ballot.undecided) == (3, 1)


def test_the_first_answer_of_a_cluster_speaks_for_it() -> None:
    """3 is within 1 of 2 and of 4, which are not of each other: it goes with the one that was sampled first."""
    judge = config(type="number", tolerance=1)
    assert split(judge, "2", "4", "3") == [[0, 2], [1]]
    assert split(judge, "4", "2", "3") == [[0, 2], [1]]
    assert split(judge, "3", "2", "4") == [[0, 1, 2]]


def test_the_vote_and_its_ties() -> None:
    assert majority(CLUSTERS) == 0
    assert majority([[0], [1, 2]]) == 1
    assert majority([[0, 3], [1, 2]]) == 0, "a tie is for the one that was sampled first"
    assert majority([]) is None
    assert largest([[0], [1, 4], [2, 3], [5]], 3) == [[1, 4], [2, 3], [0]]


@pytest.mark.parametrize(("top", "reranked", "summed"), [(1, 1, 0), (2, 2, 2), (3, 3, 2), (8, 3, 2)])
def test_what_a_verifier_chooses(top: int, reranked: int, summed: int) -> None:
    """Sums: A 0.6, B 1.7, C 0.95. Best of A 0.3 at 1, of B 0.9 at 2, of C 0.95 at 3."""
    assert best(SCORES, range(7)) == 6, "of all samples, also those without an answer"
    assert rerank(CLUSTERS, SCORES, top) == reranked
    assert weighted(CLUSTERS, SCORES, top) == summed


def test_the_sum_is_for_what_is_said_often_and_believed() -> None:
    """A 3 * 0.6 = 1.8 against B 0.9 + 0.8 = 1.7, though each B is believed more."""
    scores = [0.6, 0.6, 0.9, 0.1, 0.8, 0.6, None]
    assert weighted(CLUSTERS, scores, 8) == 0
    assert rerank(CLUSTERS, scores, 8) == 2


def test_equal_scores_are_for_the_larger_cluster_and_then_the_first() -> None:
    assert rerank([[0], [1, 2]], [0.5, 0.5, 0.5], 8) == 1
    assert weighted([[0], [1, 2]], [0.5, 0.25, 0.25], 8) == 1
    assert weighted([[0], [1]], [0.5, 0.5], 8) == rerank([[0], [1]], [0.5, 0.5], 8) == 0
    assert best([0.5, 0.5], range(2)) == 0


def test_a_missing_score_is_no_zero() -> None:
    """Below zero a sample without a score would win as a zero; among positive ones it adds nothing."""
    assert best([None, -2.0, -1.0], range(3)) == 2
    assert rerank([[0, 3], [1], [2]], [None, -2.0, -1.0, None], 8) == 2
    assert weighted([[0, 1], [2]], [None, None, 0.0], 8) == 2
    assert weighted([[0, 1], [2]], [None, 0.3, 0.2], 8) == 0
    assert best([None], range(1)) is rerank([[0]], [None], 8) is weighted([[0]], [None], 8) is None


def test_the_order_of_samples_does_not_matter_without_ties() -> None:
    draw = random.Random(0)
    seen = 0
    for _ in range(600):
        said = [draw.choice("ABCD") for _ in range(9)]
        scores: list[float | None] = [draw.random() if draw.random() > 0.2 else None for _ in said]
        shuffled = draw.sample(range(9), 9)
        sizes = sorted((said.count(x) for x in set(said)), reverse=True)
        if len(set(sizes)) < len(sizes):
            continue
        seen += 1
        chosen = []
        for order in (range(9), shuffled):
            clusters = asyncio.run(clustered([said[i] for i in order], equal)).clusters
            mixed = [scores[i] for i in order]
            places = (
                majority(clusters),
                best(mixed, range(9)),
                rerank(clusters, mixed, 2),
                weighted(clusters, mixed, 2),
            )
            chosen.append([None if place is None else said[order[place]] for place in places])
        assert chosen[0] == chosen[1]
    assert seen > 50


def test_one_cluster_is_the_vote_and_all_clusters_are_the_best_answer() -> None:
    draw = random.Random(1)
    for _ in range(50):
        clusters = asyncio.run(clustered([draw.choice("ABCD") for _ in range(9)], equal)).clusters
        scores = [draw.random() for _ in range(9)]
        first = largest(clusters, 1)[0]
        assert weighted(clusters, scores, 1) == majority(clusters) == first[0]
        assert rerank(clusters, scores, 1) in first
        assert rerank(clusters, scores, 9) == best(scores, range(9))


def test_mathematics_votes_by_value() -> None:
    texts = [r"So it is \boxed{\frac{2}{4}}.", r"\boxed{0.25}", "It is 0.5.", "I do not know.", r"\boxed{\frac{1}{2}}"]
    assert split(config(type="math"), *texts, answer="1/2") == [[0, 2, 4], [1]]
    assert split(config(type="math", boxed="only"), *texts, answer="1/2") == [[0, 4], [1]]
    formulas = [r"\boxed{x+1}", r"\boxed{1+x}", r"\boxed{x-1}", r"\boxed{\sqrt{2}}", r"\boxed{2^{1/2}}", "", "50 cm"]
    assert split(config(type="math"), *formulas, answer="1") == [[0, 1], [2], [3, 4], [6]]
    assert split(config(type="math"), r"\boxed{50\text{ cm}}", r"\boxed{0.5\text{ m}}", r"\boxed{5\text{ cm}}") == [
        [0, 1],
        [2],
    ]


@pytest.mark.parametrize(
    ("knobs", "info", "texts", "found"),
    [
        ({"type": "number"}, {}, ["It is 1,000.", "x", "1000.0", "7 or 8"], [[0, 2], [3]]),
        ({"type": "number", "which": "only"}, {}, ["It is 12", "7 or 12"], [[0]]),
        ({"type": "choice"}, {"answer": "B"}, ["(B)", "the answer is B", "A.", "none"], [[0, 1], [2]]),
        ({"type": "choice"}, {"answer": "AC"}, ["A, C", r"\boxed{CA}", "C"], [[0, 1], [2]]),
        ({"type": "matching"}, {"answer": "1-A, 2-B"}, ["1-A, 2-B", "2B 1A", "1-A", "no"], [[0, 1], [2]]),
        ({"type": "exact"}, {}, [" yes", "Yes", "yes\n", " "], [[0, 2], [1]]),
        ({"type": "exact", "ignore_case": True}, {}, [" yes", "Yes"], [[0, 1]]),
        ({"type": "format", "pattern": ".*"}, {}, ["a b", " a b\n", "ab", ""], [[0, 1], [2]]),
    ],
)
def test_every_reward_reads_answers_in_its_own_way(
    knobs: dict[str, Any], info: dict[str, Any], texts: list[str], found: list[list[int]]
) -> None:
    assert split(config(**knobs), *texts, **info) == found


NUMBER = {"type": "number", "tolerance": 0.25}
TIDY = {"type": "format", "pattern": ".*"}


@pytest.mark.parametrize(
    ("knobs", "component", "found"),
    [
        (NUMBER, "number", "number"),
        ({"type": "weighted", "terms": {"right": NUMBER, "tidy": TIDY}}, "right", "number"),
        ({"type": "weighted", "terms": {"right": NUMBER, "tidy": TIDY}}, "tidy", "format"),
        ({"type": "sequence", "terms": {"tidy": TIDY, "right": NUMBER}}, "right", "number"),
        ({"type": "gated", "gate": TIDY, "of": NUMBER}, "gated", "number"),
        ({"type": "gated", "gate": TIDY, "of": NUMBER}, "gated/gate", "format"),
        ({"type": "weighted", "terms": {"both": {"type": "gated", "gate": TIDY, "of": NUMBER}}}, "both", "number"),
        ({"type": "weighted", "terms": {"a": {"type": "weighted", "terms": {"b": NUMBER}}}}, "a/b", "number"),
        ({"type": "per_turn", "of": NUMBER}, "number", "number"),
        ({"type": "progress", "of": NUMBER}, "progress", "number"),
        ({"type": "cosine", "limit": 9, "of": NUMBER}, "cosine/of", "number"),
        ({"type": "first", "terms": {"a": NUMBER}}, "first/a", "number"),
    ],
)
def test_the_reward_that_judges_reads_the_answers(knobs: dict[str, Any], component: str, found: str) -> None:
    judge = config(**knobs)
    assert component in judge.components()
    assert judge.reader(component).type == found


def test_a_routed_reward_reads_as_the_term_that_judges_the_task() -> None:
    terms = {"sum": NUMBER, "text": {"type": "gated", "gate": TIDY, "of": {"type": "exact"}}}
    judge = config(type="routed", column="kind", terms=terms)
    assert split(judge, "It is 1.0", "1.2 then", "2", kind="sum") == [[0, 1], [2]]
    assert split(judge, "It is 1.0", "1.2 then", "2", kind="text") == [[0], [1], [2]]


def groups() -> list[Group]:
    """A task whose vote is wrong, one whose vote is right, and one that is never right."""
    first = (play("3", 0.0), play("4", 1.0), play("3", 0.0), play("??", 0.0))
    second = (play("7", 0.0), play("5", 1.0), play("5.0", 1.0), play("6", None))
    return [first, second, tuple(play("9", 0.0) for _ in range(4))]


def right(trajectory: Trajectory) -> bool:
    return trajectory.metrics.get("reward/correct") == 1


SAYS = {"3": 0.4, "4": 0.7, "??": 0.9, "7": 0.8, "5": 0.5, "5.0": 0.5, "9": 0.1}


def verifier(shift: float = 0.0) -> Any:
    async def judge(group: Group) -> list[float | None]:
        return [SAYS[t.completion] + shift if t.completion in SAYS else None for t in group]

    return scored(judge, "verifier")


def test_the_metrics_of_a_vote() -> None:
    """First task: best is ??, wrong; rerank 4, right; sums 3 0.8, 4 0.7, wrong. Second: best and rerank 7, wrong; sums
    7 0.8, 5 1.0, right. Clusters 2, 3 and 1; of 12 samples one has no answer and another no score."""
    judge = config(type="number")
    found = asyncio.run(Vote(judge.said, judge.same(), verifier())(groups(), right))
    plain = {k: v for k, v in found.items() if not k.endswith(("_low", "_high"))}
    assert plain == pytest.approx({
        "eval/majority@4": 1 / 3,
        "eval/clusters": 2.0,
        "eval/unanswered": 1 / 12,
        "eval/verifier_missing": 1 / 12,
        "eval/verifier_mean": (0.4 + 0.7 + 0.4 + 0.9 + 0.8 + 0.5 + 0.5 + 4 * 0.1) / 11,
        "eval/best@4": 0.0,
        "eval/rerank@4": 1 / 3,
        "eval/weighted@4": 1 / 3,
    })  # fmt: skip
    assert (found["eval/rerank@4_low"], found["eval/rerank@4_high"]) == wilson(1 / 3, 3)


def test_a_sum_of_scores_below_zero_is_not_given_unless_they_are_log_odds() -> None:
    """Second task with log-odds 1.5 less: logistic(-0.7) = 0.332 against 2 logistic(-1) = 0.538."""
    judge = config(type="number")
    found = asyncio.run(Vote(judge.said, judge.same(), verifier(-1.5))(groups(), right))
    assert "eval/weighted@4" not in found
    assert found["eval/verifier_negative"] == 1.0
    found = asyncio.run(Vote(judge.said, judge.same(), verifier(-1.5), logistic=True)(groups()[1:], right))
    assert found["eval/weighted@4"] == 0.5, "the second task, and not the third"
    assert "eval/verifier_negative" not in found


def test_a_verifier_that_fails_is_missing_and_noted_and_touches_no_metric() -> None:
    async def broken(group: Group) -> list[float | None]:
        if group[0].completion == "3":
            raise ConnectionError("no verifier today")
        return [0.5] * len(group)

    played = groups()
    before = [dict(t.metrics) for group in played for t in group]
    judge = config(type="number")
    found = asyncio.run(Vote(judge.said, judge.same(), scored(broken, "verifier"))(played, right))
    assert found["eval/verifier_missing"] == pytest.approx(1 / 3)
    assert found["eval/weighted@4"] == pytest.approx(1 / 3)
    assert [dict(t.metrics) for group in played for t in group] == before
    assert [[f.reward for f in t.failures] for t in played[0]] == [["verifier"]] * 4
    assert not any(t.failures for t in played[1])
    assert asyncio.run(verified(scored(broken, "verifier"), played[1])) == [0.5] * 4


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"verifier": {"type": "fuzzy"}}, "eval.samples=1"),
        ({"samples": 4, "verifier": {"type": "per_turn", "of": {"type": "number"}}}, "whole answers"),
        ({"samples": 4, "clusters": 0}, "eval.clusters"),
    ],
)
def test_what_is_refused(block: dict[str, Any], said: str) -> None:
    plain = {"name": "a", "steps": 1, "model": {"path": "tiny-random"}, "algorithm": {"type": "grpo"}}
    plain |= {"data": {"train": {"type": "generated"}}, "reward": {"type": "number"}, "eval": block}
    with pytest.raises(InputError, match=re.escape(said)):
        validate(plain)


EVEN = "def even(trajectory):\n    return float(trajectory.samples[-1].tokens[-1] % 2 == 0)\n"
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A config whose answers are single tokens, right where the token's id is even."""
    (tmp_path / "rlft_even.py").write_text(EVEN)
    monkeypatch.syspath_prepend(tmp_path)
    rows = [json.dumps({"prompt": f"Say {a} {b}"}) + "\n" for a in WORDS for b in WORDS]
    (tmp_path / "train.jsonl").write_text("".join(rows[:70]))
    (tmp_path / "held.jsonl").write_text("".join(rows[70:]))
    return {
        "name": "even",
        "model": {"path": str(tiny_model), "device": "cpu"},
        "adapter": {"type": "lora", "r": 4, "target_modules": "all-linear"},
        "reward": {"type": "custom", "path": "rlft_even:even"},
        "rollout": {
            "engine": {"type": "local"},
            "tasks_per_step": 8,
            "group_size": 8,
            "sampling": {"max_tokens": 1},
        },
        "data": {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "held.jsonl")},
        "show": {"every": 0},
    }


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_trained_verifier_finds_the_right_answers(run: dict[str, Any], tmp_path: Path) -> None:
    """The page's two runs: a verifier from samples that the reward has judged, and what it chooses among new ones."""
    learn, use = (yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.S)[1:3])
    learn = {**run, "algorithm": learn["algorithm"], "steps": 30, "out": str(tmp_path / "verifier")}
    learn |= {"learner": {"lr": 2e-2}, "eval": {"every": 0}, "data": {"train": run["data"]["train"]}}
    (tmp_path / "learn.yaml").write_text(yaml.safe_dump(learn))
    assert begin(load(tmp_path / "learn.yaml"), Terminal(Console(quiet=True))) == 0
    use["eval"]["verifier"] |= {"path": str(tmp_path / "verifier"), "device": "cpu", "read": "tokens"}
    use = {**run, "eval": use["eval"], "steps": 0, "algorithm": {"type": "grpo"}}
    (tmp_path / "use.yaml").write_text(yaml.safe_dump(use))
    printed = evaluate(tmp_path / "use.yaml", ["eval.samples=8", "eval.clusters=3"], None)
    line = re.compile(r"eval/(\S+)\s+([\d.]+) \(([\d.]+) to ([\d.]+)\)")
    shares = {name: tuple(map(float, rest)) for name, *rest in line.findall(printed)}
    assert set(shares) == {"accuracy", *(f"{name}@8" for name in ("pass", "majority", "best", "rerank", "weighted"))}
    assert all(low <= rate <= high for rate, low, high in shares.values())
    assert shares["best@8"][1] > shares["majority@8"][2], "apart beyond what chance does"
    assert shares["best@8"][0] <= shares["pass@8"][0]
    assert shares["rerank@8"][0] > shares["weighted@8"][0] >= shares["majority@8"][0]


def test_the_pages_example_is_a_vote_over_mathematics() -> None:
    first = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, re.S)[0])
    block = validate({"name": "a", "steps": 0, "model": {"path": "x"}, "algorithm": {"type": "grpo"}, **first})
    assert block.reward is not None
    vote = voting(block.eval, block.reward.reader(block.eval.accuracy or block.reward.components()[0]))
    assert vote is not None
    texts = [r"\boxed{\frac{1}{2}}", "It is 0.5", r"\boxed{2}"]
    assert asyncio.run(clustered([vote.said(play(t)) for t in texts], vote.same)).clusters == [[0, 1], [2]]
