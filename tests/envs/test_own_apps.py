"""The world of apps: how calls are read, what they change, what counts as done, and players that do the tasks."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

import pytest

from rlft.chat import Chat
from rlft.envs.own.apps.api import APPS, FUNCTIONS, Refused, answered, manual
from rlft.envs.own.apps.calls import Call, Unreadable, call_in
from rlft.envs.own.apps.tasks import LEVELS, Made, changes, made, state_of
from rlft.envs.own.apps.world import Apps, AppsConfig
from tests.envs.playing import among, holds, played, wins

MOVES = (
    "mail.list()", "mail.read(id=1)", 'mail.send(to="ann", subject="hello", text="See you soon.")', "mail.delete(id=2)",
    'calendar.list(day="monday")', 'calendar.add(title="x", day="friday", hour=12)', 'shop.search("lamp")',
    "shop.buy(id=1, count=2)", "shop.orders()", "files.list()", 'files.write("a.txt", "text")', "payments.list()",
    'payments.pay("bob", 3, "tip")', 'apis.help("mail")', "apis.help()", "apis.help(3)", "calendar.list(1)",
    'files.read("' + "\\\\" * 90 + '")', 'mail.send("ann", "é", "x")', "mail.forward(id=1)", "nope.list()",
    "payments.balance()",
)  # fmt: skip


def told(env: Any, heard: str) -> str:
    """Does the worked solution, and says its answer."""
    world = env._world
    if not hasattr(world, "left"):
        asked = world._task.asked
        world.left = [*asked.calls, f'apis.done(answer="{asked.answer or ""}")']
    return world.left.pop(0)


class Reader:
    """Does tasks of level 2 by what it is told and shown alone."""

    def __call__(self, env: Any, heard: str) -> str:
        if "Task: " in heard:
            self.task, self.before = heard.partition("Task: ")[2], ""
            kinds = ((r"(\w+) sent me", self.bill), (r"cheapest (\w+), (\d)", self.buy),
                     (r"meeting '(\w+)' of (\w+)", self.move), (r"pay to (\w+) in all", self.total))  # fmt: skip
            self.says = next(do(*found.groups()) for pattern, do in kinds if (found := re.search(pattern, self.task)))
            return next(self.says)
        return self.says.send(heard)

    def bill(self, name: str) -> Any:
        number = re.findall(rf"id=(\d+) sender='{name}' .*subject='bill'", (yield "mail.list()"))[0]
        amount = re.findall(r"pay me (\d+)", (yield f"mail.read({number})"))[0]
        yield f'payments.pay("{name}", {amount}, "bill")'
        yield "apis.done()"

    def buy(self, thing: str, count: str) -> Any:
        goods = re.findall(r"id=(\d+) .*price=(\d+)", (yield f'shop.search("{thing}")'))
        number = min(goods, key=lambda good: int(good[1]))[0]
        yield f"shop.buy({number}, {count})"
        yield "apis.done()"

    def move(self, title: str, day: str) -> Any:
        rows = re.findall(r"id=(\d+) title='(\w+)' .*hour=(\d+)", (yield f'calendar.list("{day}")'))
        number, hour = next((number, int(hour)) for number, name, hour in rows if name == title)
        while (yield f'calendar.move({number}, "{day}", {hour + 1})').startswith("Error"):
            hour += 1
        yield "apis.done()"

    def total(self, name: str) -> Any:
        amounts = re.findall(rf"to='{name}' amount=(\d+)", (yield "payments.list()"))
        yield f"apis.done({sum(map(int, amounts))})"


@pytest.mark.parametrize(("text", "call"), [
    ("mail.list()", Call("mail", "list", (), {})),
    ("First mail.list(), then\nmail.read( id = 3 )", Call("mail", "read", (), {"id": 3})),
    ("""a.b('it"s', "it's \\"so\\"", -4)""", Call("a", "b", ('it"s', 'it\'s "so"', -4), {})),
    ('a.b("f(x), y z", n=2) and so on', Call("a", "b", ("f(x), y z",), {"n": 2})),
])  # fmt: skip
def test_calls_by_hand(text: str, call: Call) -> None:
    assert call_in(text) == call


@pytest.mark.parametrize(("text", "wrong"), [
    ("", "no call"), ("mail list", "no call"), ("mail.read(", "Argument 1"), ("mail.read(1", "Argument 1"),
    ("mail.read(one)", "Argument 1"), ("a.b(1.5)", "Argument 1"), ("a.b(1, )", "Argument 2"), ('a.b("x)', "Argument 1"),
    ("a.b(id=1, 2)", "name them all"), ("a.b(id=1, id=2)", "twice"), ("a.b(__import__('os'))", "Argument 1"),
    ("a.b(" + "9" * 5000 + ")", "Argument 1"), ("a.b(" * 300, "Argument 1"),
])  # fmt: skip
def test_what_is_no_call(text: str, wrong: str) -> None:
    with pytest.raises(Unreadable, match=wrong):
        call_in(text)


@pytest.mark.parametrize(("call", "message"), [
    ("mail.read(9)", "no such id"), ('mail.read("1")', "id is a number"),
    ("mail.read()", "mail.read takes id, each once"),
    ("mail.read(1, 2)", "takes 1 arguments"), ("mail.read(1, id=1)", "each once"), ("mail.print()", "no such function"),
    ("bank.list()", "Apps: mail"), ("payments.pay('ann', 1001, 'x')", "balance is too low"),
    ("payments.pay('ann', -5, 'x')", "1 or more"), ("shop.buy(1, 0)", "from 1 to 99"),
    ("calendar.list('sunday')", "monday"),
    ("calendar.add('x', 'monday', 8)", "from 9 to 17"), ("files.read('no')", "no such name"),
    ("files.write('a', '')", "1 to 120"), ("files.write('é', 'x')", "ASCII"),
    ("mail.send('a', 'b', '" + "x" * 121 + "')", "120"),
])  # fmt: skip
def test_what_cannot_be_done_changes_nothing(call: str, message: str) -> None:
    state = state_of(random.Random(0))
    before = copy.deepcopy(state)
    with pytest.raises(Refused, match=message):
        answered(state, call_in(call))
    assert state == before


def test_changes_by_hand() -> None:
    before = state_of(random.Random(0))
    after = copy.deepcopy(before)
    assert not changes(before, after)
    assert answered(after, call_in('payments.pay("ann", 12, "x")')) == "done: id=5"
    assert answered(after, call_in("mail.delete(1)")) == "done"
    assert changes(before, after) == {
        "payments: new [('to', 'ann'), ('amount', 12), ('note', 'x')]": 1,
        "account: 1.balance = 988": 1,
        "mail: 1 removed": 1,
    }
    twice = copy.deepcopy(before)
    for name in ("bob", "ann"):
        answered(twice, call_in(f'mail.send("{name}", "a", "b")'))
    other = copy.deepcopy(before)
    for name in ("ann", "bob"):
        answered(other, call_in(f'mail.send("{name}", "a", "b")'))
    assert changes(before, twice) == changes(before, other)  # the order does not count


def test_every_function_is_in_the_manual_and_reading_changes_nothing() -> None:
    told = "".join(map(manual, APPS))
    assert all(f"{name}(" in told for name in FUNCTIONS)
    state = state_of(random.Random(1))
    before = copy.deepcopy(state)
    for call in (
        "mail.list()",
        "mail.read(1)",
        "shop.search('e')",
        "shop.orders()",
        "files.list()",
        "payments.balance()",
    ):
        answered(state, call_in(call))
    assert state == before
    assert answered(state, call_in("payments.balance()")) == "balance=1000"
    assert answered(state, call_in("shop.orders()")) == "nothing"


@pytest.mark.parametrize("level", LEVELS)
def test_the_worked_solutions_are_right(level: int) -> None:
    knobs = AppsConfig(level=level)
    kinds = set()
    for seed in range(60):
        episode = played(knobs, told, seed)
        assert episode.won
        assert episode.turns[-1].metrics == {"success": 1, "malformed": 0, "errors": 0, "missing": 0, "collateral": 0}
        kinds.add(re.sub(r"[a-z]*[0-9']+[a-z.]*", "", episode.heard[0].partition("Task: ")[2])[:8])
    assert len(kinds) >= 4
    assert wins(knobs, among(*MOVES, "apis.done()"), 60) < 0.1


def test_a_reader_does_level_2_from_what_it_is_shown() -> None:
    assert wins(AppsConfig(level=2), Reader(), 60) == 1.0


def task(level: int, kind: str) -> Made:
    return next(one for seed in range(99) if kind in (one := made(random.Random(seed), level)).asked.text)


def test_nothing_else_may_change() -> None:
    one = task(1, "Delete the file")
    for extra, missing, collateral in (((), 0, 0), (("mail.delete(1)",), 0, 1), (("shop.buy(1, 1)",), 0, 2)):
        world = Apps(one, manuals=False)
        for call in (*one.asked.calls, *extra):
            assert world.move(call).won is None
        over = world.move("apis.done()")
        assert (over.won, over.metrics) == (
            not extra, {"errors": 0, "missing": missing, "collateral": collateral}
        )  # fmt: skip
    undone = Apps(one, manuals=False).move("apis.done()")
    assert (undone.won, undone.metrics["missing"]) == (False, 1)


def test_a_question_wants_its_answer() -> None:
    one = task(1, "What does")
    for said, won in ((f'"{one.asked.answer}"', True), (one.asked.answer, True), ('"many"', False), ("", False)):
        assert Apps(one, manuals=False).move(f"It is clear. apis.done({said})").won is won


def test_errors_are_told() -> None:
    world = Apps(task(1, "Pay"), manuals=False)
    assert world.move("I pay.").said.startswith("There is no call in your answer. Write one call, such as mail.list()")
    assert world.move("payments.pay(1)").said == "Error: payments.pay takes to, amount, note, each once."
    assert world.move("apis.help(x=1)").said == "Error: apis has help(app) and done(answer)."
    assert world.move('apis.help("payments")').said.splitlines()[0] == "payments.balance(): Your balance in dollars."
    assert world.move("mail.list()").metrics == {"errors": 2}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("manuals", [False, True])
def test_what_holds_for_every_world(level: int, manuals: bool, chat: Chat) -> None:
    knobs = AppsConfig(level=level, manuals=manuals)
    holds(knobs, MOVES)

    def count(text: str) -> int:
        return len(chat.encode(text))

    room = knobs.room(0, count)
    for seed in range(5):
        for policy in (told, among(*MOVES, seed=seed)):
            assert sum(map(count, played(knobs, policy, seed).heard)) <= room
