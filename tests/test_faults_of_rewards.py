"""A reward of every kind that fails in the middle of a real run: it raises, hangs, gives NaN or too few numbers, or
says nothing. It must cost what docs/faults.md says: a line, and no score, which is no zero.

Kinds that hold other rewards are given one that fails; kinds that are a function of an answer have their own verdict
replaced at chosen places. What stands outside of the run fails by itself: see test_faults_outside.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlft.rewards.base import Config
from rlft.rewards.catalog import types
from rlft.types import Group, InputError, Reward
from tests import faulty
from tests.faulty import KINDS, config, fault_of, grader, run, written

Row = dict[str, Any]
FAULTS = ["", "raise", "nan", "none", "hang", "inf"]
GONE = dict.fromkeys(FAULTS[1:], 1)  # of four
EASY = {"type": "length", "limit": 99, "free": 98}  # 1 for whatever a tiny model says
OWN = "own"  # stands for the reward that fails; `run` of it is the test's name

# By kind: its block, and the component whose name stands in the lines. A kind may stand here more than once.
HOLDING: list[tuple[Row, str]] = [
    ({"type": "custom"}, "custom"),
    ({"type": "weighted", "terms": {"own": OWN, "other": EASY}}, "own"),
    ({"type": "gated", "gate": EASY, "of": OWN}, "gated/of"),
    ({"type": "gated", "gate": OWN, "at_least": 0, "of": EASY}, "gated/gate"),
    ({"type": "sequence", "terms": {"other": EASY, "own": OWN}}, "own"),
    ({"type": "first", "terms": {"own": OWN, "other": EASY}}, "first/own"),
    ({"type": "routed", "column": "route", "terms": {"own": OWN, "other": EASY}}, "routed/own"),
    ({"type": "scheduled", "terms": {"own": OWN, "other": EASY}, "points": {"own": {0: 1.0, 9: 0.5}}}, "own"),
    ({"type": "normalised", "terms": {"own": OWN, "other": EASY}}, "own"),
    ({"type": "directed", "of": {"type": "weighted", "terms": {"own": OWN, "other": EASY}}}, "own"),
    ({"type": "per_turn", "of": OWN}, "custom"),
    ({"type": "progress", "of": OWN, "blocks": 2, "samples": 1, "tokens": 2}, "progress/of"),
    ({"type": "cosine", "of": OWN, "limit": 9}, "cosine/of"),
    ({"type": "relative_length", "of": OWN}, "relative_length/of"),
]

# By kind: what it needs to be made. Its fault is put in place of its own verdict.
PURE: dict[str, Row] = {
    "exact": {},
    "number": {},
    "choice": {"key": "letter"},
    "matching": {"key": "pairs"},
    "format": {"pattern": "(?s).*"},
    "length": {"limit": 99},
    "overlong": {"limit": 99, "margin": 9},
    "thinking": {"budget": 9},
    "outcome": {},
    "tags": {},
    "repetition": {},
    "script": {},
    "instructions": {"constraints": [{"kind": "punctuation:no_comma"}]},
    "json_schema": {"accept": {"type": "object"}},
    "language": {"language": "en"},
    "text_length": {"at_most": 99},
    "bleu": {},
    "chrf": {},
    "rouge": {},
    "fuzzy": {},
}
COLUMNS = {"answer": "12", "letter": "A", "pairs": "1-A"}
OUTSIDE = {"math", "reasoning_gym", "code", "program", "syntax", "model", "served_model", "judge", "remote"}


@pytest.fixture(scope="module", autouse=True)
def _apart(one_thread: None) -> Iterator[None]:
    yield
    faulty.released.set()  # what hangs in a thread of its own may end


def filled(block: Any, own: Row) -> Any:
    """The block with the reward that fails in its place."""
    if isinstance(block, dict):
        return {key: filled(value, own) for key, value in block.items()}
    return own if block == OWN else block


def test_every_kind_of_reward_is_here_or_fails_by_itself() -> None:
    """A kind that is new needs a fault: a line above, or a test in test_faults_outside.py and its name in OUTSIDE."""
    assert {block["type"] for block, _ in HOLDING} | set(PURE) | OUTSIDE == set(types())


@pytest.mark.slow
@pytest.mark.parametrize(("block", "component"), HOLDING, ids=lambda part: part if isinstance(part, str) else "")
def test_what_is_held_fails_and_what_holds_it_has_no_score(
    block: Row, component: str, tiny_model: Path, tmp_path: Path
) -> None:
    written(tmp_path, FAULTS, route="own", direction={"own": 0.6, "other": 0.8})
    own = grader(str(tmp_path))
    left = run(config(tiny_model, tmp_path, own if block["type"] == "custom" else filled(block, own), tasks=2))
    assert left.failed() == Counter({(component, KINDS[fault], fault): 1 for fault in FAULTS if fault in KINDS})
    left.whole(without={} if block["type"] == "first" else GONE)
    assert sorted(left.metrics) == [1, 2, 3]


def test_the_first_that_has_a_verdict_is_the_score(tiny_model: Path, tmp_path: Path) -> None:
    """Where the one before it fails, which still is a line: the other says 1, and this one never."""
    written(tmp_path, FAULTS)
    reward = filled({"type": "first", "terms": {"own": OWN, "other": EASY}}, grader(str(tmp_path), base=-2.0))
    left = run(config(tiny_model, tmp_path, reward, tasks=2))
    for fault in FAULTS:
        assert [score == 1 for score in left.scores(fault)] == [False, bool(fault), False, False]


def test_what_is_not_known_of_a_block_is_not_paid(tiny_model: Path, tmp_path: Path) -> None:
    """The reward fails on every continuation of some tasks: their answers keep their verdicts, and nothing moves."""
    written(tmp_path, ["", "later", "", "later"])
    reward = {"type": "progress", "of": grader(str(tmp_path)), "blocks": 2, "samples": 1, "tokens": 2}
    left = run(config(tiny_model, tmp_path, reward, tasks=2))
    left.whole(without={})
    paid = {fault_of(row) for rows in left.played.values() for row in rows if any(row["token_rewards"])}
    assert paid == {""}


def injected(patch: pytest.MonkeyPatch, kind: type[Config], name: str) -> None:
    """Around the real judge of a kind: where the task's fault is `<name>-raise`, it raises, and so on."""
    plain = kind.judge

    def judge(self: Config, component: str) -> Reward:
        inner = plain(self, component)

        async def judged(group: Group) -> Sequence[Any]:
            fault = group[0].task.info["fault"]
            if fault == f"{name}-raise":
                raise ValueError(f"{name} fell over")
            said = await inner(group)
            odd = {f"{name}-nan": [float("nan")] * len(group), f"{name}-few": list(said)[:-1]}
            return odd.get(fault, said)

        return judged

    patch.setattr(kind, "judge", judge)


