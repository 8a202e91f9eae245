"""The environment that is the user's own agent, which asks the policy through an OpenAI client and knows nothing else.

The agent runs beside the episode. Its first request is what opens it, the policy's answer is the response to the
request, and what the agent asks next is the environment's reply: new messages where it goes on with the conversation,
else a history of its own, which is a new sample. So everything that holds for episodes holds for agents: sampled tokens
are kept as they are, limits, failures, rewards. The idea of training behind an endpoint is that of AReaL
(arXiv:2505.24298) and Agent Lightning (arXiv:2508.03680), where a proxy records what passes; here the endpoint is the
episode itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from pydantic import Field, model_validator

from rlft.envs.agent_chat import Answer, Asked, Refused, spoken
from rlft.envs.agent_endpoint import MODEL, Desk, Endpoint, Pending, paid
from rlft.envs.agent_start import Seat, Start, of_command, of_function
from rlft.envs.base import Action, Env, Outside
from rlft.envs.custom import PATH
from rlft.envs.tools.formats import OWN, Format, told_by
from rlft.types import Completion, Message, Sampling, Task, Turn

TOOLLESS = "tools: this model's chat template shows no tools; set model.chat_template to one that does"


class AgentConfig(Outside):
    """Your own agent, which asks the policy through an OpenAI client."""

    type: Literal["agent"] = "agent"
    path: str | None = Field(
        default=None, pattern=PATH, description="module:function of (task, base_url, api_key, model), async or not"
    )
    command: tuple[str, ...] = Field(
        default=(), description="or a program, word by word; OPENAI_BASE_URL and OPENAI_API_KEY tell it where to ask"
    )
    options: dict[str, Any] = Field(default_factory=dict, description="further keywords of the function")
    place: Literal["here", "process"] = Field(
        default="here", description="of the function: a thread of this process, or a process of its own"
    )
    processes: int = Field(default=32, ge=1, description="programs that run at once; others wait")
    format: Literal["auto", "hermes", "llama", "mistral", "plain"] = Field(
        default="auto", description="how the model writes the calls of tools; auto: as its chat template shows them"
    )
    host: str = Field(default="127.0.0.1", description="where the endpoint listens; 0.0.0.0 for other machines too")
    port: int = Field(default=0, ge=0, le=65535, description="of the endpoint; 0: a free one")
    address: str | None = Field(
        default=None,
        pattern=r"^https?://[^@/]+(/[^@]*)?$",
        description="the endpoint's address as agents elsewhere reach it, such as http://host:9000/v1",
    )
    most_answers: int = Field(default=8, ge=1, description="answers of one episode that the context has room for")
    most_said: int = Field(
        default=1024, ge=0, description="tokens of the agent's own messages and tools that the context has room for"
    )

    @model_validator(mode="after")
    def _one_way(self) -> AgentConfig:
        if (self.path is None) == (not self.command):
            raise ValueError("say either path=module:function or command=[program, ...], which of them is the agent")
        return self

    @property
    def answers(self) -> int:
        return self.most_answers

    def build(self) -> Callable[[Task], Env]:
        """Without a model's template `auto` reads no calls, and requests with tools are refused. Raises InputError."""
        return self.build_for(None, "")

    def build_for(self, tokenizer: Any, template: str) -> Callable[[Task], Env]:
        """As `build`, for one model. template: its chat template, empty for plain text. Raises InputError."""
        calls, endpoint = reading(self.format, template), Endpoint(self.host, self.port)
        if self.path is not None and self.place == "here":
            start = of_function(self.path, self.options)
        else:
            start = of_command(self.command, self.path, self.options, self.processes)
        return partial(AgentEnv, endpoint, start, calls, self.address)


def reading(name: str, template: str) -> Format | None:
    """How calls are read; None where the template shows no tools, so that none can be called. Raises InputError."""
    found = told_by(template) if name == "auto" else name
    return None if name == "auto" and found == "plain" else OWN[found]


