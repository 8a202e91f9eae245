"""Messages between the processes of a test: JSON behind its length, and values as plain data.

No pickle: whoever reads one runs what the writer wants. A value that is no data travels as a number that its owner
knows it by.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

LARGEST = 8 << 20  # bytes of one message
GONE = "the program ended before the test did"
Known = Callable[[Any], int]
# By the types' own methods: a subclass may say anything of itself.
SEVERAL: tuple[tuple[Any, str], ...] = ((list, "l"), (tuple, "t"), (frozenset, "f"), (set, "s"))
TEXTS: tuple[tuple[type, str, Callable[[Any], str]], ...] = (
    (bytes, "b", bytes.hex),
    (bytearray, "B", bytearray.hex),
    (Decimal, "D", Decimal.__str__),
    (Fraction, "F", Fraction.__str__),
    (complex, "c", complex.__repr__),
)


class Ended(Exception):
    """The other side is gone."""


def send(file: int, message: Any) -> None:
    """Raises Ended where nobody reads any more, ValueError where the message is too large."""
    body = json.dumps(message).encode()
    if len(body) > LARGEST:
        raise ValueError(f"a message of {len(body)} bytes is too large")
    body = struct.pack("I", len(body)) + body
    try:
        while body:
            body = body[os.write(file, body) :]
    except BrokenPipeError:
        raise Ended(GONE) from None


def receive(file: int) -> Any:
    """Raises Ended at the end, ValueError for what is no message."""
    (size,) = struct.unpack("I", _exactly(file, 4))
    if size > LARGEST:
        raise ValueError(f"a message of {size} bytes is too large")
    return json.loads(_exactly(file, size))


def framed(file: int) -> bytes | None:
    """What stands behind its length in twelve digits, and not a byte more; None at the end."""
    try:
        return _exactly(file, int(_exactly(file, 12)))
    except Ended:
        return None


def _exactly(file: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(file, min(size, 1 << 16))
        if not part:
            raise Ended(GONE)
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def pack(value: Any, known: Known) -> Any:
    """A value as JSON. known: gives an object that is no data the number it goes by."""
    plain = _plain(value)
    if plain is not None:
        return plain
    if isinstance(value, dict):
        return ["d", *([pack(key, known), pack(one, known)] for key, one in dict.items(value))]
    for kind, tag in SEVERAL:
        if isinstance(value, kind):
            return [tag, *(pack(item, known) for item in kind.__iter__(value))]
    return ["o", known(value)]


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return ["v", value if value is None or isinstance(value, bool) else str.__str__(value)]
    if isinstance(value, (int, float)):
        return ["v", int.__int__(value) if isinstance(value, int) else float.__float__(value)]
    for kind, tag, text in TEXTS:
        if isinstance(value, kind):
            return [tag, text(value)]
    return None


MAKERS: dict[str, Callable[[Any], Any]] = {
    "b": bytes.fromhex, "B": bytearray.fromhex, "D": Decimal, "F": Fraction, "c": complex,
}  # fmt: skip
HOLDERS: dict[str, Callable[[Any], Any]] = {"l": list, "t": tuple, "s": set, "f": frozenset}


def unpack(message: Any, known: Callable[[int], Any]) -> Any:
    """The value again. known: the object, or what stands for it, by its number. Raises ValueError for nonsense."""
    tag, *rest = message
    if tag == "v":
        return rest[0]  # whatever JSON can say is data
    if tag == "o":
        return known(int(rest[0]))
    if tag == "d":
        return {unpack(key, known): unpack(value, known) for key, value in rest}
    if tag in HOLDERS:
        return HOLDERS[tag](unpack(item, known) for item in rest)
    if tag in MAKERS:
        return MAKERS[tag](str(rest[0]))
    raise ValueError(f"there is no kind of value {tag!r}")
