"""Rows become tasks and groups; a bad row is refused by its number, before anything is loaded."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlft.chat import Chat
from rlft.data import check_lengths, prompt_lengths, recorded, tasks
from rlft.generated import sums
from rlft.rows import read
from rlft.types import InputError
from rlft.wording import worded

ROWS = [{"question": f"What is {i}?", "answer": str(i)} for i in range(8)]
ASKED = {"prompt": "question"}


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> Chat:
    return Chat(tiny_model)


def lines(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def test_three_formats_give_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=1))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read(lines(tmp_path / "a.jsonl", *ROWS)) == ROWS
    assert read(str(tmp_path / "a.json")) == ROWS
    assert read(str(tmp_path / "a.parquet")) == ROWS
    assert read(str(tmp_path / "a.jsonl"), limit=3) == ROWS[:3]


def test_a_row_is_a_task_with_what_its_grader_needs() -> None:
    task = tasks(ROWS, {"prompt": "question", "gold": "answer"}, "train")[2]
    assert task.id == "train:3"
    assert task.messages == ({"role": "user", "content": "What is 2?"},)
    assert task.info == {"gold": "2"}


def test_a_prompt_may_be_messages() -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert tasks([{"messages": turns}], {}, "train")[0].messages == tuple(turns)
    assert tasks([{"prompt": turns}], {}, "train")[0].messages == tuple(turns)


@pytest.mark.parametrize("prompt", [None, "", "  ", [], 3, [{"role": "user"}], [{"content": "Hi"}], ["Hi"]])
def test_rows_without_a_prompt_are_numbered(prompt: Any) -> None:
    rows = [*ROWS[:2], {"question": prompt}, ROWS[3], {"question": prompt}]
    with pytest.raises(InputError, match=r"train: 2 row\(s\) where prompt is .*: 3, 5$"):
        tasks(rows, ASKED, "train")


def test_a_row_that_lacks_the_column_is_numbered() -> None:
    with pytest.raises(InputError, match=r"1 row\(s\) where prompt is null or missing: 2$"):
        tasks([ROWS[0], {"answer": "2"}, ROWS[2]], ASKED, "train")


def test_many_bad_rows_are_not_all_listed() -> None:
    with pytest.raises(InputError, match=r"20 row\(s\) where prompt is null or missing: 1, 2, 3, 4, 5 \.\.\.$"):
        tasks([{"question": None}] * 20, ASKED, "train")


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(InputError, match=r"data\.columns\.prompt: train has no column 'text'; it has answer, question"):
        tasks(ROWS, {"prompt": "text"}, "train")
    with pytest.raises(InputError, match=r"data\.columns\.prompt: train has no column 'prompt'; say which"):
        tasks([{"text": "1+1?", "answer": "2"}], {}, "train")


def test_a_question_or_a_problem_is_the_prompt_where_no_column_is_named_so(chat: Chat) -> None:
    """As in GSM8K and MATH; a column that has another role is left to it, and one of that name goes before it."""
    for row, columns, asked in (
        ({"question": "1+1?", "problem": "other"}, {}, "1+1?"),
        ({"problem": "1+1?", "answer": "2"}, {"gold": "answer"}, "1+1?"),
        ({"problem": "1+1?", "question": "whose?"}, {"topic": "question"}, "1+1?"),
        ({"prompt": "1+1?", "question": "whose?"}, {}, "1+1?"),
        ({"messages": [{"role": "user", "content": "1+1?"}], "question": "whose?"}, {}, "1+1?"),
    ):
        assert tasks([row], columns, "train")[0].messages[-1]["content"] == asked
    group = recorded([{"question": "1+1?", "chosen": "2", "rejected": "3"}], {}, "train", chat)
    assert group[0][0].task.messages[0]["content"] == "1+1?"


def test_a_folder_is_a_data_set_and_its_main_configuration_the_one_that_is_meant(gsm8k: str) -> None:
    asked = {subset: [row["question"] for row in read(gsm8k, subset)] for subset in (None, "main", "socratic")}
    assert asked[None] == asked["main"] != asked["socratic"]
    with pytest.raises(InputError, match="openai/gsm8k"):
        read(gsm8k, split="test")


def test_a_run_has_its_own_words_for_every_prompt() -> None:
    task = tasks([{"prompt": "1+1?"}], {}, "train")[0]
    said = worded(task, r"{prompt} Put it into \boxed{}.", "Be brief.")
    assert said.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": r"1+1? Put it into \boxed{}."},
    )
    assert worded(task) == task
    turns = [("system", "You add."), ("user", "1+1?"), ("assistant", "2"), ("user", "2+2?")]
    task = tasks([{"messages": [{"role": role, "content": text} for role, text in turns]}], {}, "train")[0]
    said = worded(task, "So: {prompt} {x}", "Be brief.")
    assert [m["content"] for m in said.messages] == ["Be brief.\nYou add.", "1+1?", "2", "So: 2+2? {x}"]
    for content in (({"type": "text", "text": "1+1?"},), None):
        odd = replace(task, messages=({"role": "user" if content else "system", "content": content},))
        with pytest.raises(InputError, match=r"data\.prompt: task train:1 has no user message that is text"):
            worded(odd, "So: {prompt}")


def test_messages_that_are_answered_already_leave_nothing_to_ask() -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with pytest.raises(InputError, match=r"end with the assistant.*: 2$"):
        tasks([{"messages": turns[:1]}, {"messages": turns}], {}, "train")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no rows"),
        ("\n\n", "holds no rows"),
        ('{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ('{"a": 1}\n\n[1]\n', "it is not a JSON object"),
    ],
)
def test_a_file_that_is_not_lines_of_json(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as caught:
        read(str(path))
    assert str(path) in str(caught.value)


def test_files_that_do_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[{]")
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\xff\xfe"}\n')
    (tmp_path / "a.parquet").write_text("no")
    for name in ("a.json", "a.jsonl", "a.parquet"):
        with pytest.raises(InputError, match=name):
            read(str(tmp_path / name))
    with pytest.raises(InputError, match=r"there is no file .*gone\.jsonl"):
        read(str(tmp_path / "gone.jsonl"))


def test_a_data_set_that_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="'nobody/nothing' is neither a file here nor a data set that the hub gives"):
        read("nobody/nothing")


def test_rows_that_the_chat_template_refuses_are_numbered(tiny_model: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content }}<|im_end|>{% endfor %}"
    )
    chat = Chat(tiny_model, str(template))
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    prompts = [[user], [system, user], [user], [system, user]]
    rows = [{"prompt": prompt, "completion": "Ho"} for prompt in prompts]
    with pytest.raises(InputError, match=r"train: 2 row\(s\) where the chat template .*no system role.*: 2, 4$"):
        recorded(rows, {}, "train", chat)
    with pytest.raises(InputError, match=r"2 row\(s\) where the chat template .*no system role.*: train:2, train:4$"):
        prompt_lengths(tasks(rows, {}, "train"), chat)
    assert prompt_lengths(tasks(rows[:1], {}, "train"), chat) == [("train:1", len(chat.prompt([user])))]


def test_a_demonstration_is_a_group_of_one(chat: Chat) -> None:
    (group,) = recorded([{"prompt": "What is 1?", "completion": "one"}], {}, "train", chat)
    (trajectory,) = group
    sample = trajectory.samples[0]
    said = [token for token, chosen in zip(sample.tokens, sample.mask, strict=True) if chosen]
    assert chat.decode(said) == "one"
    assert said[-1] == chat.end, "when to stop is learned too"
    assert chat.prompt(trajectory.task.messages) == sample.tokens[: -len(said)]
    assert all(math.isnan(x) for x in sample.logprobs)
    assert (trajectory.score, sample.version) == (1.0, -1)


def test_messages_demonstrate_their_last_turn(chat: Chat) -> None:
    turns = [{"role": "user", "content": "What is 1?"}, {"role": "assistant", "content": "one"}]
    (said,) = recorded([{"messages": turns}], {}, "train", chat)[0]
    (plain,) = recorded([{"prompt": "What is 1?", "completion": "one"}], {}, "train", chat)[0]
    assert (said.completion, said.task.messages) == ("one", plain.task.messages)
    assert (said.samples[0].tokens, said.samples[0].mask) == (plain.samples[0].tokens, plain.samples[0].mask)


def test_a_pair_is_a_group_of_two(chat: Chat) -> None:
    (group,) = recorded([{"q": "Hi", "chosen": "one", "rejected": "two"}], {"prompt": "q"}, "train", chat)
    assert [(t.completion, t.score) for t in group] == [("one", 1.0), ("two", 0.0)]


def test_a_label_is_the_score_of_a_completion(chat: Chat) -> None:
    rows = [{"prompt": "Hi", "completion": "one", "label": label} for label in (True, False, 1, 0)]
    assert [group[0].score for group in recorded(rows, {}, "train", chat)] == [1.0, 0.0, 1.0, 0.0]
    topic = [{"prompt": "Hi", "completion": "one", "label": "greeting"}]
    (group,) = recorded(topic, {"topic": "label"}, "train", chat)
    assert (group[0].score, group[0].task.info["topic"]) == (1.0, "greeting")


def test_what_both_sides_of_a_pair_share_is_the_prompt(chat: Chat) -> None:
    asked = [{"role": "user", "content": "Hi"}]
    sides = {
        side: [*asked, {"role": "assistant", "content": said}]
        for side, said in (("chosen", "one"), ("rejected", "two"))
    }
    explicit = recorded([{"prompt": "Hi", "chosen": "one", "rejected": "two"}], {}, "train", chat)[0]
    implicit = recorded([sides], {}, "train", chat)[0]
    assert [t.samples[0].tokens for t in implicit] == [t.samples[0].tokens for t in explicit]
    assert [t.score for t in implicit] == [1.0, 0.0]
    assert implicit[0].task.messages == tuple(asked)


def test_words_that_both_sides_begin_with_are_the_prompt(chat: Chat) -> None:
    row = {"chosen": "Human: How many? Assistant: twelve", "rejected": "Human: How many? Assistant: twenty"}
    good, bad = recorded([row], {}, "train", chat)[0]
    assert good.task.messages[0]["content"] == "Human: How many? Assistant: "
    assert (good.completion, bad.completion) == ("twelve", "twenty"), "no word is cut"


def test_scored_completions_are_a_group(chat: Chat) -> None:
    rows = [{"prompt": "Hi", "completions": ["one", "two", "three"], "scores": [0.5, -1, 2]}]
    (group,) = recorded(rows, {}, "train", chat)
    assert [(t.completion, t.score) for t in group] == [("one", 0.5), ("two", -1.0), ("three", 2.0)]


def test_ranked_completions_are_scored_from_one_to_zero(chat: Chat) -> None:
    """The best is 1 and the worst 0, as in a pair; ties stay ties."""
    rows = [{"prompt": "Hi", "completions": list("abcd"), "ranks": ranks} for ranks in ([2, 1, 3, 2], [5, 5, 5, 5])]
    first, tied = recorded(rows, {}, "train", chat)
    assert [t.score for t in first] == [0.5, 1.0, 0.0, 0.5]
    assert [t.score for t in tied] == [0.0] * 4
    pair = {"prompt": "Hi", "completions": ["one", "two"], "ranks": [1, 2]}
    assert [t.score for t in recorded([pair], {}, "train", chat)[0]] == [1.0, 0.0]


def test_steps_with_labels_are_one_answer(chat: Chat) -> None:
    """TRL's stepwise supervision: a label is the sign at the token with which its step is complete."""
    steps = ["One and one is two. ", "Two and two is five.", " So it is six."]
    row = {"prompt": "How many? Two and two is five.", "completions": steps, "labels": [True, False, None]}
    ((trajectory,),) = recorded([row], {}, "train", chat)
    sample = trajectory.samples[0]
    assert trajectory.completion == "One and one is two.\nTwo and two is five.\nSo it is six."
    signs = {i: x for i, x in enumerate(sample.rewards) if x}
    assert list(signs.values()) == [1.0, -1.0]
    start = sample.mask.index(True)
    ends = [chat.decode(sample.tokens[start : i + 1]) for i in signs]
    assert ends == ["One and one is two.", "One and one is two.\nTwo and two is five."]
    assert all(sample.mask[i] for i in signs)
    assert trajectory.score == 0.0


