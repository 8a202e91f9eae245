"""Worlds and tasks of a seed. Each task has a worked solution: what it changes is what has to change, and nothing else.

Level 1 takes one change or one look in one app, level 2 something that is to be found out first, level 3 several
changes in more than one app.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rlft.envs.own.apps.api import DAYS, HOURS, State, answered
from rlft.envs.own.apps.calls import call_in

PEOPLE = ("ann", "bob", "carla", "dan", "eva", "finn", "grete", "hugo")
THINGS = ("lamp", "chair", "pen", "cup", "clock", "rug")
COLOURS = ("red", "blue", "green", "black")
TITLES = ("review", "planning", "lunch", "interview", "training", "retro")
FILES = ("notes.txt", "plan.txt", "recipe.txt", "ideas.txt", "draft.txt", "old.tmp", "cache.tmp", "log.tmp")
SUBJECTS = ("hello", "weather", "holiday", "news")
SENTENCES = ("See you soon.", "All is well here.", "It will rain.", "The train was late.")


@dataclass(frozen=True)
class Asked:
    """A task: what it says, calls that do it, and the answer, where it asks something."""

    text: str
    calls: tuple[str, ...]
    answer: str | None = None


@dataclass(frozen=True)
class Made:
    """A task in its world. before, after: the states."""

    asked: Asked
    before: State
    after: State


def state_of(chance: random.Random) -> State:
    """A world with something in every app."""
    people = chance.sample(PEOPLE, 4)
    mails = [
        {"sender": name, "to": "me", "subject": chance.choice(SUBJECTS), "text": chance.choice(SENTENCES)}
        for name in people[:3]
    ]
    hours = chance.sample([(day, hour) for day in DAYS for hour in (9, 10, 11, 14)], 5)
    titles = chance.sample(TITLES, 5)
    meetings = [
        {"title": title, "host": chance.choice(people), "day": day, "hour": hour}
        for title, (day, hour) in zip(titles, hours, strict=True)
    ]
    goods = [
        {"name": f"{colour} {thing}", "price": price}
        for thing in chance.sample(THINGS, 3)
        for colour, price in zip(chance.sample(COLOURS, 2), chance.sample(range(2, 20), 2), strict=True)
    ]
    files = [
        {"name": name, "size": chance.randint(1, 300), "text": chance.choice(SENTENCES)}
        for name in chance.sample(FILES, 5)
    ]
    paid = [{"to": chance.choice(people), "amount": chance.randint(1, 30), "note": "rent"} for _ in range(4)]
    rows: dict[str, list[dict[str, Any]]] = {
        "mail": mails, "meetings": meetings, "goods": goods, "orders": [], "payments": paid,
        "account": [{"balance": 1000}],
    }  # fmt: skip
    state = {table: [{"id": i, **row} for i, row in enumerate(some, 1)] for table, some in rows.items()}
    return state | {"files": [{"id": file["name"], **file} for file in files]}


def bill(state: State, sender: str, amount: int) -> dict[str, Any]:
    """A mail that asks for money."""
    number = max(mail["id"] for mail in state["mail"]) + 1
    mail = {"id": number, "sender": sender, "to": "me", "subject": "bill", "text": f"Please pay me {amount} dollars."}
    state["mail"].append(mail)
    return mail


def pay(chance: random.Random, state: State) -> Asked:
    """One payment."""
    name, amount = chance.choice(PEOPLE), chance.randint(2, 40)
    return Asked(
        f"Pay {amount} dollars to {name}, with the note 'ticket'.",
        (f'payments.pay(to="{name}", amount={amount}, note="ticket")',),
    )


def delete_file(chance: random.Random, state: State) -> Asked:
    """One file."""
    name = chance.choice(state["files"])["name"]
    return Asked(f"Delete the file {name}.", (f'files.delete(name="{name}")',))


def add_meeting(chance: random.Random, state: State) -> Asked:
    """One meeting, at an hour that is free in every world."""
    day, hour = chance.choice(DAYS), chance.choice((12, 13, 15, 16))
    return Asked(
        f"Put a meeting with the title 'dentist' on {day} at {hour} into my calendar.",
        (f'calendar.add(title="dentist", day="{day}", hour={hour})',),
    )


def price(chance: random.Random, state: State) -> Asked:
    """A question, and nothing to change."""
    good = chance.choice(state["goods"])
    return Asked(
        f"What does the {good['name']} cost in the shop? Answer with the number alone.",
        (f'shop.search(word="{good["name"]}")',),
        str(good["price"]),
    )


def pay_bill(chance: random.Random, state: State) -> Asked:
    """The amount stands in a mail."""
    name, amount = chance.choice(PEOPLE), chance.randint(2, 40)
    mail = bill(state, name, amount)
    return Asked(
        f"{name} sent me a mail with the subject 'bill'. Pay what it asks for to {name}, with the note 'bill'.",
        ("mail.list()", f"mail.read(id={mail['id']})", f'payments.pay(to="{name}", amount={amount}, note="bill")'),
    )


def cheapest(chance: random.Random, state: State) -> Asked:
    """The price stands in the shop."""
    thing, count = chance.choice(state["goods"])["name"].split()[1], chance.randint(1, 3)
    return Asked(
        f"Buy the cheapest {thing}, {count} of it.",
        (f'shop.search(word="{thing}")', f"shop.buy(id={least(state, thing)}, count={count})"),
    )


def least(state: State, thing: str) -> int:
    """The number of the cheapest good of a name."""
    goods = [good for good in state["goods"] if thing in good["name"]]
    return min(goods, key=lambda good: good["price"])["id"]


def move_meeting(chance: random.Random, state: State) -> Asked:
    """The free hour has to be found."""
    meeting = chance.choice(state["meetings"])
    taken = {other["hour"] for other in state["meetings"] if other["day"] == meeting["day"]}
    hour = next(hour for hour in HOURS if hour > meeting["hour"] and hour not in taken)
    return Asked(
        f"Move the meeting '{meeting['title']}' of {meeting['day']} to the next free hour of the same day.",
        (
            f'calendar.list(day="{meeting["day"]}")',
            f'calendar.move(id={meeting["id"]}, day="{meeting["day"]}", hour={hour})',
        ),
    )


def paid_to(chance: random.Random, state: State) -> Asked:
    """A sum over what was paid."""
    name = chance.choice(state["payments"])["to"]
    total = sum(payment["amount"] for payment in state["payments"] if payment["to"] == name)
    return Asked(
        f"How many dollars did I pay to {name} in all? Answer with the number alone.", ("payments.list()",), str(total)
    )


def pay_bills(chance: random.Random, state: State) -> Asked:
    """Every bill, and then the mails."""
    bills = [bill(state, name, chance.randint(2, 40)) for name in chance.sample(PEOPLE, chance.randint(2, 3))]
    calls = ["mail.list()"]
    for mail in bills:
        amount = int(mail["text"].split()[3])
        calls += [
            f"mail.read(id={mail['id']})",
            f'payments.pay(to="{mail["sender"]}", amount={amount}, note="bill")',
            f"mail.delete(id={mail['id']})",
        ]
    text = "Pay every mail with the subject 'bill' to its sender, with the note 'bill', and delete these mails."
    return Asked(text, tuple(calls))


def clear_day(chance: random.Random, state: State) -> Asked:
    """Meetings of a day, and a mail to each host."""
    day = chance.choice(state["meetings"])["day"]
    calls = [f'calendar.list(day="{day}")']
    for meeting in state["meetings"]:
        if meeting["day"] == day:
            calls += [
                f"calendar.cancel(id={meeting['id']})",
                f'mail.send(to="{meeting["host"]}", subject="cancelled", text="{meeting["title"]}")',
            ]
    text = (
        f"Cancel all my meetings of {day}. For each send its host a mail with the subject 'cancelled' and the "
        "meeting's title as its text."
    )
    return Asked(text, tuple(calls))


def shopping(chance: random.Random, state: State) -> Asked:
    """A list in a file."""
    wanted = [(thing, chance.randint(1, 3)) for thing in sorted({good["name"].split()[1] for good in state["goods"]})]
    wanted = chance.sample(wanted, 2)
    text = ", ".join(f"{count} {thing}" for thing, count in wanted)
    state["files"].append({"id": "shopping.txt", "name": "shopping.txt", "size": 1, "text": text})
    calls = ['files.read(name="shopping.txt")']
    for thing, count in wanted:
        calls += [f'shop.search(word="{thing}")', f"shop.buy(id={least(state, thing)}, count={count})"]
    return Asked(
        "Buy what stands in the file shopping.txt, the cheapest of each, and then delete the file.",
        (*calls, 'files.delete(name="shopping.txt")'),
    )


def tidy(chance: random.Random, state: State) -> Asked:
    """Files by their size, and a count."""
    large = [file["name"] for file in state["files"] if file["size"] > 100]
    deleted = [f'files.delete(name="{name}")' for name in large]
    return Asked(
        "Delete every file that has more than 100 KB, and write how many there were into the file count.txt, the "
        "number alone.",
        ("files.list()", *deleted, f'files.write(name="count.txt", text="{len(large)}")'),
    )


LEVELS: dict[int, tuple[Callable[[random.Random, State], Asked], ...]] = {
    1: (pay, delete_file, add_meeting, price),
    2: (pay_bill, cheapest, move_meeting, paid_to),
    3: (pay_bills, clear_day, shopping, tidy),
}


def made(chance: random.Random, level: int) -> Made:
    """A world, a task of a level, and the state that its solution leaves."""
    before = state_of(chance)
    asked = chance.choice(LEVELS[level])(chance, before)
    after = copy.deepcopy(before)
    for call in asked.calls:
        answered(after, call_in(call))
    return Made(asked, before, after)


def changes(before: State, after: State) -> Counter[str]:
    """What differs, one by one. The number that a new record got does not count, nor the order."""
    found: Counter[str] = Counter()
    for table in before:
        old, new = ({record["id"]: record for record in state[table]} for state in (before, after))
        found.update(f"{table}: {key} removed" for key in old.keys() - new.keys())
        for key, record in new.items():
            if key not in old:
                found[f"{table}: new {[(k, v) for k, v in record.items() if k != 'id']}"] += 1
            else:
                found.update(f"{table}: {key}.{k} = {v!r}" for k, v in record.items() if old[key][k] != v)
    return found
