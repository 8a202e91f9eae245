"""Bad input in thousands of shapes: each is refused with a message that names the key or the row, and none gets past.

What is bad is known by construction. Configs: every key of the schema, those of every entry of every catalog included,
is given a value that its type, its bounds or its choices rule out, misspelt or left out. Data: one row of good data is
broken in a way that has a name. FUZZ_EXAMPLES multiplies the number of cases.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlft.chat import Chat
from rlft.config import Config
from rlft.data import recorded, tasks
from rlft.rows import read
from rlft.settings import load, validate
from rlft.types import InputError

MORE = int(os.environ.get("FUZZ_EXAMPLES", "1"))
FOUND: dict[str, set[str]] = {}
PLAIN: dict[str, Any] = {
    "name": "sums",
    "steps": 3,
    "model": {"path": "tiny-random"},
    "data": {"train": {"type": "generated"}},
    "reward": {"type": "number"},
    "rollout": {"engine": {"type": "local"}},
    "algorithm": {"type": "grpo"},
}
SCHEMA = Config.model_json_schema()
PAIRED = [{"prompt": f"Say {i}.", "chosen": f"{i}", "rejected": "no"} for i in range(5)]


def often(count: int) -> settings:
    """So many cases, the same ones every time."""
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    return settings(
        max_examples=count * MORE, deadline=None, derandomize=True, database=None, suppress_health_check=quiet
    )


def counted(kind: str, case: object) -> None:
    FOUND.setdefault(kind, set()).add(repr(case))


# --- configs ----------------------------------------------------------------------------------------------------------


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").removeprefix("#/$defs/")
    return {**SCHEMA["$defs"][name], **schema} if name else schema


def branches(schema: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of a schema, unions inside it opened."""
    schema = resolved(schema)
    inside = schema.get("anyOf") or schema.get("oneOf")
    return [schema] if inside is None else [leaf for one in inside for leaf in branches(one)]


Place = tuple[tuple[str, ...], dict[str, Any], dict[tuple[str, ...], Any]]


def places(schema: dict[str, Any], path: tuple[str, ...], given: dict[tuple[str, ...], Any]) -> Iterator[Place]:
    """Every key below a block: its path, its schema, and the types that the blocks on the way must have."""
    for block in branches(schema):
        keys = block.get("properties", {})
        kind = keys.get("type", {}).get("const")
        so = {**given, path: {"type": kind}} if kind else given
        for name, inside in keys.items():
            here = (*path, name)
            if name != "type":
                yield here, inside, so
            if len(here) < 4:  # rewards may stand inside each other without end
                yield from places(inside, here, so)


# The adapter's keys are PEFT's, and known only once the adapter is made: see below.
PLACES = [place for place in places(SCHEMA, (), {}) if place[0][0] != "adapter" and "adapter" not in place[2]]
WORDS = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=3, max_size=12)


def kinds(schema: dict[str, Any]) -> set[str]:
    return {one.get("type", "enum" if "enum" in one or "const" in one else "any") for one in branches(schema)}


def wrong_kinds(schema: dict[str, Any]) -> list[Any]:
    """Values that no alternative takes, whatever it says beyond its type. Numbers may be text, as YAML reads 1e-5."""
    have = kinds(schema)
    wrong: list[Any] = []
    if not have & {"object", "any"}:
        wrong += [{}, {"a": 1}]
    if not have & {"array", "any"}:
        wrong += [[], [[]], [None, {}]]
    if have <= {"number", "integer", "boolean", "null"}:
        wrong += ["many", "1,5", "0x", "--1"]
    if have <= {"integer", "null"}:
        wrong += [0.5, 1e400, "1.5"]
    if have <= {"object"}:
        wrong += [7, None]
    if "null" not in have and not have & {"any", "array"}:  # no list is an empty one
        wrong += [None]
    return wrong


def beyond(schema: dict[str, Any]) -> list[Any]:
    """Values of the right type outside of the bounds or the choices."""
    known = [one for one in branches(schema) if one.get("type") != "null"]
    if len(known) != 1:
        return []
    one, found = known[0], []
    if one.get("type") in ("number", "integer"):
        found += [one["minimum"] - 1] if "minimum" in one else []
        found += [one["exclusiveMinimum"], one["exclusiveMinimum"] - 3] if "exclusiveMinimum" in one else []
        found += [one["maximum"] + 1] if "maximum" in one else []
        found += [one["exclusiveMaximum"]] if "exclusiveMaximum" in one else []
        if {"minimum", "exclusiveMinimum"} & one.keys():
            found += [-1e300, float("-inf"), float("nan")]
    if "enum" in one:
        found += ["nonsense", one["enum"][0].upper() + "x"]
    return found