def test_the_same_step_twice_ends_twice(chat: Chat) -> None:
    row = {"prompt": "Hi", "completions": ["again", "again", "again"], "labels": [True, True, False]}
    ((trajectory,),) = recorded([row], {}, "train", chat)
    assert [x for x in trajectory.samples[0].rewards if x] == [1.0, 1.0, -1.0]


def test_objectives_of_an_answer_stand_where_a_rewards_components_do(chat: Chat) -> None:
    scored = {"clear": 3, "true": None, "kind": 0.5}
    rows = [
        {"prompt": "Hi", "completion": "one", "objectives": scored},
        {"prompt": "Hi", "completions": ["one", "two"], "objectives": [scored, {"true": True}]},
        {"prompt": "Hi", "chosen": "one", "rejected": "two", "objectives": [scored, None]},
        {"prompt": "Hi", "completion": "one", "objectives": None},
    ]
    found = recorded(rows, {}, "train", chat)
    some = {"reward/clear": 3.0, "reward/kind": 0.5}
    assert [[t.metrics for t in group] for group in found] == [[some], [some, {"reward/true": 1.0}], [some, {}], [{}]]
    assert [t.score for t in found[1]] == [1.0, 1.0], "nothing says which is better"


def test_objectives_in_columns_of_their_own(chat: Chat) -> None:
    """As HelpSteer has them; a name that is in both is the column's."""
    rows = [{"prompt": "Hi", "response": "one", "helpfulness": 4, "verbosity": None, "objectives": {"verbosity": 1}}]
    columns = {
        "completion": "response",
        "objectives/helpfulness": "helpfulness",
        "objectives/verbosity": "verbosity",
    }
    ((trajectory,),) = recorded(rows, columns, "train", chat)
    assert trajectory.metrics == {"reward/helpfulness": 4.0, "reward/verbosity": 1.0}
    several = [{"prompt": "Hi", "completions": ["one", "two"], "scores": [0, 1], "clear": [2, None]}]
    (group,) = recorded(several, {"objectives/clear": "clear"}, "train", chat)
    assert [t.metrics for t in group] == [{"reward/clear": 2.0}, {}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Hi"}, "completion is empty, null or missing"),
        ({"prompt": "Hi", "completion": None}, "completion is empty, null or missing"),
        ({"prompt": "Hi", "completion": " "}, "completion is empty, null or missing"),
        ({"prompt": None, "completion": "one"}, "prompt is empty, null or missing"),
        ({"completion": "one"}, "prompt is empty, null or missing"),
        ({"prompt": "Hi", "chosen": "one", "rejected": None}, "rejected is empty, null or missing"),
        ({"prompt": "Hi", "completion": "one", "label": None}, "label is neither true nor false"),
        ({"prompt": "Hi", "completion": "one", "label": "good"}, "label is neither true nor false"),
        ({"chosen": "one", "rejected": "two"}, "do not begin alike"),
        ({"chosen": "We say one", "rejected": "We say "}, "rejected is empty, null or missing"),
        ({"chosen": [{"role": "user", "content": "Hi"}], "rejected": "two"}, "do not share all messages but the last"),
        ({"prompt": "Hi", "completions": ["one"], "scores": [1, 2]}, "not two lists of one length"),
        ({"prompt": "Hi", "completions": [], "scores": []}, "not two lists of one length"),
        ({"prompt": "Hi", "completions": ["one"], "scores": [None]}, "score"),
        ({"prompt": "Hi", "completions": ["one"], "scores": ["good"]}, "score"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "do not end with an answer"),
        ({"prompt": "Hi", "completions": ["one"]}, "completions and scores are not two lists"),
        ({"prompt": "Hi", "completions": ["one", "two"], "ranks": [1]}, "completions and ranks are not two lists"),
        ({"prompt": "Hi", "completions": ["one", "two"], "ranks": [True, False]}, "a rank is not a number"),
        ({"prompt": "Hi", "completions": ["one", "two"], "labels": [True]}, "completions and labels are not two lists"),
        ({"prompt": "Hi", "completions": ["one", "two"], "labels": [True, 0.5]}, "none of true, false and null"),
        ({"prompt": "Hi", "completions": ["one", " "], "labels": [True, True]}, "completions is empty"),
        ({"prompt": "Hi", "completion": "one", "objectives": "to be brief"}, "not numbers by name"),
        ({"prompt": "Hi", "completion": "one", "objectives": {"clear": "yes"}}, "clear is not a finite number"),
        ({"prompt": "Hi", "completion": "one", "objectives": {"clear": math.nan}}, "clear is not a finite number"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "objectives": [{}]}, "not one entry for each answer"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "objectives/clear": 1}, "not one entry for each answer"),
    ],
)
def test_a_bad_recorded_row_is_numbered(chat: Chat, row: dict[str, Any], said: str) -> None:
    good = {"prompt": "Hi", "completion": "one"}
    with pytest.raises(InputError, match=rf"1 row\(s\) where .*{said}.*: 2$"):
        recorded([good, row, good], {}, "train", chat)


