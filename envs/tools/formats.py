"""How a model writes the calls of its tools: what stands in an answer, and how the conversation goes on from there.

A native format is the model's own: its chat template shows the tools, the calls and the results. `plain` is for models
without one: a message tells the tools and how they are called. What looks like a call but cannot be read is kept as one
with an error, where vLLM's parsers take such an answer for one without calls; on calls that can be read they agree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlft.envs.tools.base import Call, Result, Schema
from rlft.types import InputError, Message

MARKS = re.compile(r"(?:\s*(?:<\|[^<>|]+\|>|</s>|<end_of_turn>|<eos>))+\s*\Z")  # what ends a turn
SPECIAL = re.compile(r"<\|[^<>|]+\|>|</?s>")
DECODER = json.JSONDecoder()
HERMES, PLAIN = ("<tool_call>", "</tool_call>"), ("<call>", "</call>")
PYTHON_TAG, TOOL_CALLS = "<|python_tag|>", "[TOOL_CALLS]"
MISTRAL = re.compile(r"\s*([\w.-]+?)\s*(?:\[CALL_ID\]\w*)?\s*(?:\[ARGS\])?\s*(?=\{)")
ID = "{:09d}"  # Mistral's template takes nine letters and digits, no more and no fewer

Read = tuple[str, list[Call]]  # what stands before the calls, and the calls


@dataclass(frozen=True)
class Format:
    """read: what an answer with its special tokens says. native: the chat template knows tools. several: also in
    answers with more than one call.
    """

    read: Callable[[str], Read]
    native: bool
    several: bool = True

    def calls(self, raw: str, text: str) -> Read:
        """raw, text: the answer with its special tokens and without."""
        thought, end, rest = (raw or text).rpartition("</think>")  # what is thought of is not yet called
        before, calls = self.read(MARKS.sub("", rest))
        if not calls:
            return text, []
        return SPECIAL.sub("", thought + end + before).strip(), calls

    def said(self, before: str, calls: Sequence[Call]) -> Message | None:
        """The answer as the chat template is to have it; None where it stays the text that it is."""
        named = [call for call in calls if call.name]
        if not self.native or not named or (len(named) > 1 and not self.several):
            return None
        made = [
            {"type": "function", "id": ID.format(i), "function": {"name": one.name, "arguments": dict(one.arguments)}}
            for i, one in enumerate(calls)
            if one.name
        ]
        return {"role": "assistant", "content": before, "tool_calls": made}

    def replies(self, calls: Sequence[Call], results: Sequence[Result]) -> tuple[Message, ...]:
        """The results in the order of the calls: messages of the tools' own role, or one of the user's."""
        if self.native and any(call.name for call in calls):
            return tuple(
                {"role": "tool", "name": call.name or "error", "tool_call_id": ID.format(i), "content": result.text}
                for i, (call, result) in enumerate(zip(calls, results, strict=True))
            )
        told = "\n".join(f"<result>\n{result.text}\n</result>" for result in results)
        return ({"role": "user", "content": told if self.native else f"\n{told}\n"},)


def tagged(raw: str, tags: tuple[str, str]) -> Read:
    """Each call as JSON between tags, of which the last may not be closed (Hermes and Qwen, and plain text)."""
    start, end = map(re.escape, tags)
    found = re.findall(rf"{start}(.*?)(?:{end}|\Z)", raw, re.S)
    return raw.partition(tags[0])[0], [_call_of(body) for body in found]


def llama(raw: str) -> Read:
    """Calls as JSON objects that are the answer, or stand in it; Llama 3 writes <|python_tag|> before them, or not."""
    before, tag, after = raw.partition(PYTHON_TAG)
    body = (after if tag else before).strip()
    if not tag and not body.startswith("{"):
        objects = [one for one in _objects(body) if "name" in one and {"parameters", "arguments"} & set(one)]
        return "", [_call(one) for one in objects]
    calls = []
    while body:
        value, body, error = _decoded(body)
        calls.append(Call("", {}, error) if error else _call(value))
        body = body.lstrip("; \n")
    return before if tag else "", calls


def mistral(raw: str) -> Read:
    """A list of calls behind [TOOL_CALLS], or a name and its arguments behind each one."""
    before, *parts = raw.split(TOOL_CALLS)
    calls: list[Call] = []
    for part in parts:
        name = MISTRAL.match(part)
        value, rest, error = _decoded(part[name.end() :] if name else part.strip())
        if not error and rest.strip():
            error = f"the call is no JSON: there is more behind it: {rest.strip()[:40]!r}"
        if error:
            calls.append(Call(name[1] if name else "", {}, error))
        elif name:
            calls.append(_call({"name": name[1], "arguments": value}))
        else:
            calls += map(_call, value if isinstance(value, list) else [value])
    return before, calls


OWN: dict[str, Format] = {
    "hermes": Format(lambda raw: tagged(raw, HERMES), True),
    "llama": Format(llama, True, several=False),
    "mistral": Format(mistral, True),
    "plain": Format(lambda raw: tagged(raw, PLAIN), False),
}
SIGNS = (("hermes", HERMES[0]), ("mistral", TOOL_CALLS), ("llama", PYTHON_TAG), ("llama", "ipython"))

OTHERS = ("<function=", "<arg_key>")  # what some write between <tool_call> and </tool_call> in place of JSON


def told_by(template: str) -> str:
    """The format that a chat template teaches; `plain` for one that knows no tools. Raises InputError."""
    if "tools" not in template:
        return "plain"
    found = next((name for name, sign in SIGNS if sign in template), "")
    if not found or any(sign in template for sign in OTHERS):
        raise InputError(
            "env.format: the model's chat template shows tools in a form that rlft does not read by itself. Set "
            "env.format=vllm:<name> with the tool parser that vLLM has for the model, or env.format=plain"
        )
    return found


@dataclass(frozen=True)
class Vllm:
    """One of vLLM's own parsers, made anew for every answer, since it keeps what it has read."""

    kind: Any
    tokenizer: Any
    request: Any = field(repr=False)

    def __call__(self, raw: str) -> Read:
        found = self.kind(self.tokenizer, self.request.tools).extract_tool_calls(raw, self.request)
        calls = [_call({"name": one.function.name, "arguments": one.function.arguments}) for one in found.tool_calls]
        return found.content or "", calls if found.tools_called else []


