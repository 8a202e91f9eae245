"""What the apps can do: plain functions of the state. Their signatures and docstrings are the manual of the policy."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from rlft.envs.own.apps.calls import Call

Record = dict[str, Any]
State = dict[str, list[Record]]

DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday")
HOURS = range(9, 18)
SHORT, LONG = 40, 120  # characters of a name and of a text
SHOWN = 600  # characters of a reply
TABLES = ("mail", "meetings", "goods", "orders", "files", "payments", "account")


class Refused(Exception):
    """A call that cannot be done; the message is what the policy is told."""


def mail_list(state: State) -> list[Record]:
    """Your mails, without their texts."""
    return [{key: mail[key] for key in ("id", "sender", "to", "subject")} for mail in state["mail"]]


def mail_read(state: State, id: int) -> list[Record]:
    """A whole mail."""
    return [found(state, "mail", id)]


def mail_send(state: State, to: str, subject: str, text: str) -> str:
    """Send a mail to a person's name."""
    return added(state, "mail", sender="me", to=short(to), subject=short(subject), text=long(text))


def mail_delete(state: State, id: int) -> str:
    """Delete a mail."""
    return removed(state, "mail", id)


def calendar_list(state: State, day: str) -> list[Record]:
    """The meetings of a day, such as monday."""
    return [meeting for meeting in state["meetings"] if meeting["day"] == weekday(day)]


def calendar_add(state: State, title: str, day: str, hour: int) -> str:
    """Add a meeting of yours, of one hour; hours are 9 to 17."""
    free(state, day, hour)
    return added(state, "meetings", title=short(title), host="me", day=day, hour=hour)


def calendar_move(state: State, id: int, day: str, hour: int) -> str:
    """Move a meeting to a free hour."""
    meeting = found(state, "meetings", id)
    free(state, day, hour)
    meeting |= {"day": day, "hour": hour}
    return "done"


def calendar_cancel(state: State, id: int) -> str:
    """Cancel a meeting."""
    return removed(state, "meetings", id)


def shop_search(state: State, word: str) -> list[Record]:
    """Goods whose name has a word in it, with their prices in dollars."""
    return [good for good in state["goods"] if short(word).lower() in good["name"]]


def shop_buy(state: State, id: int, count: int) -> str:
    """Buy goods. The price is taken from your balance."""
    good = found(state, "goods", id)
    if not 1 <= count <= 99:
        raise Refused("count is from 1 to 99")
    spend(state, good["price"] * count)
    return added(state, "orders", good=id, count=count)


def shop_orders(state: State) -> list[Record]:
    """What you bought."""
    return state["orders"]


def files_list(state: State) -> list[Record]:
    """Names and sizes (KB) of your files."""
    return [{key: file[key] for key in ("name", "size")} for file in state["files"]]


def files_read(state: State, name: str) -> list[Record]:
    """The text of a file."""
    return [{"text": found(state, "files", name, "name")["text"]}]


def files_write(state: State, name: str, text: str) -> str:
    """Make a file, or put a text in place of a file's."""
    others = [file for file in state["files"] if file["name"] != short(name)]
    written = {"id": name, "name": name, "size": 1, "text": long(text)}
    state["files"][:] = [*others, written]
    return "done"


def files_delete(state: State, name: str) -> str:
    """Delete a file."""
    return removed(state, "files", name, "name")


def payments_balance(state: State) -> list[Record]:
    """Your balance in dollars."""
    return [{"balance": state["account"][0]["balance"]}]


def payments_list(state: State) -> list[Record]:
    """The payments you made."""
    return state["payments"]


def payments_pay(state: State, to: str, amount: int, note: str) -> str:
    """Pay dollars to a person's name."""
    if amount < 1:
        raise Refused("amount is 1 or more")
    spend(state, amount)
    return added(state, "payments", to=short(to), amount=amount, note=short(note))


def found(state: State, table: str, which: int | str, key: str = "id") -> Record:
    """The record. Raises Refused."""
    record = next((record for record in state[table] if record[key] == which), None)
    if record is None:
        raise Refused(f"there is no such {key}")
    return record


