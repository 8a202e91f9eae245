"""Messages to tokens and back. What was sampled is what is trained on: sampled tokens are never encoded again.

A later turn is appended as the suffix that the chat template adds to what was rendered before. A template that
rewrites its history (strips thinking, say) has no such suffix; that is detected and refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from rlft.types import InputError, Message

Tool = Mapping[str, Any]  # {"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}


PLAIN = "said"  # stands for an answer, to see how a template ends one
RESULT = "found"


class Rewritten(InputError):
    """The template changes what was said before, so that no turn can be appended."""


class Chat:
    """A tokenizer with its chat template, or plain text where the model has none.

    template: "auto" (the model's own, plain text without one), "none" (plain text: the contents joined), or a
    Jinja file. Plain text begins with what the tokenizer puts before a text by itself (a BOS token, if any), as in
    pretraining, and as transformers and vLLM's completions do it; a template writes its own.
    """

    def __init__(self, model: Path, template: str = "auto", trust_remote_code: bool = False) -> None:
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        except (OSError, ValueError) as error:
            raise InputError(f"model.path: the tokenizer in {model} does not load: {error}") from error
        if template not in ("auto", "none"):
            if not Path(template).is_file():
                raise InputError(f"model.chat_template: no file {template!r}; it is auto, none or a Jinja file")
            self.tokenizer.chat_template = Path(template).read_text()
        self._plain = template == "none" or not self.tokenizer.chat_template
        self._opening = self._put_before() if self._plain else []
        eos = self.tokenizer.eos_token_id
        self.end: int | None = None if eos is None else int(eos)
        added = self.tokenizer.added_tokens_decoder.items()
        self._special = {i for i, token in added if token.special} | set(self.tokenizer.all_special_ids)
        self._ends = sorted(map(self._text, self._special), key=len, reverse=True)

    @property
    def template(self) -> str:
        """The Jinja text, that for tools where there are several; empty where it is plain text."""
        held = "" if self._plain else self.tokenizer.chat_template
        return str(held.get("tool_use", held.get("default", ""))) if isinstance(held, dict) else held

    @property
    def vocabulary(self) -> int:
        """Ids at and above this one mean nothing to the tokenizer."""
        return len(self.tokenizer)

    def render(self, messages: Sequence[Message], prompt: bool, tools: Sequence[Tool] = ()) -> str:
        """The text of a conversation; with `prompt`, up to where the assistant begins to speak. Plain text has no
        tools.

        Raises InputError where the template refuses the conversation: two turns of one role, say, or a system message.
        """
        if self._plain:
            return "".join(str(message["content"]) for message in messages)
        try:
            return self._template(messages, prompt, tools)
        except TemplateError as error:
            raise InputError(
                f"the chat template refuses this conversation: {error}; set model.chat_template"
            ) from error
        except TypeError:  # some take the arguments of a call as JSON
            return self._template([_as_json(message) for message in messages], prompt, tools)

    def _template(self, messages: Sequence[Message], prompt: bool, tools: Sequence[Tool]) -> str:
        return self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=prompt,
        )

    def encode(self, text: str) -> list[int]:
        """Tokens of rendered text; nothing is added to it. What is no character (half of a pair) is replaced."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(self, tokens: Sequence[int], special: bool = False) -> str:
        """The text of sampled tokens, with special ones or without."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=not special)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """The tokens that the assistant answers to."""
        return self._opening + self.encode(self.render(messages, prompt=True, tools=tools))

    def demonstration(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[list[int], list[int]]:
        """Prompt and completion tokens of a conversation that ends with the assistant; up to the end-of-turn token.

        Raises InputError where the template renders the prompt differently once it is answered.
        """
        asked = self.render(messages[:-1], True, tools)
        whole = self.render(messages, False, tools)
        if not whole.startswith(asked):
            raise InputError("the chat template changes the prompt once it is answered; set model.chat_template")
        said, tail = self.encode(whole[len(asked) :]), self.encode(self._tail(messages, whole, tools))
        end = tail[0] if tail and tail[0] in self._special else self.end
        if end is not None:
            said = said[: len(said) - said[::-1].index(end)] if end in said else [*said, end]
        return self._opening + self.encode(asked), said

    def suffix(
        self, before: Sequence[Message], after: Sequence[Message], last: int, tools: Sequence[Tool] = ()
    ) -> list[int]:
        """The tokens to append after an assistant turn so that it goes on with the new messages of `after`.

        before: the conversation whose tokens are there, its last message the assistant's. last: the last token of that
        message, which may be the one that ends the turn. Raises Rewritten where the template is not prefix-stable.
        """
        new = after[len(before) :]
        if self._plain:
            return self.encode(self.render(new, prompt=True))
        if any(message["role"] == "tool" for message in new) and not self._shows_results:
            raise InputError(
                "this chat template does not show what a tool returns; set model.chat_template to one that does, or "
                "let the environment answer as the user"
            )
        rest = self._behind(before, new, tools)
        if rest is None:
            rest = self._appended(before, after, last, tools)
        return self.encode(self._less(rest, last))

    def _less(self, rest: str, last: int) -> str:
        """What is written behind an answer, without what the answer has said: the special tokens up to its last."""
        ended, place = self._text(last), 0
        while last in self._special:
            token = next((text for text in self._ends if rest.startswith(text, place)), None)
            if token is None:
                break
            place += len(token)
            if token == ended:
                return rest[place:]
        return rest

    def _text(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def _behind(self, before: Sequence[Message], new: Sequence[Message], tools: Sequence[Tool]) -> str | None:
        """What the template writes behind the last answer once the new messages follow it.

        None where the prompt of that answer is no longer what it was, or is not followed by the answer as it is. Tool
        calls are not looked for, since their place is the template's to choose: a plain answer stands for them.
        """
        last = {"role": "assistant", "content": PLAIN} if before[-1].get("tool_calls") else before[-1]
        asked = self.render(before[:-1], True, tools)
        try:
            longer = self.render((*before[:-1], last, *new), True, tools)
        except InputError:  # it wants the calls before their results
            return None
        body = longer[len(asked) :] if longer.startswith(asked) else ""
        content = str(last["content"])
        found = next((said for said in (content, content.strip()) if body.startswith(said)), None)
        return body[len(found) :] if body and found is not None else None

    def _appended(self, before: Sequence[Message], after: Sequence[Message], last: int, tools: Sequence[Tool]) -> str:
        """The same, of a template that writes an answer in its own way, but ends it as soon as it is given."""
        spoken, longer = self.render(before, False, tools), self.render(after, True, tools)
        calls = bool(before[-1].get("tool_calls"))
        if not longer.startswith(spoken) or not (calls or str(before[-1]["content"]).strip() in spoken):
            raise Rewritten(
                "this chat template rewrites what was said before, so turns cannot be appended to it. Set "
                "rollout.episode.history=split to begin a new sample with every turn, or model.chat_template"
            )
        if calls and last in self._special and spoken.endswith(self._text(last)):
            return longer[len(spoken) :]
        return self._tail(before, spoken, tools) + longer[len(spoken) :]

    @cached_property
    def _shows_results(self) -> bool:
        """A tool's result stands in what the template writes."""
        call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": {}}}
        asked = {"role": "user", "content": PLAIN}
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        result = {"role": "tool", "name": "look", "tool_call_id": "call00001", "content": RESULT}
        return RESULT in self.render((asked, called, result), True)

    def _put_before(self) -> list[int]:
        """The special tokens that the tokenizer writes before a text."""
        bare, whole = self.encode("a"), self.tokenizer("a")["input_ids"]
        starts = (i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        return list(whole[: next(starts, 0)])

    def _tail(self, messages: Sequence[Message], whole: str, tools: Sequence[Tool] = ()) -> str:
        """What the template writes after the content of the last message, which is the assistant's."""
        if messages[-1].get("tool_calls"):  # whose place is the template's to choose; what ends the turn is not
            messages = (*messages[:-1], {"role": "assistant", "content": PLAIN})
            whole = self.render(messages, False, tools)
        asked, content = self.render(messages[:-1], True, tools), str(messages[-1]["content"])
        if whole.startswith(asked):
            body = whole[len(asked) :]
            for said in (content, content.strip()):
                if body.startswith(said):
                    return body[len(said) :]
            whole = body
        marker = self.tokenizer.eos_token
        return whole[whole.rfind(marker) :] if marker and marker in whole else ""


def _as_json(message: Message) -> Message:
    """The message with the arguments of its tool calls as JSON."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message.get("tool_calls") or ()
    ]
    return {**message, "tool_calls": calls} if calls else message