class AgentEnv:
    """One episode of an agent. tools: those that its newest request lists."""

    def __init__(self, endpoint: Endpoint, start: Start, calls: Format | None, address: str | None, task: Task) -> None:
        self.tools: tuple[Any, ...] = ()
        self._endpoint = endpoint
        self._start = start
        self._format = calls
        self._address = address
        self._task = task
        self._key = ""
        self._slot: Any = None
        self._counts = dict.fromkeys(("requests", "histories", "overridden"), 0.0)
        self._talks: list[tuple[tuple[Message, ...], tuple[Any, ...]]] = []
        self._called = 0
        self._used: tuple[int, int] | None = None
        self._unheard: tuple[Asked, Answer] | None = None

    async def ready(self) -> None:
        """Wait until one more agent may run."""
        self._slot = await self._start.slot()

    async def reset(self) -> tuple[Message, ...]:
        """Start the agent, and wait for its first request. Raises what the agent raises."""
        if self._slot is None:
            await self.ready()
        self._desk = Desk()
        url, self._key = self._endpoint.open(self._desk)
        seat = Seat(self._address or url, self._key, MODEL)
        self._agent = asyncio.ensure_future(self._start.run(self._task, seat))
        pending = await self._next()
        if pending is None:
            self._agent.result()
            raise RuntimeError("the agent returned before it asked the policy anything")
        self._hear(pending)
        return pending.asked.messages

    @property
    def asked(self) -> Asked:
        """The request that waits for its answer."""
        return self._pending.asked

    def narrow(self, sampling: Sampling) -> Sampling:
        """See `rlft.player.Client`: fewer tokens and further stops, as the client asks; the rest is the run's."""
        asked = self.asked
        self._counts["overridden"] += asked.differs(sampling)
        most = min(sampling.max_tokens, asked.most or sampling.max_tokens)
        return replace(sampling, max_tokens=most, stop=(*sampling.stop, *asked.stop))

    def sampled(self, prompt: int, completion: Completion) -> None:
        """See `rlft.player.Client`."""
        self._used = (prompt, len(completion.tokens))

    async def step(self, action: Action) -> Turn:
        """Answer the request, and wait for the next one, or for the agent's end. Raises what the agent raises."""
        before = self.asked
        answer = self._read(action)
        if not self._pending.give(answer):
            self._unheard = before, answer
        self._talks.append(((*before.messages, answer.message), before.tools))
        pending = await self._next()
        reward, metrics = self._desk.take()
        if pending is None:
            more, own = _verdict(self._agent.result())
            return Turn((), reward + more, True, said=answer.message, metrics=self._counts | metrics | own)
        new = self._hear(pending)
        if action.finish != "stop":  # such an answer ends an episode that is only appended to
            new = ()
        return Turn(
            new or pending.asked.messages,
            reward,
            False,
            rewrite=not new,
            said=answer.message,
            metrics=self._counts | metrics,
        )

    async def close(self) -> None:
        """Refuse what it asks from now on, and end it: a program is killed, a thread is left to itself."""
        if self._key:
            self._endpoint.close(self._key)
            self._desk.close()
            self._agent.cancel()
            await asyncio.wait({self._agent})
            if not self._agent.cancelled():
                self._agent.exception()
        if self._slot is not None:
            slot, self._slot = self._slot, None
            slot.release()

    def _hear(self, pending: Pending) -> tuple[Message, ...]:
        """Take up a request. What it adds to the newest conversation; nothing where it goes on with an older one, or
        with none: it has changed what was said, or shows other tools.
        """
        self._pending, asked = pending, pending.asked
        self._counts["requests"] += 1
        self.tools = asked.tools
        found = next((i for i in reversed(range(len(self._talks))) if _goes_on(*self._talks[i], asked)), None)
        if found is None:
            self._counts["histories"] += 1
            return ()
        newest = found == len(self._talks) - 1
        said, _ = self._talks.pop(found)
        return asked.messages[len(said) :] if newest else ()

    async def _next(self) -> Pending | None:
        """The next request that somebody waits for; None where the agent has ended."""
        while True:
            arrived = asyncio.ensure_future(self._desk.arrived.get())
            try:
                await asyncio.wait({arrived, self._agent}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                arrived.cancel()
            if self._agent.done():
                return None
            pending = arrived.result()
            if pending.answer.cancelled():
                continue
            if pending.asked.tools and self._format is None:
                pending.refuse(Refused(TOOLLESS, 400, "tools", "unsupported_parameter"))
                continue
            unheard, self._unheard = self._unheard, None
            if unheard and unheard[0].same(pending.asked) and pending.give(unheard[1]):
                continue  # a client that asks once more, since the line broke
            return pending

    def _read(self, action: Action) -> Answer:
        """What was said, up to the first text that the client stops at, with its calls read out."""
        asked = self.asked
        text, raw = _until(action.text, asked.stop), _until(action.raw, asked.stop)
        before, calls = self._format.calls(raw, text) if self._format and asked.calls else (text, [])
        message = spoken(before, calls, asked, self._called)
        if "tool_calls" not in message:
            message = {**message, "content": text}
        self._called += len(message.get("tool_calls", ()))
        finish = "tool_calls" if "tool_calls" in message and action.finish == "stop" else action.finish
        return Answer(message, finish, *(self._used or (None, None)))


def _goes_on(said: tuple[Message, ...], tools: tuple[Any, ...], asked: Asked) -> bool:
    """A request says something new after all that was said."""
    n = len(said)
    return n < len(asked.messages) and asked.messages[:n] == said and asked.tools == tools


def _until(text: str, stops: tuple[str, ...]) -> str:
    """The text before the first of the stops."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _verdict(value: Any) -> tuple[float, dict[str, float]]:
    """What an agent that returned has paid; text or nothing pays nothing. Raises TypeError."""
    return (0.0, {}) if value is None or isinstance(value, str) else paid(value)
