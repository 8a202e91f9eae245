"""IFEval's instructions against the published evaluation code, and the rewards on formats, languages and length."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from rlft.rewards.catalog import RewardConfig
from rlft.rewards.ifeval import KINDS, check, loosely, strictly
from rlft.rewards.sentences import _splitter, sentences, words
from rlft.types import InputError, Task

# The verdicts are those of lm-evaluation-harness: make_cases.py beside the file says how they were made.
CASES = [json.loads(line) for line in (Path(__file__).parent / "data/ifeval/cases.jsonl").read_text().splitlines()]
PERSON = {"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}, "born": {"format": "date"}}}
GERMAN, ENGLISH = "Der Hund schläft unter dem Tisch.", "The dog sleeps under the table."


def asked(*instructions: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    """The columns of a row that asks for these."""
    kinds, keywords = zip(*instructions, strict=True)
    return {"instruction_id_list": list(kinds), "kwargs": list(keywords)}


NO_COMMA, FIVE_WORDS = (
    ("punctuation:no_comma", {}),
    (
        "length_constraints:number_words",
        {"num_words": 5, "relation": "at least"},
    ),
)


def test_the_cases_have_both_verdicts_of_all_25_kinds():
    assert len(CASES) >= 500
    assert len({(case["kind"], str(case["keywords"]), case["text"]) for case in CASES}) == len(CASES)
    assert Counter((case["kind"], case["strict"]) for case in CASES) == {
        (kind, follows): 12 for kind in KINDS for follows in (True, False)
    }
    assert len(KINDS) == 25


@pytest.mark.parametrize("kind", KINDS)
def test_the_verdicts_are_those_of_the_published_code(kind):
    for case in (case for case in CASES if case["kind"] == kind):
        follows = check(kind, case["keywords"])
        assert (strictly(follows, case["text"]), loosely(follows, case["text"])) == (case["strict"], case["loose"]), (
            case
        )


def test_sentences_and_words_are_those_of_nltk():
    """Known from nltk's documentation and its punkt_tab, whose English model has these sizes."""
    learned = _splitter()._params
    sizes = [len(learned.abbrev_types), len(learned.collocations), len(learned.sent_starters)]
    assert [*sizes, len(learned.ortho_context)] == [156, 37, 39, 20366]
    assert sentences("Dr. Smith left at 3 p.m. on Monday.  Nobody saw him.") == [
        "Dr. Smith left at 3 p.m. on Monday.",
        "Nobody saw him.",
    ]
    assert words("They don't: $3.88 in N.Y. today.") == [
        "They",
        "do",
        "n't",
        ":",
        "$",
        "3.88",
        "in",
        "N.Y.",
        "today",
        ".",
    ]
    assert sentences(" \n") == words("") == []


def test_every_instruction_is_logged_by_its_kind(play, judge):
    both = asked(NO_COMMA, FIVE_WORDS)
    group = [play(text, **both) for text in ("Yes, a boat.", "A boat.", "We took a small boat.")]
    assert judge({"type": "instructions"}, *group) == [0.0, 0.0, 1.0]
    assert judge({"type": "instructions", "value": "fraction"}, *group) == [0.0, 0.5, 1.0]
    assert group[1].metrics == {
        "reward/instructions": 0.5,
        "reward/instructions/no_comma": 1.0,
        "reward/instructions/number_words": 0.0,
        "reward/instructions/strict": 0.5,
        "reward/instructions/loose": 0.5,
        "reward/instructions/all_strict": 0.0,
        "reward/instructions/all_loose": 0.0,
        "reward/missing": 0.0,
    }


def test_the_loose_measure_forgives_an_introduction(play, judge):
    said = play("Sure, here it is:\nWe took a small boat.", **asked(NO_COMMA))
    assert judge({"type": "instructions"}, said) == [0.0]
    assert judge({"type": "instructions", "mode": "loose"}, said) == [1.0]
    assert (said.metrics["reward/instructions/all_strict"], said.metrics["reward/instructions/all_loose"]) == (0.0, 1.0)


def test_the_config_may_ask_every_task(play, judge):
    config = {"type": "instructions", "constraints": [{"kind": "startend:end_checker", "end_phrase": "Bye."}]}
    assert judge(config, play("Well. bye."), play("Bye. Bye"), play(" ")) == [1.0, 0.0, 0.0]


