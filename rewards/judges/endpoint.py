"""A chat model behind an OpenAI-compatible endpoint, asked for verdicts: a provider's, or a local one served by vLLM.

The same request is made once: answers are kept on disk where the config says so, and a request that is under way
serves everybody who asks it. What cannot be read is not kept.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import Field, field_validator

from rlft.rewards.judges.cache import Cache, key_of
from rlft.rewards.judges.line import Server, Url, in_background

T = TypeVar("T")
OWN = ("model", "messages", "temperature", "max_tokens", "logprobs", "top_logprobs", "n", "stream")
MILLION = 1_000_000
LENGTH = 1024  # tokens of a reply


class Endpoint(Server):
    """A judge: which model, where it is served, and how it is sampled."""

    url: Url = Field(description="Up to and with /v1; /chat/completions is added.")
    model: str = Field(min_length=1, description="The model's name, as the server knows it.")
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="In a weighted mean or median of judges.")
    temperature: float | None = Field(default=0.0, ge=0, description="None: not sent, for models that refuse it.")
    max_tokens: int | None = Field(
        default=None,
        ge=0,
        description="Of a reply, reasoning included. None: 1 in the mode yes_probability, else 1024. 0: not sent, for "
        "models that want another name for it, in `extra`.",
    )
    extra: dict[str, Any] = Field(
        default_factory=dict, description="Further keys of the request's body: top_p, seed, response_format, ..."
    )
    price_in: float = Field(default=0.0, ge=0, description="Of a million prompt tokens, in any currency.")
    price_out: float = Field(default=0.0, ge=0, description="Of a million tokens of replies.")

    def longest(self, likeliest: bool = False) -> int:
        """Tokens of a reply at most, as it is asked; 0 where nothing is said of it. likeliest: log-probs are read."""
        return self.max_tokens if self.max_tokens is not None else 1 if likeliest else LENGTH

    @field_validator("extra")
    @classmethod
    def _no_own(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if taken := [key for key in extra if key in OWN]:
            raise ValueError(f"{', '.join(taken)}: set by other keys, or by the mode; remove it here")
        return extra


@dataclass
class Reply:
    """What a model said. finish: why it stopped. tokens: of each, itself and log-probs of the likeliest there."""

    text: str
    finish: str = "stop"
    tokens: Sequence[tuple[str, Sequence[tuple[str, float]]]] = ()


@dataclass
class Tally:
    """What requests cost. kept: answered without a request. uncounted: replies that did not say how long they are."""

    requests: int = 0
    kept: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    uncounted: int = 0

    def count(self, usage: Any, endpoint: Endpoint) -> None:
        """One reply, with the server's own count of its tokens."""
        self.requests += 1
        try:
            read, said = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        except (KeyError, TypeError, ValueError):
            self.uncounted += 1
            return
        self.tokens_in += read
        self.tokens_out += said
        self.cost += (read * endpoint.price_in + said * endpoint.price_out) / MILLION


class Unreadable(Exception):
    """A reply that holds no verdict of the form that was asked for."""


@dataclass
class Asked:
    """An endpoint in use. Raises InputError at once where its key is missing. cache: where replies are kept."""

    endpoint: Endpoint
    cache: Cache | None = None
    _under_way: dict[str, asyncio.Task[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._line = self.endpoint.line()

    async def ask(
        self, messages: Sequence[Mapping[str, str]], read: Callable[[Reply], T], tally: Tally, likeliest: int = 0
    ) -> T:
        """The verdict that `read` finds in the reply to `messages`.

        likeliest: how many log-probs of every token are asked for. Raises Unreadable where `read` does, and what
        `Line.post` raises.
        """
        endpoint = self.endpoint
        length = endpoint.longest(likeliest > 0)
        body: dict[str, Any] = {"model": endpoint.model, "messages": list(messages)}
        body |= {"temperature": endpoint.temperature} if endpoint.temperature is not None else {}
        body |= {"max_tokens": length} if length else {}
        body |= {"logprobs": True, "top_logprobs": likeliest} if likeliest else {}
        body |= endpoint.extra
        return await in_background(self._shared(body, read, tally))

    async def _shared(self, body: dict[str, Any], read: Callable[[Reply], T], tally: Tally) -> T:
        """One request for all who ask the same at the same time."""
        key = key_of(self.endpoint.url, body)
        task = self._under_way.get(key)
        if task is None:
            task = self._under_way[key] = asyncio.create_task(self._answer(key, body, read, tally))
            task.add_done_callback(lambda done: self._landed(key, done))
        else:
            tally.kept += 1
        return await asyncio.shield(task)

    def _landed(self, key: str, done: asyncio.Task[Any]) -> None:
        del self._under_way[key]
        if not done.cancelled():
            done.exception()  # seen, also where nobody waits any more

    async def _answer(self, key: str, body: dict[str, Any], read: Callable[[Reply], T], tally: Tally) -> T:
        if self.cache is not None:
            kept = await asyncio.to_thread(self.cache.get, key)
            if kept is not None:
                tally.kept += 1
                return read(_reply(kept))
        answer = await self._line.send("chat/completions", json.dumps(body).encode())
        tally.count(answer.get("usage") if isinstance(answer, dict) else None, self.endpoint)
        plain = _plain(answer)
        verdict = read(_reply(plain))
        if self.cache is not None:
            first = await asyncio.to_thread(self.cache.put, key, plain)
            verdict = verdict if first == plain else read(_reply(first))  # another process was faster
        return verdict


def _plain(answer: Any) -> dict[str, Any]:
    """What is kept of an answer. Raises Unreadable where it has not the form of a chat completion."""
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] or ""
        content = (choice.get("logprobs") or {}).get("content") or []
        tokens = [[one["token"], [[top["token"], top["logprob"]] for top in one["top_logprobs"]]] for one in content]
        return {"text": str(text), "finish": str(choice.get("finish_reason")), "tokens": tokens}
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        shown = json.dumps(answer)[:500]
        raise Unreadable(
            f"the server's answer is no chat completion ({type(error).__name__}: {error}): {shown}"
        ) from error


def _reply(plain: Mapping[str, Any]) -> Reply:
    return Reply(plain["text"], plain["finish"], [(token, top) for token, top in plain["tokens"]])