@st.composite
def bad_configs(draw: st.DrawFn) -> tuple[dict[str, Any], str]:
    """A config with one mistake, and the word that the message must have."""
    path, schema, given_types = draw(st.sampled_from(PLACES))
    wrong = wrong_kinds(schema) + beyond(schema)
    plain = copy.deepcopy(PLAIN)
    for block, value in given_types.items():
        put(plain, block, copy.deepcopy(value))
    how = draw(st.sampled_from(["value", "value", "key", "type"]))
    if how == "type" and given_types:
        block = max(given_types, key=len)
        put(plain, (*block, "type"), draw(WORDS) + "_")
        return plain, block[-1]
    if how == "value" and wrong:
        put(plain, path, draw(st.sampled_from(wrong)))
        return plain, path[-1]
    name = draw(st.one_of(WORDS, st.just(path[-1] + "s"), st.just(path[-1].upper()))) + "_"
    put(plain, (*path[:-1], name), draw(st.one_of(st.none(), st.integers(), WORDS)))
    return plain, name


def put(plain: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    block: Any = plain
    for part in path[:-1]:
        if not isinstance(block.get(part), dict):
            block[part] = {}
        block = block[part]
    block[path[-1]] = value


@pytest.mark.slow
def test_no_key_takes_a_value_that_is_ruled_out() -> None:
    """Every key with each of the values that it must not have."""
    for path, schema, given_types in PLACES:
        for wrong in wrong_kinds(schema) + beyond(schema):
            plain = copy.deepcopy(PLAIN)
            for block, value in given_types.items():
                put(plain, block, dict(value))
            put(plain, path, wrong)
            counted("values", (path, given_types, wrong))
            with pytest.raises(InputError) as caught:
                validate(plain)
            assert path[-1] in str(caught.value), (plain, str(caught.value))


@often(500)
@given(bad_configs())
def test_a_config_with_a_mistake_is_refused_and_the_key_named(case: tuple[dict[str, Any], str]) -> None:
    plain, word = case
    counted("configs", case)
    with pytest.raises(InputError) as caught:
        validate(plain)
    assert word in str(caught.value), (plain, str(caught.value))


@often(60)
@given(
    key=st.one_of(WORDS.map(lambda word: word + "_"), st.sampled_from(["r", "lora_alpha", "use_dora"])),
    value=st.sampled_from([{"a": 1}, [[1]], "many", None]),
)
def test_an_adapter_with_a_mistake_is_refused_and_the_key_named(key: str, value: Any) -> None:
    counted("adapters", (key, value))
    plain = {**PLAIN, "adapter": {"type": "lora", key: value}}
    with pytest.raises(InputError, match=key):
        validate_whole(plain)


def validate_whole(plain: dict[str, Any]) -> None:
    """As far as a run goes before it loads weights."""
    from rlft.material import material

    material(validate(plain))


def written(tmp_path: Path, plain: Any) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(plain if isinstance(plain, str) else yaml.safe_dump(plain))
    return path


BROKEN_YAML = ["", "- 1\n- 2", "3", "a: [1", "a: {b: 1", "'", "a: b: c", "\tname: x", "&a [*a]", "name: ${nothing}",
               "name: ${oc.env:NOT_THERE_AT_ALL}", "? [a]\n: 1", "name: !!python/object:os.system x", "\x00",
               "null"]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN_YAML)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str) -> None:
    counted("yaml", text)
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load(path)
    assert "config.yaml" in str(caught.value) or "name" in str(caught.value)


BROKEN_OVERRIDES = ["learner.lr", "=3", "learner=[", "learner.lr={", "steps=${nothing}", ".=1", "a..b=1", "steps.x=1"]


@often(150)
@given(st.one_of(st.sampled_from(BROKEN_OVERRIDES), st.builds("{}.{}_=1".format, WORDS, WORDS),
                 st.sampled_from(["steps", "learner.lr", "rollout.group_size"]).map(lambda key: key + "=many"),
                 st.builds("learner.{}_={}".format, WORDS, WORDS)))  # fmt: skip
def test_an_override_with_a_mistake_is_refused_and_named(tmp_path: Path, override: str) -> None:
    counted("overrides", override)
    with pytest.raises(InputError) as caught:
        load(written(tmp_path, PLAIN), [override])
    key = override.partition("=")[0]
    assert key in str(caught.value) or key.partition(".")[0] in str(caught.value), str(caught.value)


# --- data -------------------------------------------------------------------------------------------------------------

