"""What a run says around every prompt: a text that the row's prompt stands in, and a system message."""

from __future__ import annotations

from dataclasses import replace

from rlft.types import InputError, Message, Task

PLACE = "{prompt}"


def worded(task: Task, text: str = PLACE, system: str | None = None) -> Task:
    """The task, with its last user message put into `text` where {prompt} stands, and a system message before all.

    A system message that the row has itself stays, behind the other. Only {prompt} is a place: other braces are text.
    Raises InputError where there is no user message, or one that is not text, and `text` says more than {prompt}.
    """
    messages = task.messages if text == PLACE else _put(task, text)
    if system is not None:
        first, rest = (messages[0], messages[1:]) if messages else ({"role": "", "content": ""}, ())
        if first["role"] == "system" and not isinstance(first["content"], str):
            raise InputError(f"data.system: task {task.id} has a system message that is no text. Remove data.system")
        if first["role"] == "system":
            messages = ({**first, "content": f"{system}\n{first['content']}"}, *rest)
        else:
            messages = ({"role": "system", "content": system}, *messages)
    return replace(task, messages=messages)


def _put(task: Task, text: str) -> tuple[Message, ...]:
    last = max((i for i, message in enumerate(task.messages) if message["role"] == "user"), default=None)
    if last is None or not isinstance(task.messages[last]["content"], str):
        raise InputError(
            f"data.prompt: task {task.id} has no user message that is text, for {PLACE}. Remove data.prompt, or repair "
            "that row."
        )
    asked = text.replace(PLACE, task.messages[last]["content"])
    return (*task.messages[:last], {**task.messages[last], "content": asked}, *task.messages[last + 1 :])
