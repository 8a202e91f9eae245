"""How a test uses the functions and objects of a program that runs in another process.

Both sides are a `Peer`: each may ask the other to do something with objects that the other owns, and while it waits it
does what it is asked. Data is copied; a list, dict or set that a function changes in place is changed for the caller
too. Anything else stays where it is and is used through a `Handle`.

What a handle says about itself is the program's own claim. So it never takes part in a comparison, a sum or a truth
value beside a value of the test's: an object that is equal to everything passes no test.
"""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable, Iterator
from typing import Any

from . import wire

BINARY = (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "matmul"),
    *("eq", "ne", "lt", "le", "gt", "ge"),
)
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *args, **kwargs: function(*args, **kwargs),
    **{function.__name__: function for function in (getattr, setattr, len, iter, next, str, repr, float, int)},
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    **{name: getattr(operator, name) for name in BINARY},
}


class Peer:
    """One end. offers: what the other side may have done with the objects of this one, by name."""

    def __init__(self, read: int, write: int, offers: frozenset[str]) -> None:
        self._read, self._write, self._offers = read, write, offers
        self._own: list[Any] = []
        self._places: dict[int, int] = {}

    def ask(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        """The other side's result. Raises what it raised, where that is a builtin error, else RuntimeError."""
        sent = [self.pack(arg) for arg in args]
        wire.send(self._write, ["do", operation, sent, {key: self.pack(value) for key, value in kwargs.items()}])
        while (message := wire.receive(self._read))[0] == "do":
            self._answer(message)
        if message[0] == "raised":
            raise _error(str(message[1]), str(message[2]))
        for place, packed in message[2]:
            _renew(args[place], self.unpack(packed))
        return self.unpack(message[1])

    def serve(self) -> None:
        """Do what is asked until the other side ends."""
        try:
            while True:
                self._answer(wire.receive(self._read))
        except wire.Ended:
            return

    def tell(self, message: Any) -> None:
        """Something that is no question."""
        wire.send(self._write, message)

    def hear(self) -> Any:
        """What the other side told."""
        return wire.receive(self._read)

    def pack(self, value: Any) -> Any:
        """As `wire.pack`; own objects by their number, the other side's by less than zero."""
        return wire.pack(value, self._number)

    def unpack(self, message: Any) -> Any:
        """As `wire.unpack`."""
        return wire.unpack(message, lambda number: Handle(self, number) if number >= 0 else self._own[-number - 1])

    def _number(self, value: Any) -> int:
        if type(value) is Handle:
            return -object.__getattribute__(value, "_number") - 1
        if id(value) not in self._places:
            self._places[id(value)] = len(self._own)
            self._own.append(value)  # which keeps it alive, so that nothing else gets its id
        return self._places[id(value)]

    def _answer(self, message: Any) -> None:
        _, operation, packed, named = message
        try:
            if operation not in self._offers:
                raise TypeError(f"the test offers no '{operation}'")
            args = [self.unpack(one) for one in packed]
            result = OPERATIONS[operation](*args, **{key: self.unpack(value) for key, value in named.items()})
            after = [[place, self.pack(arg)] for place, arg in enumerate(args) if isinstance(arg, CHANGEABLE)]
            reply = ["value", self.pack(result), [[i, now] for i, now in after if now != packed[i]]]
        except Exception as error:
            reply = ["raised", type(error).__name__, str(error)]
        try:
            wire.send(self._write, reply)
        except (ValueError, TypeError, RecursionError) as error:
            wire.send(self._write, ["raised", "ValueError", f"a value that cannot be told: {error}"])


def _error(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:  # a few want more than a text
            pass
    return RuntimeError(f"{name}: {text}")


CHANGEABLE = (list, dict, set, bytearray)


def _renew(old: Any, new: Any) -> None:
    if isinstance(old, (list, bytearray)):
        old[:] = new
    elif isinstance(old, (dict, set)):
        old.clear()
        old.update(new)


class Handle:
    """An object of the other side."""

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        return _ask(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _ask(self, "setattr", name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _ask(self, "call", *args, **kwargs)

    def __len__(self) -> int:
        return _ask(self, "len")

    def __getitem__(self, key: Any) -> Any:
        return _ask(self, "getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        _ask(self, "setitem", key, value)

    def __iter__(self) -> Iterator[Any]:
        each = _ask(self, "iter")
        while True:
            try:
                yield _ask(each, "next")
            except StopIteration:
                return

    def __next__(self) -> Any:
        return _ask(self, "next")

    def __str__(self) -> str:
        return _ask(self, "str")

    def __repr__(self) -> str:
        return _ask(self, "repr")

    def __bool__(self) -> bool:
        raise TypeError("an object of the program's is neither true nor false here: compare its data")

    def __contains__(self, item: Any) -> bool:
        raise TypeError("what an object of the program's contains is its own claim: compare its data")


def _ask(handle: Handle, operation: str, *args: Any, **kwargs: Any) -> Any:
    return object.__getattribute__(handle, "_peer").ask(operation, handle, *args, **kwargs)


def _between(name: str) -> Callable[[Handle, Any], Any]:
    def operate(self: Handle, other: Any) -> Any:
        return _ask(self, name, other) if type(other) is Handle else NotImplemented

    return operate


for _name in BINARY:
    setattr(Handle, f"__{_name.rstrip('_')}__", _between(_name))
