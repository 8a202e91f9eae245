"""Tasks, actions, turns and errors as plain values, for environments that live in another process or machine."""

from __future__ import annotations

import json
import reprlib
import traceback
from collections.abc import Mapping
from typing import Any

from rlft.envs.base import Action
from rlft.types import InputError, RunError, Task, Turn

TRACE = 2000  # characters of a traceback that are kept, from its end
FIELDS = ("reward", "done", "rewrite", "role")
MEANT: dict[str, type[Exception]] = {"InputError": InputError, "RunError": RunError, "TimeoutError": TimeoutError}


def failure(error: BaseException) -> dict[str, str]:
    """What there is to say of an error."""
    trace = "".join(traceback.format_exception(error))[-TRACE:]
    return {"error": type(error).__name__, "said": str(error), "trace": trace}


def meant(plain: Mapping[str, Any]) -> Exception:
    """The error that was written, of the same name and with the same message. Its notes have its traceback.

    Only InputError, RunError and TimeoutError are the class that they were; the class of any other need not exist here.
    """
    name = str(plain["error"])
    error = MEANT.get(name, type(name, (Exception,), {}))(str(plain["said"]))
    if plain.get("trace"):
        error.add_note(f"where the environment is:\n{plain['trace']}")
    return error


def task(own: Task) -> dict[str, Any]:
    """A task as JSON has it. Raises InputError where a column is nothing that JSON has."""
    info = {str(name): _column(value, own, str(name)) for name, value in own.info.items()}
    return {"id": own.id, "messages": [dict(message) for message in own.messages], "info": info}


def read_task(plain: Mapping[str, Any]) -> Task:
    """Raises KeyError, TypeError or ValueError where it is none."""
    return Task(str(plain["id"]), tuple(map(dict, plain["messages"])), dict(plain["info"]))


def read_action(plain: Mapping[str, Any]) -> Action:
    """Raises KeyError or TypeError where it is none."""
    return Action(str(plain["text"]), str(plain["finish"]), str(plain["raw"]))


def turn(own: Any) -> dict[str, Any]:
    """What an environment replied. Raises TypeError where that is no turn, or nothing that JSON has."""
    if not isinstance(own, Turn):
        raise TypeError(f"step returned {reprlib.repr(own)}, which is no Turn")
    more = {"messages": list(map(dict, own.messages)), "said": dict(own.said) if own.said is not None else None}
    pays = {str(role): amount for role, amount in own.pays.items()}
    return plain({name: getattr(own, name) for name in FIELDS} | more | {"metrics": dict(own.metrics), "pays": pays})


def read_turn(plain: Mapping[str, Any]) -> Turn:
    """Raises KeyError, TypeError, ValueError or AttributeError where it is none."""
    more = {"messages": tuple(plain["messages"]), "said": plain["said"], "metrics": plain["metrics"]}
    pays = {int(role): amount for role, amount in plain.get("pays", {}).items()}
    return Turn(**{name: plain[name] for name in FIELDS}, **more, pays=pays)


def plain(value: Any) -> Any:
    """A value as JSON has it; arrays and numbers of NumPy become lists and numbers. Raises TypeError or ValueError."""
    return json.loads(json.dumps(value, default=_odd))


def _odd(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is nothing that JSON has")


def _column(value: Any, own: Task, name: str) -> Any:
    try:
        return plain(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"task '{own.id}': column '{name}' cannot be sent to the server of the environment ({error}). Turn it into "
            "text or numbers in the data, or play in the run's own process."
        ) from error
