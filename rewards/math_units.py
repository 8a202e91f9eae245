"""The unit behind a number, and how it compares with another.

Only units that a school book has are known. A word that is not among them ("apples") is dropped. Two known units of one
kind are converted, 1 m is 100 cm; of two kinds, they make two answers different. math-verify's own list of units is not
used where an answer could be cut out of its text: it takes the t of 2x+3t for one.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """kind: what is measured. size: in the first unit of that kind."""

    kind: str
    size: Fraction


# Each kind with its units: size in the first, then the names. A plural is a name with an s.
TABLE = {
    "length": "1 m meter metre"
    "|1/1000 mm millimeter millimetre|1/100 cm centimeter centimetre|1000 km kilometer kilometre"
    "|0.0254 inch inche|0.3048 ft foot feet|0.9144 yd yard|1609.344 mi mile",
    "mass": "1 kg kilogram|1/1000 g gram|1/1000000 mg milligram|0.45359237 lb pound|0.028349523125 oz ounce",
    "time": "1 s sec second|1/1000 ms millisecond|60 min minute|3600 h hr hour|86400 day|604800 week",
    "volume": "1 L l liter litre|1/1000 mL ml milliliter millilitre",
    "area": "1 m^2|1/10000 cm^2|1000000 km^2|1/1000000 mm^2",
    "room": "1 m^3|1/1000000 cm^3",
    "speed": "1 m/s|5/18 km/h|0.44704 mph",
    "angle": r"1 ^\circ degree",
    "dollars": "1 $ dollar|1/100 cent",
    "euros": "1 € euro",
    "pounds of money": "1 £",
}
NAMES = {
    name: Unit(kind, Fraction(size))
    for kind, line in TABLE.items()
    for size, *names in (entry.split() for entry in line.split("|"))
    for name in names
}
WRAPPED = r"\\(?:text(?:rm|bf|it|normal)?|math(?:rm|bf|it)|mbox)\s*\{\s*~?([^{}]*?)\s*\}(\^\{?[23]\}?)?"
SPELLED = r"([A-Za-z][A-Za-z/^23 ]*|\^\s*\{?\\circ\s*\}?)"
BEHIND = re.compile(rf"^(.*?[\d}})A-Za-z])\s*(?:\\[ ,;!])*\s*{WRAPPED}\.?$|^(.*?[\d}})])\s*{SPELLED}\.?$")
# What is no unit and no thing that is counted: it changes the value, or takes it back.
SAYS_MORE = re.compile(
    r"[\d=<>,;]|\b(?:or|and|nor|not|no|is|isn|maybe|perhaps|wrong|incorrect|false|plus|minus|times|over|squared|cubed|"
    r"factorial|sqrt|root|pi|theta|alpha|beta|half|halves|double|twice|hundreds?|thousands?|millions?|billions?|dozens?)\b",
    re.IGNORECASE,
)
ENDED = re.compile(r".*(?:[\d})]|\\pi)")
BEFORE = re.compile(r"^([-+]?)\s*\\?([$€£])\s*(?=[\d.])(.*)$")


def measured(latex: str) -> tuple[str, Unit | None]:
    """What stands before a unit, and the unit if it is known; the text as it is, and None, where there is none."""
    if match := BEFORE.match(latex):
        return match[1] + match[3].strip(), NAMES[match[2]]
    match = BEHIND.match(latex) if len(latex) < 200 else None
    if match is None:
        return latex, None
    before, wrapped, power, number, spelled = match.groups()
    bare = before or number
    name = re.sub(r"[{}\s]", "", spelled if wrapped is None else f"{wrapped}{power or ''}")
    apart = wrapped is not None or latex[len(bare)] == " "
    unit = NAMES.get(name) if len(name) < 3 else _named(name)
    if unit and (apart or len(name) > 1):
        return bare, unit
    if SAYS_MORE.search(spelled if wrapped is None else wrapped) or re.fullmatch(r"[a-z]{2}", wrapped or ""):
        return latex, None
    word = ENDED.fullmatch(bare) and len(name) > 1 if wrapped is not None else len(name) > 3 and apart
    return (bare, None) if word else (latex, None)


def _named(name: str) -> Unit | None:
    return NAMES.get(name) or NAMES.get(name.lower()) or NAMES.get(name.lower().removesuffix("s"))