def test_what_is_too_long_is_named() -> None:
    with pytest.raises(InputError, match=r"2 prompts are longer than 10 tokens.* the longest is b with 12.*Rows: b, c"):
        check_lengths([("a", 10), ("b", 12), ("c", 11)], 10, "prompts are")
    check_lengths([("a", 10)], 10, "prompts are")


@pytest.mark.parametrize("digits", [1, 2])
def test_whole_pairs_of_sums_are_held_out(digits: int) -> None:
    """Neither order of a held-out pair is trained on, and at least a fifth is held out."""

    def pairs(split: str) -> set[tuple[int, int]]:
        rows = sums(digits, split, 0.2, 0)
        found = [tuple(map(int, row["prompt"].removeprefix("What is ").partition("?")[0].split("+"))) for row in rows]
        assert [sum(pair) for pair in found] == [int(row["answer"]) for row in rows]
        assert len(set(found)) == len(found)
        return set(found)  # type: ignore[arg-type]

    train, held = pairs("train"), pairs("eval")
    assert not train & held
    for side in (train, held):
        assert {(b, a) for a, b in side} == side
    numbers = 10 if digits == 1 else 90
    assert len(train | held) == numbers**2
    assert len({tuple(sorted(pair)) for pair in held}) >= 0.2 * numbers * (numbers + 1) / 2 - 0.5