def test_keywords_that_are_null_are_left_out_and_zero_is_zero(play, judge):
    filled = {"num_placeholders": 0, "relation": None, "keywords": None}
    row = asked(("detectable_content:number_placeholders", filled))
    assert judge({"type": "instructions"}, play("none", **row)) == [1.0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "'instruction_id_list' is missing"),
        ({"instruction_id_list": []}, "'instruction_id_list' is an empty list"),
        ({"instruction_id_list": ["punctuation:no_comma"]}, "'kwargs' is missing"),
        (asked(NO_COMMA) | {"kwargs": [{}, {}]}, "lists 1 instructions and column 'kwargs' the keywords of 2"),
        (asked(("punctuation:comma", {})), "no kind of instruction 'punctuation:comma'"),
        (asked(("keywords:existence", {})), "'keywords:existence': keywords: Missing"),
        (asked(("keywords:existence", {"keywords": ["("]})), "'(' is read as a regular expression"),
        (asked(("language:response_language", {"language": "xx"})), "no language 'xx'"),
        (asked(("punctuation:no_comma", {"commas": 1})), "commas: Unexpected"),
        (asked(("length_constraints:number_words", {"num_words": 5, "relation": "exactly"})), "relation: Input"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": ["x"]}, "'x', not a mapping"),
    ],
)
def test_a_row_that_asks_for_nothing_sensible_is_refused_by_its_id(row, message):
    config = TypeAdapter(RewardConfig).validate_python({"type": "instructions"})
    with pytest.raises(InputError, match="row-7") as caught:
        config.check(Task("row-7", (), row))
    assert message in str(caught.value)


def test_a_bad_constraint_is_refused_with_the_config():
    with pytest.raises(ValidationError, match="there is no kind of instruction 'no_comma'"):
        TypeAdapter(RewardConfig).validate_python({"type": "instructions", "constraints": [{"kind": "no_comma"}]})


def test_json_is_measured_by_its_schema(play, judge):
    fence = '```json\n{"age": 2}\n```'
    texts = [
        '{"age": 1}',
        '{"age": "1"}',
        '{"age": 1',
        '{"age": NaN}',
        fence,
        f"Here it is:\n{fence}\nDone.",
        f"{fence}\n" * 2,
    ]
    group = [play(text) for text in texts]
    assert judge({"type": "json_schema", "accept": PERSON}, *group) == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    logged = [(one.metrics["reward/json_schema/parsed"], one.metrics.get("reward/json_schema/errors")) for one in group]
    assert logged[:4] == [(1.0, 0.0), (1.0, 1.0), (0.0, None), (0.0, None)]
    anywhere = {"type": "json_schema", "accept": PERSON, "where": "anywhere"}
    assert judge(anywhere, *group) == [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]


def test_formats_are_checked_where_asked_for(play, judge):
    config, impossible = {"type": "json_schema", "accept": PERSON}, play('{"age": 1, "born": "2024-13-01"}')
    assert judge(config, impossible) == [1.0]
    assert judge(config | {"formats": True}, impossible, play('{"age": 1, "born": "2024-12-01"}')) == [0.0, 1.0]


def test_json_nested_without_end_is_not_json(play, judge):
    assert judge({"type": "json_schema", "accept": {"type": "array"}}, play("[" * 100_000)) == [0.0]


def test_each_task_may_have_a_schema_of_its_own(play, judge):
    text, mapping = '{"type": "integer"}', {"type": "array", "maxItems": 1}
    config = {"type": "json_schema", "key": "schema"}
    group = [play(said, schema=schema) for said in ("3", "[3]") for schema in (text, mapping)]
    assert judge(config, *group) == [1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (None, "'schema' is missing or empty"),
        ("{", "'schema' is not JSON"),
        ([1], "'schema' holds a list"),
        ({"type": "intger"}, "is no valid JSON Schema, at $.type"),
    ],
)
def test_what_is_no_schema_is_refused_by_the_row(schema, message):
    config = TypeAdapter(RewardConfig).validate_python({"type": "json_schema", "key": "schema"})
    with pytest.raises(InputError, match="row-7") as caught:
        config.check(Task("row-7", (), {"schema": schema}))
    assert message in str(caught.value)


def test_a_schema_elsewhere_is_not_fetched(play, judge):
    with pytest.raises(InputError, match=r"refers to 'http://127.0.0.1:9/x'.*Nothing is fetched"):
        judge({"type": "json_schema", "accept": {"$ref": "http://127.0.0.1:9/x"}}, play("1"))