def test_the_verdict_of_every_other_kind_fails(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run whose sum has all of them; each fault is one trajectory's, and of one kind."""
    for name in PURE:
        injected(monkeypatch, types()[name], name)
    how = {"raise": "raised", "nan": "nan", "few": "count"}
    faults = [f"{name}-{one}" for name in PURE for one in how]
    written(tmp_path, [*faults, *[""] * (-len(faults) % 4)], **COLUMNS)
    reward = {"type": "weighted", "terms": {name: {"type": name, **options} for name, options in PURE.items()}}
    changes: Row = {"group_size": 1, "algorithm": {"type": "reinforce"}}
    left = run(config(tiny_model, tmp_path, reward, -(-len(faults) // 4), **changes))
    expected = {(name, kind, f"{name}-{one}"): 1 for name in PURE for one, kind in how.items()}
    assert left.failed() == Counter(expected)
    left.whole(without=dict.fromkeys(faults, 1))


@pytest.mark.parametrize("name", ["exact", "number", "choice", "matching", "bleu", "chrf", "rouge", "fuzzy"])
def test_a_column_that_is_not_there_is_missed_before_the_run(name: str, tiny_model: Path, tmp_path: Path) -> None:
    """Named are the task, the column, what there is, and what to do."""
    written(tmp_path, [""] * 4)
    reward = {"type": name, **PURE[name]}
    key = reward.get("key", "answer")
    made = config(tiny_model, tmp_path, reward, tasks=2)
    with pytest.raises(InputError, match=rf"column '{key}' is missing \(there is: .*fault.*Set the reward's `key`"):
        run(made)
    assert not (Path(made.out) / "metrics.jsonl").exists()
