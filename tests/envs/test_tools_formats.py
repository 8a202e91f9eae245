"""The formats of tool calls: what the models' own templates write is read back, and as vLLM's parsers read it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rlft.chat import Chat
from rlft.engine.local import LocalEngine
from rlft.envs.base import Action
from rlft.envs.tools import formats
from rlft.envs.tools.base import Call, Result
from rlft.envs.tools.calling import ToolsConfig
from rlft.envs.tools.formats import OWN, told_by
from rlft.envs.tools.hints import Hint
from rlft.player import Player
from rlft.types import InputError, Message, Sampling, Task, Turn
from tests.envs import mine
from tests.envs.test_tools import TASK, called

FOLDER = Path(__file__).parents[1] / "data" / "chat_templates"
NATIVE = {"qwen2_5": "hermes", "qwen3": "hermes", "mistral": "mistral", "llama3_1": "llama"}
ADD = {"name": "add", "arguments": {"a": 2, "b": 3}}
HARD = {
    "name": "say",
    "arguments": {"text": 'a {brace} and "quotes", é\n[x]', "deep": {"list": [1, {"b": None}], "f": 1.5}},
}
EMPTY = {"name": "now", "arguments": {}}


def text(call: Mapping[str, Any]) -> str:
    return json.dumps(call, ensure_ascii=False)


def read(kind: str, raw: str) -> tuple[str, list[tuple[str, Mapping[str, Any]]]]:
    before, calls = OWN[kind].calls(raw, raw)
    assert not [call.error for call in calls if call.error]
    return before, [(call.name, call.arguments) for call in calls]


def pairs(*calls: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    return [(call["name"], call["arguments"]) for call in calls]


@pytest.mark.parametrize("family", sorted(path.stem for path in FOLDER.glob("*.jinja")))
def test_the_format_is_read_off_the_template(family: str) -> None:
    template = (FOLDER / f"{family}.jinja").read_text()
    if family in NATIVE:
        assert told_by(template) == NATIVE[family]
    elif "tools" in template:
        with pytest.raises(InputError, match=r"env\.format=vllm:<name>"):
            told_by(template)
    else:
        assert told_by(template) == "plain"


@pytest.mark.parametrize("call", [ADD, HARD, EMPTY], ids=lambda call: call["name"])
@pytest.mark.parametrize("family", NATIVE)
def test_what_a_template_writes_is_read_back(family: str, call: dict[str, Any], tiny_model: Path) -> None:
    """The answer as the template renders it, from the calls that the environment read."""
    chat, form = Chat(tiny_model, str(FOLDER / f"{family}.jinja")), OWN[NATIVE[family]]
    said = form.said("", [Call(call["name"], call["arguments"])])
    assert said is not None
    asked = chat.render(TASK.messages, True)
    whole = chat.render([*TASK.messages, said], False)
    assert whole.startswith(asked)
    before, calls = read(NATIVE[family], whole[len(asked) :])
    assert calls == pairs(call)
    assert before in ("", "<think>\n\n</think>")  # Qwen 3 writes that it thought of nothing


TWO, THREE = text(ADD["arguments"]), text(HARD["arguments"])
PROSE = r"It is \frac{1}{2}, as {x} says, or {'a'}.<|eot_id|>"
THOUGHT = "<think>\n<tool_call>x\n</think>"


@pytest.mark.parametrize(("kind", "raw", "before", "calls"), [
    ("hermes", f"Hm.\n<tool_call>\n{text(ADD)}\n</tool_call>\n<tool_call>{text(HARD)}<|im_end|>", "Hm.", (ADD, HARD)),
    ("hermes", f"{THOUGHT}\n<tool_call>{text(EMPTY)}", THOUGHT, (EMPTY,)),
    ("hermes", f"<tool_call>{text({'name': 'add', 'arguments': TWO})}</tool_call>", "", (ADD,)),
    ("llama", '{"name": "add", "parameters": {"a": 2, "b": 3}}<|eot_id|>', "", (ADD,)),
    ("llama", f"<|python_tag|>{text(ADD)}; {text(HARD)}<|eom_id|>", "", (ADD, HARD)),
    ("llama", f"I call it: {text(HARD)} now", "", (HARD,)),
    ("llama", PROSE, PROSE, ()),
    ("mistral", f"[TOOL_CALLS] [{text(ADD)}, {text(HARD)}]</s>", "", (ADD, HARD)),
    ("mistral", f"Hm.[TOOL_CALLS]add{TWO}", "Hm.", (ADD,)),
    ("mistral", f"[TOOL_CALLS]add[ARGS]{TWO}[TOOL_CALLS]say[CALL_ID]a1B[ARGS]{THREE}</s>", "", (ADD, HARD)),
    ("plain", f"Hm. <call>{text(ADD)}</call> and <call>{text(EMPTY)}</call>", "Hm.", (ADD, EMPTY)),
    ("plain", f"<tool_call>{text(ADD)}</tool_call>", f"<tool_call>{text(ADD)}</tool_call>", ()),
])  # fmt: skip
def test_calls_are_read(kind: str, raw: str, before: str, calls: tuple[dict[str, Any], ...]) -> None:
    assert read(kind, raw) == (before, pairs(*calls))


@pytest.mark.parametrize(("kind", "raw", "error"), [
    ("hermes", "<tool_call>{'name': 'add'}</tool_call>", "no JSON: Expecting property name"),
    ("hermes", f"<tool_call>{text(ADD)} and more</tool_call>", "no JSON: there is more behind it: 'and more'"),
    ("hermes", '<tool_call>{"tool": "add"}</tool_call>', 'an object with a "name"'),
    ("hermes", '<tool_call>["add"]</tool_call>', 'an object with a "name"'),
    ("hermes", '<tool_call>{"name": "add", "arguments": "a=1"}</tool_call>', 'the "arguments" of add are no JSON'),
    ("hermes", "<tool_call>" + "[" * 100_000, "no JSON"),
    ("llama", '{"name": "add", "parameters": {"a": 2', "no JSON"),
    ("llama", "<|python_tag|>add(2, 3)", "no JSON"),
    ("mistral", '[TOOL_CALLS]add{"a": ', "no JSON"),
    ("mistral", f"[TOOL_CALLS][{text(ADD)}] and", "more behind it"),
])  # fmt: skip
def test_a_call_that_cannot_be_read_is_one_with_an_error(kind: str, raw: str, error: str) -> None:
    _, (call,) = OWN[kind].calls(raw, raw)
    assert error in call.error


def test_the_readable_calls_beside_an_unreadable_one_are_answered_in_order() -> None:
    form = OWN["mistral"]
    calls = [Call("", {}, "bad"), Call("add", {"a": 1})]
    said = form.said("", calls)
    assert said is not None
    assert [call["id"] for call in said["tool_calls"]] == ["000000001"]
    replies = form.replies(calls, [Result("Error: bad"), Result("1")])
    assert [(one["tool_call_id"], one["content"]) for one in replies] == [
        ("000000000", "Error: bad"),
        ("000000001", "1"),
    ]


class Spoken:
    """The environment of tools, told that the policy said these answers; what it really said stays what is trained."""

    def __init__(self, inner: Any, answers: list[str]) -> None:
        self._inner, self._answers, self.turns = inner, iter(answers), []
        self.reset, self.close = inner.reset, inner.close

    @property
    def tools(self) -> Any:
        return self._inner.tools

    async def step(self, action: Action) -> Turn:
        answer = next(self._answers)
        self.turns.append(await self._inner.step(Action(answer, "stop", answer)))
        return self.turns[-1]


def written(kind: str, *calls: tuple[int, int]) -> str:
    """An answer that adds numbers, as a model of this kind would write it."""
    made = [{"name": "add", "arguments": {"a": a, "b": b}} for a, b in calls]
    if kind == "mistral":
        return f"[TOOL_CALLS] {text(made)}"  # type: ignore[arg-type]
    parts = {"hermes": ("<tool_call>", "</tool_call>"), "llama": ("", ";"), "plain": ("<call>", "</call>")}[kind]
    return "".join(f"{parts[0]}{text(call)}{parts[1]}" for call in made)


BROKEN = {"hermes": "<tool_call>{", "llama": "{", "mistral": "[TOOL_CALLS] [{", "plain": "<call>{"}


@pytest.mark.parametrize("family", [*NATIVE, "phi3_5", "gemma3"])
def test_a_whole_episode_with_a_model_s_own_template(family: str, tiny_model: Path, engine: LocalEngine) -> None:
    """The template shows the tools, and the results stand in the sample, where no loss is."""
    template = (FOLDER / f"{family}.jinja").read_text()
    chat, kind = Chat(tiny_model, str(FOLDER / f"{family}.jinja")), NATIVE.get(family, "plain")
    knobs = ToolsConfig(tools=("tests.envs.mine:add",), hints=(Hint(text="Are you sure?"),))
    make = knobs.build_for(chat.tokenizer, template)
    answers = [written(kind, (20, 300)), written(kind, (1, 410), (2, 510)), BROKEN[kind], "It is 320.", "It is."]
    made: list[Spoken] = []

    def spoken(task: Task) -> Any:
        made.append(Spoken(make(task), answers))
        return made[-1]

    player = Player(engine, chat, spoken, Sampling(max_tokens=40, stop=("e", "a", "s")), 9000)
    played = asyncio.run(player.play(TASK, 3))
    assert played.failures == []
    assert [turn.done for turn in made[0].turns] == [False, False, False, False, True]
    (sample,) = played.samples
    first = sample.mask.index(True)
    assert "Add two numbers." in chat.decode(sample.tokens[:first], special=True)
    told = [t for t, chosen in zip(sample.tokens[first:], sample.mask[first:], strict=True) if not chosen]
    heard = chat.decode(told, special=True)
    places = [heard.index(said) for said in ("320", "411", "512", "the call is no JSON", "Are you sure?")]
    assert places == sorted(places)
    assert played.metrics == {
        "env/calls": 4, "env/call_errors": 1, "env/call_failures": 0, "env/answered": 1,
    }  # fmt: skip


def test_auto_needs_a_template_that_it_knows() -> None:
    knobs = ToolsConfig(tools=("tests.envs.mine:add",))
    with pytest.raises(InputError, match=r"env\.format=plain"):
        knobs.build_for(None, "{{ tools }} in some other way")
    knobs.build()  # without one it is plain text


THEIRS = {
    "hermes": ("hermes", [
        f"<tool_call>\n{text(ADD)}\n</tool_call>",
        f"Let me see.\n<tool_call>\n{text(ADD)}\n</tool_call>\n<tool_call>\n{text(HARD)}\n</tool_call>",
        f"<tool_call>{text(EMPTY)}",
        "It is 5.",
    ]),
    "llama": ("llama3_json", [
        text({"name": "add", "parameters": ADD["arguments"]}),
        f"<|python_tag|>{text(ADD)}; {text(HARD)}",
        f"I call {text(HARD)}",
        r"It is $x$.",
    ]),
    "mistral": ("mistral", [  # its older form too, but only where Mistral's own tokenizer says so
        f"[TOOL_CALLS]add[ARGS]{text(ADD['arguments'])}",
        f"Hm.[TOOL_CALLS]add[ARGS]{text(ADD['arguments'])}[TOOL_CALLS]say[ARGS]{text(HARD['arguments'])}",
        "It is 5.",
    ]),
}  # fmt: skip


@pytest.fixture(scope="module")
def marked(tiny_model: Path) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens that vLLM's parsers look for."""
    tokenizer: Any = Chat(tiny_model).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|python_tag|>", "[TOOL_CALLS]", "[ARGS]"]})
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("kind", THEIRS)
def test_calls_are_read_as_vllm_reads_them(kind: str, marked: PreTrainedTokenizerFast) -> None:
    pytest.importorskip("vllm")
    name, texts = THEIRS[kind]
    theirs = formats.vllm(name, marked, [])
    for raw in texts:
        (before, calls), (theirs_before, theirs_calls) = OWN[kind].calls(raw, raw), theirs.calls(raw, raw)
        assert calls == theirs_calls
        assert before == theirs_before or kind == "llama"  # whose template shows nothing beside a call


@pytest.mark.slow
def test_a_parser_of_vllm_s_is_a_format(marked: PreTrainedTokenizerFast, tiny_model: Path) -> None:
    pytest.importorskip("vllm")
    knobs = ToolsConfig(tools=("tests.envs.mine:add",), format="vllm:hermes")
    env: Any = knobs.build_for(marked, "")(TASK)

    async def episode() -> tuple[tuple[Message, ...], Turn]:
        await env.reset()
        answer = called("add", a=2, b=3)
        return env.tools, await env.step(Action(answer, "stop", answer + "<|im_end|>"))

    tools, turn = asyncio.run(episode())
    assert tools[0]["function"]["name"] == mine.add.__name__
    assert [message["content"] for message in turn.messages] == ["5"]
    with pytest.raises(InputError, match=r"vLLM has no tool parser 'nothing'\. It has: .*hermes"):
        formats.vllm("nothing", marked, [])
    with pytest.raises(InputError, match="does not fit this model's tokenizer"):
        formats.vllm("llama3_json", Chat(tiny_model).tokenizer, [])