def test_languages_are_told_apart(play, judge):
    german, english, number = (play(text, tongue="de") for text in (GERMAN, ENGLISH, "42"))
    for config in ({"language": "de"}, {"key": "tongue"}, {"key": "tongue", "among": ["de", "en"]}):
        assert judge({"type": "language", **config}, german, english, number) == [1.0, 0.0, 0.0]
    sure = judge({"type": "language", "language": "de", "value": "probability"}, german, english, number)
    assert sure[0] is not None
    assert sure[0] > 0.9
    assert sure == [one.metrics["reward/language/probability"] for one in (german, english, number)]
    assert sure[2] == 0.0


SHARES = [  # German, English and Chinese letters counted by hand
    ("Der Hund schläft. The dog is asleep.", 14, 28),
    ("Der Hund schläft", 14, 14),
    ("The dog is asleep.\nDer Hund schläft.", 14, 28),
    ("Der Hund schläft 狗在睡觉 unter dem Tisch.", 27, 31),
    ("狗在睡觉。 Der Hund schläft.", 14, 18),
    (r"Der Hund schläft, \frac{x}{y} mal.", 17, 17),
]


@pytest.mark.parametrize(("text", "german", "letters"), SHARES)
def test_the_share_of_a_language(text, german, letters, play, judge):
    config = {"type": "language", "language": "de", "value": "share", "among": ["de", "en", "zh"]}
    one = play(text)
    assert judge(config, one) == [pytest.approx(german / letters)]
    assert set(one.metrics) >= {"reward/language/probability", "reward/language/pieces"}


def test_the_language_of_the_prompt_is_asked_for_and_the_parts_are_read_apart(play, judge):
    config = {"type": "language", "language": "prompt", "among": ["de", "en"]}
    mixed = play("<think>Der Hund schläft unter dem Tisch.</think>The dog sleeps under the table.")  # asked in English
    assert judge(config | {"part": "thinking"}, mixed) == [0.0]
    assert judge(config | {"part": "answer"}, mixed) == [1.0]
    number = play("<think>Der Hund</think> 12")
    assert judge(config | {"part": "answer"}, number) == [0.0]
    assert judge(config | {"part": "answer", "empty": 1.0}, number) == [1.0]
    assert judge(config | {"part": "answer", "value": "share", "empty": 0.5}, number) == [0.5]


def test_a_prompt_without_a_letter_has_no_language():
    reward: Any = TypeAdapter(RewardConfig).validate_python({"type": "language", "language": "prompt"})
    with pytest.raises(InputError, match=r"'t': its prompt has no letter.*Name the column.*`key`"):
        reward.check(Task("t", ({"role": "user", "content": "7+5"},)))


def test_probabilities_add_up_to_one_among_the_languages(play, judge):
    some = ["de", "en", "fr"]
    config = {"type": "language", "value": "probability", "among": some}
    assert sum(judge(config | {"language": one}, play("Das is"))[0] for one in some) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"language": "xx"}, "'xx' is not among"),
        ({"language": "de", "among": ["de", "xx"]}, "`among` lists xx"),
        ({"key": "tongue", "among": ["fr", "en"]}, "row-7.*asks for the language 'de'"),
        ({"key": "mouth"}, "row-7.*column 'mouth' is missing"),
    ],
)
def test_a_language_that_cannot_be_told_is_refused(config, message, play, judge):
    with pytest.raises(InputError, match=message):
        judge({"type": "language", **config}, play(GERMAN, tongue="de"))


@pytest.mark.parametrize(
    ("unit", "text", "count"),
    [
        ("words", "I don't know: 3.5 or four?", 8),
        ("sentences", "Dr. Smith left at 3 p.m. on Monday.\nNobody saw him!", 2),
        ("paragraphs", "\n\nOne\nline.\n \t\nTwo.\n\n\n\nThree.\n", 3),
        ("characters", "  ab c\n", 4),
        *[(unit, " \n ", 0) for unit in ("words", "sentences", "paragraphs", "characters")],
    ],
)
def test_length_is_counted_as_a_reader_does(unit, text, count, play, judge):
    said = play(text)
    for at_most, value in ((count, 1.0), (count - 1, 0.0)):
        if at_most >= 0:
            assert judge({"type": "text_length", "unit": unit, "at_most": at_most}, said) == [value]
    assert said.metrics["reward/text_length/count"] == count
    assert judge({"type": "text_length", "unit": unit, "at_least": count + 1}, said) == [0.0]