ASKED: list[dict[str, Any]] = [{"prompt": f"What is {i}?", "answer": i} for i in range(5)]
TALKS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": str(i)}]} for i in range(5)]
SCORED = [{"prompt": "Hi", "completions": ["a", "b"], "scores": [i, 1.5]} for i in range(5)]
LABELLED = [{"prompt": "Hi", "completion": "a", "label": i % 2 == 0} for i in range(5)]
STEPPED = [{"prompt": "Hi", "completions": ["a b", "c d"], "labels": [True, i == 2]} for i in range(5)]
GOOD = {"asked": ASKED, "pairs": PAIRED, "talks": TALKS, "scored": SCORED, "labelled": LABELLED, "stepped": STEPPED}
NO_TEXT: list[Any] = [None, "", "   ", [], {}, 7, False, 1.5, [[]]]
NOT_A_LIST: list[Any] = [None, "a", {}, 3, [], ["a"], ["a", "b", "c"]]
BAD_MESSAGES: list[Any] = [None, [], "hi", {}, [{}], [{"role": "user"}], [{"content": "x"}], [[]], 3,
                           [{"role": None, "content": "x"}], [{"role": "user", "content": None}]]  # fmt: skip
HALF = [{"role": "user", "content": "x"}]
BREAKS: dict[str, list[tuple[str, list[Any]]]] = {
    "asked": [("prompt", [*NO_TEXT, [{}], [{"role": "user"}], [{"role": "assistant", "content": "x"}]])],
    "pairs": [("prompt", NO_TEXT), ("chosen", NO_TEXT), ("rejected", NO_TEXT)],
    "talks": [("messages", [*BAD_MESSAGES, HALF, [{"role": "assistant", "content": "x"}]])],
    "scored": [("prompt", NO_TEXT), ("completions", [*NOT_A_LIST, ["a", ""], ["a", None], [1, 2]]),
               ("scores", [*NOT_A_LIST, [1, None], ["1", 2], [float("nan"), 1], [1, float("inf")], [1, {}]])],
    "labelled": [("prompt", NO_TEXT), ("completion", NO_TEXT), ("label", ["yes", 2, -1, [], {}, 0.5, float("nan")])],
    "stepped": [("prompt", NO_TEXT), ("completions", [*NOT_A_LIST, ["a", ""]]),
                ("labels", [*NOT_A_LIST, [True, "no"], [2, True], [True, {}]])],
}  # fmt: skip


@st.composite
def bad_rows(draw: st.DrawFn) -> tuple[str, int, str, Any]:
    """A kind of data, the row that is broken, its column and what stands there; `...`: nothing does."""
    kind = draw(st.sampled_from(sorted(GOOD)))
    column, values = draw(st.sampled_from(BREAKS[kind]))
    missing = [] if column in ("label", "scores") else [...]
    return kind, draw(st.integers(0, 4)), column, draw(st.sampled_from([*values, *missing]))


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> Chat:
    return Chat(tiny_model)


@often(500)
@given(bad_rows())
def test_a_bad_row_is_refused_by_its_number(
    tmp_path_factory: pytest.TempPathFactory, chat: Chat, case: tuple[str, int, str, Any]
) -> None:
    kind, number, column, value = case
    counted("rows", case)
    rows = copy.deepcopy(GOOD[kind])
    rows[number][column] = value
    if value is ...:
        del rows[number][column]
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = read(str(path))
    with pytest.raises(InputError) as caught:
        tasks(made, {}, "train") if kind == "asked" else recorded(made, {}, "train", chat)
    assert f": {number + 1}" in str(caught.value), str(caught.value)
    words = (column.rstrip("s"), "step", "messages", *(["prompt", "completion"] if value is ... else []))
    assert any(word in str(caught.value) for word in words), str(caught.value)


LINES = [b"{", b"[1]", b"3", b"null", b'"text"', b"{'prompt': 'x'}", b'{"prompt": "x"', b"\xff\xfe\x00", b"nan",
         b"true", b'{"prompt": }', b"\x00", b"prompt,answer", b"[" * 100_000]  # fmt: skip


@pytest.mark.parametrize("line", LINES, ids=lambda line: repr(line[:12]))
@pytest.mark.parametrize("number", [0, 2, 4])
def test_a_line_that_is_no_row_is_refused(tmp_path: Path, number: int, line: bytes) -> None:
    counted("lines", (number, line[:20]))
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(row).encode() for row in ASKED]
    lines[number] = line
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError) as caught:
        read(str(path))
    assert "rows.jsonl" in str(caught.value)
    if b"\xff" not in line:
        assert str(number + 1) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\n\n", b"[]", b"[1, 2]", b"PAR1", b"PAR1" * 9, b"\x80\x04\x95."])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_file_that_holds_no_rows_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    counted("files", (suffix, content))
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"rows{suffix}"):
        read(str(path))


