"""Agents as people write them, against the openai package. They know nothing of rlft, and start as programs too."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

from openai import APIStatusError, AsyncOpenAI, OpenAI

TOOL: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum of two numbers.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
    },
}
SYSTEM = {"role": "system", "content": "Sum."}


def calculates(task: Any, base_url: str, api_key: str, model: str, turns: int = 4) -> float:
    """Lets the model call a tool until it answers in words; pays 0.5 for every call."""
    client = OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    messages: list[Any] = [SYSTEM, *map(dict, task.messages)]
    used = 0
    for _ in range(turns):
        said = client.chat.completions.create(model=model, messages=messages, tools=[TOOL], max_tokens=90)
        message: Any = said.choices[0].message
        messages.append(message)
        if not message.tool_calls:
            break
        for call in message.tool_calls:
            given = json.loads(call.function.arguments)
            used += 1
            messages.append({"role": "tool", "tool_call_id": call.id, "content": str(given["a"] + given["b"])})
    return 0.5 * used


def talks(task: Any, base_url: str, api_key: str, model: str, turns: int = 3, **more: Any) -> dict[str, Any]:
    """Says the task's word again and again; every turn may ask for `more`."""
    client = OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    messages: list[Any] = [*map(dict, task.messages)]
    for i in range(turns):
        said = client.chat.completions.create(model=model, messages=messages, **more)
        messages += [said.choices[0].message.model_dump(), {"role": "user", "content": f"{task.id} {i}"}]
    return {"reward": 1.0, "metrics": {"turns": turns}}


async def streams(task: Any, base_url: str, api_key: str) -> dict[str, Any]:
    """Reads its answers piece by piece, in an event loop of its own."""
    async with AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        messages: list[Any] = [*map(dict, task.messages)]
        used = 0
        for _ in range(2):
            text, finish = "", ""
            async for piece in await client.chat.completions.create(
                model="policy", messages=messages, stream=True, stream_options={"include_usage": True}
            ):
                if piece.usage is not None:
                    used += piece.usage.completion_tokens
                for choice in piece.choices:
                    text += choice.delta.content or ""
                    finish = choice.finish_reason or finish
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "More."}]
    return {"reward": float(finish in ("stop", "length")), "metrics": {"used": used}}


def forgets(task: Any, base_url: str, api_key: str) -> None:
    """Asks twice, and has changed what was said in between."""
    client = OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    first: list[Any] = [*map(dict, task.messages)]
    client.chat.completions.create(model="policy", messages=first)
    changed: list[Any] = [*first, {"role": "assistant", "content": "Nothing."}, {"role": "user", "content": "Again."}]
    client.chat.completions.create(model="policy", messages=changed)


def errs(task: Any, base_url: str, api_key: str, **asked: Any) -> dict[str, Any]:
    """Asks for what cannot be had, then for what can."""
    client = OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    messages: list[Any] = [*map(dict, task.messages)]
    try:
        client.chat.completions.create(**{"model": "policy", "messages": messages, **asked})
    except APIStatusError as error:
        body: Any = error.body
        client.chat.completions.create(model="policy", messages=messages)
        return {"reward": float(error.status_code), "metrics": {body["param"] or "none": 1.0}}
    return {"reward": 0.0}


def crashes(task: Any, base_url: str, api_key: str) -> None:
    """Fails after its first answer."""
    OpenAI(base_url=base_url, api_key=api_key).chat.completions.create(model="policy", messages=list(task.messages))
    raise ValueError("the agent has a bug")


def hangs(task: Any, base_url: str, api_key: str) -> None:
    """Never comes back."""
    OpenAI(base_url=base_url, api_key=api_key).chat.completions.create(model="policy", messages=list(task.messages))
    time.sleep(30)


def persists(task: Any, base_url: str, api_key: str, note: str) -> None:
    """Asks on and on, and notes the error that ends it."""
    client = OpenAI(base_url=base_url, api_key=api_key)
    messages: list[Any] = [*map(dict, task.messages)]
    try:
        while True:
            said = client.chat.completions.create(model="policy", messages=messages)
            messages += [said.choices[0].message, {"role": "user", "content": "On."}]
    except APIStatusError as error:
        with open(f"{note}.new", "w") as file:
            file.write(f"{error.status_code} {error.code}")
        os.replace(f"{note}.new", note)


def silent(task: Any, base_url: str, api_key: str) -> float:
    """Asks nothing."""
    return 1.0


def unaware() -> None:
    """Knows its endpoint from the environment alone; a verdict is posted."""
    client = OpenAI(max_retries=0)
    task = json.load(sys.stdin) if not sys.stdin.closed else {}
    said = client.chat.completions.create(model=os.environ["OPENAI_MODEL"], messages=task["messages"])
    print(said.choices[0].message.content)
    client.post("/episodes/current/reward", body={"reward": 0.25, "metrics": {"posted": 1}}, cast_to=object)


def printing(task: Any) -> dict[str, float]:
    """The same as a function that takes no endpoint, and prints what looks like a verdict."""
    client = OpenAI(max_retries=0)
    client.chat.completions.create(model="policy", messages=list(task.messages))
    print(99)
    return {"reward": 0.75}


async def branches(task: Any, base_url: str, api_key: str) -> None:
    """Leads two conversations in turn."""
    async with AsyncOpenAI(base_url=base_url, api_key=api_key, max_retries=0) as client:
        talks: list[list[Any]] = [[{"role": "user", "content": name}] for name in ("one", "two")]
        for _ in range(2):
            for messages in talks:
                said = await client.chat.completions.create(model="policy", messages=messages)
                messages += [said.choices[0].message.model_dump(), {"role": "user", "content": "more"}]
            await asyncio.sleep(0)


def varied(task: Any, base_url: str, api_key: str) -> float:
    """A conversation, a fresh one that is streamed, and the first again; pays the share of early letters in it all."""
    client = OpenAI(base_url=base_url, api_key=api_key, max_retries=0)
    messages: list[Any] = [SYSTEM, {"role": "user", "content": task.id}]
    heard = []
    for turn in range(3):
        said = client.chat.completions.create(model="policy", messages=messages).choices[0].message
        messages += [said, {"role": "user", "content": "More."}]
        heard.append(said.content or "")
        if turn == 1:
            fresh: Any = [SYSTEM, {"role": "user", "content": f"Sum up: {heard[0]}"}]
            pieces = client.chat.completions.create(model="policy", messages=fresh, stream=True)
            heard += [piece.choices[0].delta.content or "" for piece in pieces]
    text = "".join(heard).lower()
    return sum(letter in "abcdefghijklm" for letter in text) / max(1, len(text))


if __name__ == "__main__":
    unaware()