def test_length_outside_the_range_may_count_in_part(play, judge):
    config = {"type": "text_length", "at_least": 4, "at_most": 6, "outside": "falling"}
    group = [play("a " * count) for count in (0, 1, 3, 4, 6, 7, 12)]
    assert judge(config, *group) == pytest.approx([0, 0.25, 0.75, 1, 1, 6 / 7, 0.5])


@pytest.mark.parametrize("config", [{}, {"at_least": 3, "at_most": 2}])
def test_a_range_of_nothing_is_refused(config):
    with pytest.raises(ValidationError, match="at_most"):
        TypeAdapter(RewardConfig).validate_python({"type": "text_length", **config})


def test_a_language_that_is_not_known_is_refused_before_the_run(play):
    reward: Any = TypeAdapter(RewardConfig).validate_python({"type": "language", "key": "language"})
    reward.check(play("x", language="en").task)
    with pytest.raises(InputError, match="asks for the language 'English'"):
        reward.check(play("x", language="English").task)


@pytest.mark.parametrize("reference", ["#/$defs/x", "http://example.org/schema"])
def test_a_schema_that_leads_nowhere_is_refused_before_the_run(reference, play):
    schema = {"properties": {"a": {"$ref": reference}}, "enum": [{"$ref": "data"}]}
    with pytest.raises(InputError, match="which is not in it"):
        TypeAdapter(RewardConfig).validate_python({"type": "json_schema", "accept": schema}).build()
    reward: Any = TypeAdapter(RewardConfig).validate_python({"type": "json_schema", "key": "schema"})
    with pytest.raises(InputError, match=r"column 'schema'.*which is not in it"):
        reward.check(play("x", schema=schema).task)
    reward.check(play("x", schema=schema | {"$defs": {"x": {}}, "properties": {"a": {"$ref": "#/$defs/x"}}}).task)


@pytest.mark.parametrize(("schema", "said"), [
    ({"items": {"$ref": "#"}}, "[" * 400 + "]" * 400),
    ({"multipleOf": 0.5}, "1" + "0" * 400),
])  # fmt: skip
def test_what_is_too_deep_or_large_to_check_fits_nothing(schema, said, play, judge):
    one = play(said)
    assert judge({"type": "json_schema", "accept": schema}, one) == [0.0]
    assert not one.failures


@pytest.mark.parametrize(("kind", "keywords"), [
    ("detectable_content:number_placeholders", {"num_placeholders": 1}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}),
    ("detectable_format:title", {}),
])  # fmt: skip
def test_a_flood_of_marks_is_read_at_once(kind, keywords):
    """Some milliseconds each; minutes where every mark is tried with all that follows it."""
    follows, begun = check(kind, keywords), time.process_time()
    for mark in ("[", "\n", "<", "- ", "\n \n", "<<"):
        follows(mark * 200_000)
    assert time.process_time() - begun < 5


def test_a_flood_of_fences_is_read_at_once(play, judge):
    begun = time.process_time()
    flood = ("```json\n" * 100_000, "```" + " " * 200_000 + "x", "```\n" + " " * 200_000)
    assert judge({"type": "json_schema", "accept": {}}, *map(play, flood)) == [0.0] * 3
    assert time.process_time() - begun < 5


def test_one_pass_finds_what_the_published_expressions_find():
    """Those that take for ever over a flood of marks, on 3000 short texts made of little else."""
    dice = random.Random(0)
    for _ in range(3000):
        text = "".join(dice.choice("[]<>*- \n\n a") for _ in range(dice.randrange(16)))
        brackets = len(re.findall(r"\[.*?\]", text))
        assert check("detectable_content:number_placeholders", {"num_placeholders": brackets})(text)
        assert not check("detectable_content:number_placeholders", {"num_placeholders": brackets + 1})(text)
        bullets = sum(len(re.findall(mark, text, re.MULTILINE)) for mark in (r"^\s*\*[^\*].*$", r"^\s*-.*$"))
        assert check("detectable_format:number_bullet_lists", {"num_bullets": bullets})(text), text
        titled = any(one.lstrip("<").rstrip(">").strip() for one in re.findall(r"<<[^\n]+>>", text))
        assert check("detectable_format:title", {})(text) == titled, text


def test_marks_belong_to_their_words(play, judge):
    one = play("हिन्दी")
    judge({"type": "text_length", "at_least": 1}, one)
    assert one.metrics["reward/text_length/count"] == 1.0