def test_columns_that_are_not_there_are_refused(chat: Chat) -> None:
    for role in ("prompt", "answer", "label", "chosen"):
        counted("columns", role)
        message = rf"data.columns.{role}.*no column 'nowhere'"
        with pytest.raises(InputError, match=message):
            tasks(ASKED, {role: "nowhere"}, "train")
        with pytest.raises(InputError, match=message):
            recorded(ASKED, {role: "nowhere"}, "train", chat)


# --- the command line -------------------------------------------------------------------------------------------------

# Everything is loaded once; then each case is a process of its own, forked, that is given its arguments.
FORKS = """
import json, os, sys
import rlft.cli, rlft.settings, rlft.session, rlft.plan
for case in json.load(sys.stdin):
    child = os.fork()
    if not child:
        sys.argv = ["rlft", *case["arguments"]]
        for number in (1, 2):
            os.dup2(os.open(f"{case['to']}.{number}", os.O_WRONLY | os.O_CREAT), number)
        try:
            rlft.cli.main()
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code if isinstance(end.code, int) else 0 if end.code is None else 1)
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def cases(tmp_path: Path) -> Iterator[tuple[list[str], str]]:
    """Arguments, and a word that the message must have."""
    good, empty = written(tmp_path, PLAIN), tmp_path / "empty"
    empty.mkdir()
    for i, (path, schema, given_types) in enumerate(PLACES[:: len(PLACES) // 24]):
        plain = copy.deepcopy(PLAIN)
        for block, value in given_types.items():
            put(plain, block, dict(value))
        wrong = (wrong_kinds(schema) + beyond(schema))[:1]
        leaf = path if wrong else (*path[:-1], "wrong_")
        put(plain, leaf, wrong[0] if wrong else 1)
        file = tmp_path / f"bad-{i}.yaml"
        file.write_text(yaml.safe_dump(plain))
        yield ["train" if i % 2 else "plan", str(file)], leaf[-1]
    for override in BROKEN_OVERRIDES:
        yield ["train", str(good), override], override.partition("=")[0].partition(".")[0]
    for i, (kind, rows) in enumerate(sorted(GOOD.items())):
        column, values = BREAKS[kind][-1]
        path = tmp_path / f"rows-{i}.jsonl"
        path.write_text("".join(json.dumps({**row, column: values[0]}) + "\n" for row in rows))
        algorithm = {"asked": "grpo", "pairs": "dpo", "talks": "sft", "scored": "dpo"}.get(kind, "sft")
        yield ["train", str(good), f"data.train={path}", f"algorithm.type={algorithm}", f"out={tmp_path}/o{i}"], column
    yield ["train", str(tmp_path / "nowhere.yaml")], "nowhere.yaml"
    yield ["train", str(tmp_path)], str(tmp_path)
    yield ["train"], "CONFIG"
    yield ["trian", str(good)], "trian"
    yield ["resume", str(empty)], "config.yaml"
    yield ["resume", str(tmp_path / "nowhere")], "nowhere"
    yield ["eval", str(tmp_path / "nowhere")], "nowhere"
    yield ["export", str(empty), "--to", str(tmp_path / "x")], "config.yaml"
    yield ["export", str(empty)], "--to"
    yield ["doctor", str(tmp_path / "nowhere")], "nowhere"
    yield ["replay", str(empty)], "config.yaml"
    yield ["explain", str(empty), "1", "0"], "config.yaml"
    yield ["explain", str(empty), "one", "0"], "step"
    yield ["list", "nonsense"], "nonsense"


def test_the_command_line_answers_bad_input_with_a_line(tmp_path: Path) -> None:
    """Exit code 2, a message that names it, and no traceback."""
    found = list(cases(tmp_path))
    assert len(found) >= 50
    given_cases = [{"arguments": arguments, "to": str(tmp_path / f"out-{i}")} for i, (arguments, _) in enumerate(found)]
    done = subprocess.run(
        [sys.executable, "-c", FORKS], input=json.dumps(given_cases), capture_output=True, text=True, cwd=tmp_path,
        timeout=300, check=False,
    )  # fmt: skip
    codes = [int(line) for line in done.stdout.split()]
    assert len(codes) == len(found), done.stderr[-2000:]
    wrong = []
    for i, ((arguments, word), code) in enumerate(zip(found, codes, strict=True)):
        said = (tmp_path / f"out-{i}.2").read_text()
        if code != 2 or word not in said or "Traceback" in said:
            wrong.append((arguments, word, code, said[-600:]))
    assert not wrong, wrong[:3]


def test_how_many_there_were() -> None:
    """The cases above are different ones, and more than 2,000."""
    if "configs" not in FOUND or "rows" not in FOUND:
        pytest.skip("the tests above did not run")
    assert sum(map(len, FOUND.values())) >= 2000, {kind: len(cases) for kind, cases in FOUND.items()}
