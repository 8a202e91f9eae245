"""OpenAI's chat completions as plain values: what a client asks, as the chat template takes it, and how it is answered.

What would change the distribution that answers are drawn from is the run's to say, and is not obeyed; what cannot be
had without changing it (a forced call, a JSON schema) is refused, in the form in which OpenAI's clients read errors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlft.envs.tools.base import Call
from rlft.types import Message, Sampling, finite

NEUTRAL = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
}
LISTED = (*NEUTRAL, "temperature", "top_p", "top_k", "min_p")
RANGES = {  # an engine that is given less or more fails, and with it what others have asked
    "temperature": ("0, or a number from 1e-6 to 1e6", lambda x: x == 0 or 1e-6 <= x <= 1e6),
    "top_p": ("a number from 1e-6 to 1", lambda x: 1e-6 <= x <= 1),
    "min_p": ("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "top_k": ("a whole number from -1 to 2147483647", lambda x: isinstance(x, int) and -1 <= x < 2**31),
}
LIMITS = ("max_completion_tokens", "max_tokens")
ID = "{:09d}"  # Mistral's template takes nine letters and digits, no more and no fewer
ROLES = {"developer": "system"} | {role: role for role in ("system", "user", "assistant", "tool")}
KEPT = ("name", "tool_call_id", "reasoning_content")
WHY = {
    "n": "one answer for each request; ask several times",
    "logprobs": "they are kept for the learner, and not handed out",
    "response_format": "an answer that is held to a form would be drawn from another distribution; ask for it in words",
    "functions": "use tools",
    "audio": "only text",
}


class Refused(Exception):
    """A request that is not answered. status: of HTTP. param: the field that is to blame. code: OpenAI's, or ours."""

    def __init__(self, said: str, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(said)
        self.status, self.param, self.code = status, param, code

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI writes it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Asked:
    """One request. most: tokens of the answer. calls: tools may be called; one: only one of them at a time.

    wanted: what it says of the sampling, by OpenAI's names. streamed, counted: the answer comes in pieces, and tells
    how many tokens it took at its end.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    model: str = ""
    most: int | None = None
    stop: tuple[str, ...] = ()
    calls: bool = False
    one: bool = False
    wanted: Mapping[str, Any] = field(default_factory=dict)
    streamed: bool = False
    counted: bool = False

    def differs(self, own: Sampling) -> bool:
        """It asks for another distribution than the one that is sampled from."""
        neutral = NEUTRAL | {"temperature": own.temperature, "top_p": own.top_p, "min_p": own.min_p}
        top_k = self.wanted.get("top_k", own.top_k)
        return max(top_k, 0) != max(own.top_k, 0) or any(
            self.wanted.get(name, value) != value for name, value in neutral.items()
        )

    def same(self, other: Asked) -> bool:
        """It is the same question."""
        return (self.messages, self.tools) == (other.messages, other.tools)


@dataclass(frozen=True)
class Answer:
    """What the policy said. message: as the chat template has it. finish: OpenAI's word. prompt, said: tokens; None
    where nobody counted.
    """

    message: Message
    finish: str
    prompt: int | None = None
    said: int | None = None


def refuse_unwritable(value: Any, what: str) -> None:
    """Raises Refused where a text in it has half of a character, which neither a model nor a file can take."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise Refused(f"{what}: it holds text that is no Unicode, such as half a surrogate pair", 400, what) from error


def read(body: bytes) -> Asked:
    """The request in a body. Raises Refused."""
    try:
        plain = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is no JSON: {error}") from error
    if not isinstance(plain, dict):
        raise Refused("the body is no JSON object")
    plain = {name: value for name, value in plain.items() if value is not None}
    _refuse(plain)
    tools, choice = tuple(map(_tool, _list(plain, "tools"))), plain.get("tool_choice", "auto")
    if choice not in ("auto", "none"):
        raise Refused(
            "tool_choice: a forced call would be drawn from another distribution; use auto", 400, "tool_choice"
        )
    messages, model = _messages(plain), str(plain.get("model", ""))
    for name, value in (("messages", messages), ("tools", tools), ("model", model), ("stop", plain.get("stop"))):
        refuse_unwritable(value, name)
    return Asked(
        messages,
        tools,
        model,
        _most(plain),
        _stop(plain),
        bool(tools) and choice == "auto",
        plain.get("parallel_tool_calls") is False,
        {name: _number(plain, name) for name in LISTED if name in plain},
        bool(plain.get("stream")),
        _counted(plain),
    )


def _refuse(plain: Mapping[str, Any]) -> None:
    """What cannot be had here. Raises Refused."""
    form = plain.get("response_format", {"type": "text"})
    there = {
        "n": plain.get("n", 1) != 1,
        "logprobs": bool(plain.get("logprobs")) or bool(plain.get("top_logprobs")),
        "response_format": not isinstance(form, dict) or form.get("type") != "text",
        "functions": "functions" in plain or "function_call" in plain,
        "audio": "audio" in plain or plain.get("modalities", ["text"]) != ["text"],
    }
    for name in (name for name, wrong in there.items() if wrong):
        raise Refused(f"{name}: {WHY[name]}", 400, name, "unsupported_parameter")


def _messages(plain: Mapping[str, Any]) -> tuple[Message, ...]:
    given = plain.get("messages")
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
        raise Refused("messages: it is a list of at least one message", 400, "messages")
    messages = tuple(_message(one, f"messages[{i}]") for i, one in enumerate(given))
    if messages[-1]["role"] == "assistant":
        raise Refused("messages: the last one is the assistant's, so there is nothing to answer", 400, "messages")
    return messages


def _message(plain: Mapping[str, Any], where: str) -> Message:
    """A message without what clients add, so that one which was sent back is equal to the one that was given out."""
    role = plain.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Refused(f"{where}.role: it is system, user, assistant or tool", 400, where)
    message: dict[str, Any] = {"role": ROLES[role], "content": _text(plain.get("content"), where)}
    message |= {name: plain[name] for name in KEPT if plain.get(name)}
    if plain.get("tool_calls"):
        message["tool_calls"] = [_called(one, where) for one in _list(plain, "tool_calls")]
    return message


def _text(content: Any, where: str) -> str:
    """The text of a content, whose parts are joined."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = [one.get("text") if isinstance(one, dict) else None for one in content] if isinstance(content, list) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise Refused(f"{where}.content: only text can be read", 400, where)
    return "".join(map(str, texts))


def _called(plain: Any, where: str) -> dict[str, Any]:
    """A call with its arguments as values, which is how chat templates take them."""
    function = plain.get("function") if isinstance(plain, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused(f"{where}.tool_calls: a call is {{id, type, function: {{name, arguments}}}}", 400, where)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = {"": arguments}  # not ours: what we give out can be read
    return _call(str(plain.get("id", "")), function["name"], arguments)


def _call(name: str, function: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": name, "function": {"name": function, "arguments": arguments}}


def _tool(plain: Any) -> Mapping[str, Any]:
    function = plain.get("function") if isinstance(plain, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Refused("tools: each is {type: function, function: {name, description, parameters}}", 400, "tools")
    return {"type": "function", "function": function}


def _list(plain: Mapping[str, Any], name: str) -> list[Any]:
    value = plain.get(name) or []
    if not isinstance(value, list):
        raise Refused(f"{name}: it is a list", 400, name)
    return value


def _most(plain: Mapping[str, Any]) -> int | None:
    name = next((name for name in LIMITS if name in plain), None)
    if name is None:
        return None
    if isinstance(plain[name], bool) or not isinstance(plain[name], int) or plain[name] < 1:
        raise Refused(f"{name}: it is a whole number above 0", 400, name)
    return plain[name]


def _stop(plain: Mapping[str, Any]) -> tuple[str, ...]:
    stop = plain.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) and one for one in stops):
        raise Refused("stop: it is a text, or a list of texts", 400, "stop")
    return tuple(stops)


def _number(plain: Mapping[str, Any], name: str) -> Any:
    """What a request says of the sampling. Raises Refused."""
    value = plain[name]
    if name == "logit_bias":
        wanted, fine = "an object", isinstance(value, dict)
    else:
        wanted, within = RANGES.get(name, ("a number", finite))
        fine = finite(value) and within(value)
    if not fine:
        raise Refused(f"{name}: it is {wanted}", 400, name)
    return value


def _counted(plain: Mapping[str, Any]) -> bool:
    """Whether a stream ends with how many tokens it took."""
    options = plain.get("stream_options", {})
    if not isinstance(options, dict):
        raise Refused("stream_options: it is an object", 400, "stream_options")
    return bool(options.get("include_usage"))


def spoken(before: str, calls: Sequence[Call], asked: Asked, first: int) -> Message:
    """The answer as the chat template has it. first: the number of its first call in the episode."""
    named = [call for call in calls if call.name and not call.error][: 1 if asked.one else None]
    made = [_call(ID.format(first + i), call.name, dict(call.arguments)) for i, call in enumerate(named)]
    return {"role": "assistant", "content": before} | ({"tool_calls": made} if made else {})


def whole(answer: Answer, asked: Asked, name: str, created: int) -> dict[str, Any]:
    """The body of an answer. name: of the completion. created: seconds since 1970."""
    choice = {"index": 0, "message": _out(answer.message), "finish_reason": answer.finish, "logprobs": None}
    head = {"id": name, "object": "chat.completion", "created": created, "model": asked.model, "choices": [choice]}
    return head | ({"usage": _usage(answer)} if answer.said is not None else {})


def pieces(answer: Answer, asked: Asked, name: str, created: int) -> Iterator[str]:
    """The same as server-sent events: who speaks, what is said, why it ends."""
    head = {"id": name, "object": "chat.completion.chunk", "created": created, "model": asked.model}
    out = _out(answer.message)
    calls = [{"index": i} | call for i, call in enumerate(out.pop("tool_calls", []))]
    said = {"content": out["content"]} | ({"tool_calls": calls} if calls else {})
    for delta, finish in (({"role": "assistant", "content": ""}, None), (said, None), ({}, answer.finish)):
        yield _event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}]})
    if asked.counted and answer.said is not None:
        yield _event(head | {"choices": [], "usage": _usage(answer)})
    yield "data: [DONE]\n\n"


def _event(plain: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(plain)}\n\n"


def _out(message: Message) -> dict[str, Any]:
    """A message of ours as clients read it: arguments are the text of JSON."""
    calls = [
        call | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    content = message["content"] or (None if calls else "")
    return {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {})


def _usage(answer: Answer) -> dict[str, int]:
    prompt, said = answer.prompt or 0, answer.said or 0
    return {"prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said}