def vllm(name: str, tokenizer: Any, schemas: Sequence[Schema]) -> Format:
    """vLLM's tool parser of this name. Raises InputError where there is none, or it does not fit the model."""
    try:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.tool_parsers import ToolParserManager
    except ImportError as error:
        raise InputError(f"env.format: vllm:{name} needs vLLM; install it with pip install rlft[vllm]") from error
    try:
        kind = ToolParserManager.get_tool_parser(name)
    except KeyError as error:
        there = ", ".join(sorted({*ToolParserManager.tool_parsers, *ToolParserManager.lazy_parsers}))
        raise InputError(f"env.format: vLLM has no tool parser '{name}'. It has: {there}") from error
    request: Any = ChatCompletionRequest.model_validate(
        {"model": "policy", "messages": []} | ({"tools": [dict(schema) for schema in schemas]} if schemas else {})
    )
    try:
        kind(tokenizer, request.tools)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"env.format: vLLM's parser '{name}' does not fit this model's tokenizer: {error}. Take the parser of its "
            "family, or env.format=plain"
        ) from error
    return Format(Vllm(kind, tokenizer, request), True)


def _call_of(body: str) -> Call:
    value, rest, error = _decoded(body.strip())
    if rest.strip() and not error:
        error = f"the call is no JSON: there is more behind it: {rest.strip()[:40]!r}"
    return Call("", {}, error) if error else _call(value)


def _decoded(body: str) -> tuple[Any, str, str]:
    """A JSON value, what stands behind it, and what is wrong with it; nothing is behind what is wrong."""
    try:
        value, end = DECODER.raw_decode(body)
    except (ValueError, RecursionError) as error:
        return None, "", f"the call is no JSON: {error}"
    return value, body[end:], ""


def _call(value: Any) -> Call:
    """A call from its JSON; arguments may stand there as the text of JSON."""
    name = value.get("name") if isinstance(value, Mapping) else None
    if not isinstance(name, str) or not name:
        return Call("", {}, 'a call is an object with a "name" and its "arguments"')
    arguments = value.get("arguments", value.get("parameters", {}))
    if isinstance(arguments, str):
        arguments, rest, error = _decoded(arguments.strip() or "{}")
        if error or rest.strip():
            return Call(name, {}, f'the "arguments" of {name} are no JSON')
    if not isinstance(arguments, Mapping):
        return Call(name, {}, f'the "arguments" of {name} are no object with one value for each')
    return Call(name, arguments)


def _objects(text: str) -> Iterator[Mapping[str, Any]]:
    """The JSON objects that stand in a text, those within others left out."""
    at = text.find("{")
    while at >= 0:
        try:
            value, end = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            if isinstance(value, Mapping):
                yield value
        at = text.find("{", end)