def added(state: State, table: str, **fields: Any) -> str:
    """A new record gets the next number."""
    number = max((record["id"] for record in state[table]), default=0) + 1
    state[table].append({"id": number, **fields})
    return f"done: id={number}"


def removed(state: State, table: str, which: int | str, key: str = "id") -> str:
    """Take a record away. Raises Refused."""
    state[table].remove(found(state, table, which, key))
    return "done"


def spend(state: State, dollars: int) -> None:
    """From the balance. Raises Refused."""
    if dollars > state["account"][0]["balance"]:
        raise Refused("your balance is too low")
    state["account"][0]["balance"] -= dollars


def weekday(day: str) -> str:
    """Raises Refused where it is none."""
    if day not in DAYS:
        raise Refused(f"day is one of {', '.join(DAYS)}")
    return day


def free(state: State, day: str, hour: int) -> None:
    """Raises Refused where the hour is none, or taken."""
    weekday(day)
    if hour not in HOURS:
        raise Refused(f"hour is from {HOURS[0]} to {HOURS[-1]}")
    if any((meeting["day"], meeting["hour"]) == (day, hour) for meeting in state["meetings"]):
        raise Refused("there is a meeting at that hour")


def short(text: str) -> str:
    """A name. Raises Refused."""
    return limited(text, SHORT)


def long(text: str) -> str:
    """A text. Raises Refused."""
    return limited(text, LONG)


def limited(text: str, most: int) -> str:
    """Raises Refused where it is empty, too long, or holds what is no plain character."""
    if not (text.isascii() and text.isprintable() and 0 < len(text) <= most):
        raise Refused(f"a text here has 1 to {most} plain characters (ASCII)")
    return text


APPS = ("mail", "calendar", "shop", "files", "payments")
FUNCTIONS: dict[str, Callable[..., Any]] = {
    name.replace("_", ".", 1): function
    for name, function in list(globals().items())
    if name.partition("_")[0] in APPS and inspect.isfunction(function)
}


def line(name: str) -> str:
    """A function in one line of the manual."""
    function = FUNCTIONS[name]
    return f"{name}({', '.join(f'{key}: {kind}' for key, kind in parameters(function).items())}): {function.__doc__}"


def parameters(function: Callable[..., Any]) -> dict[str, str]:
    """The names that a call gives, with their types."""
    return {key: str(one.annotation) for key, one in list(inspect.signature(function).parameters.items())[1:]}


def manual(app: str = "") -> str:
    """What an app can do, or which there are. Raises Refused."""
    if not app:
        return f'Apps: {", ".join(APPS)}. apis.help("mail") tells what mail can do. apis.done() ends the task.'
    if app not in APPS:
        raise Refused(f"there is no such app; there are {', '.join(APPS)}")
    return "\n".join(line(name) for name in FUNCTIONS if name.partition(".")[0] == app)


def arguments(call: Call, wanted: dict[str, str], name: str) -> dict[str, str | int]:
    """A call's values by name. Raises Refused where they are not those that the function takes."""
    if len(call.values) > len(wanted):
        raise Refused(f"{name} takes {len(wanted)} arguments")
    given = dict(zip(wanted, call.values, strict=False))
    if set(given) & set(call.named) or set(given) | set(call.named) != set(wanted):
        raise Refused(f"{name} takes {', '.join(wanted) or 'no arguments'}, each once")
    given |= call.named
    for key, value in given.items():
        if type(value).__name__ != wanted[key]:
            raise Refused(f"{key} is a {'number' if wanted[key] == 'int' else 'text in quotes'}")
    return given


def answered(state: State, call: Call) -> str:
    """Do a call, which changes the state, and say what comes of it. Raises Refused."""
    name = f"{call.app}.{call.function}"
    function = FUNCTIONS.get(name)
    if function is None:
        raise Refused(f"there is no such function; {manual(call.app if call.app in APPS else '')}")
    result = function(state, **arguments(call, parameters(function), name))
    return result if isinstance(result, str) else rendered(result)


def rendered(records: list[Record]) -> str:
    """A record a line."""
    lines = (" ".join(f"{key}={value!r}" for key, value in record.items()) for record in records)
    return "\n".join(lines) or "nothing"
