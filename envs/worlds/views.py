"""How the toy texts of Gymnasium are said: the library shows them by colours in a terminal, or as one number."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

COLOURED = re.compile(r"\x1b\[[\d;]*m(.*?)\x1b\[0m", re.DOTALL)
PLACES = ("red, row 0 column 0", "green, row 0 column 4", "yellow, row 4 column 0", "blue, row 4 column 3")


@dataclass(frozen=True)
class View:
    """What is said of one family of environments. won: what success is, as in the config."""

    rules: str
    moves: tuple[str, ...]
    show: Callable[[Any, Any], str]
    won: str = "paid"


def plain(render: str) -> str:
    """A render for a terminal without its colours; what was coloured stands in brackets."""
    return COLOURED.sub(r"[\1]", render).strip("\n")


def _lake(env: Any, observation: Any) -> str:
    """The map, with P where the player is."""
    rows = [[cell.decode() for cell in row] for row in env.unwrapped.desc]
    row, column = divmod(int(observation), len(rows[0]))
    rows[row][column] = "P"
    return "\n".join("".join(row) for row in rows)


def _cliff(env: Any, observation: Any) -> str:
    row, column = divmod(int(observation), 12)
    return f"You are in row {row}, column {column}."


def _taxi(env: Any, observation: Any) -> str:
    row, column, passenger, goal = (int(part) for part in env.unwrapped.decode(int(observation)))
    where = "in your taxi" if passenger == len(PLACES) else f"at {PLACES[passenger]}"
    return f"You are in row {row}, column {column}. The passenger is {where}, and wants to {PLACES[goal]}."


def _cards(env: Any, observation: Any) -> str:
    mine, dealer, ace = observation
    return f"Your cards sum to {int(mine)}{', with an ace as 11' if int(ace) else ''}. The dealer shows {int(dealer)}."


ROUND = ("left", "down", "right", "up")
KNOWN = {
    "FrozenLake": View(
        "You (P) walk over a frozen lake to the goal (G). F is ice, S the start, H a hole: whoever falls in has lost.",
        ROUND,
        _lake,
    ),
    "CliffWalking": View(
        "Walk over a field of 4 rows and 12 columns from row 3, column 0 to row 3, column 11. Between them, in row 3, "
        "is a cliff: whoever falls begins anew. Up leads to a smaller row, and each step costs.",
        ("up", "right", "down", "left"),
        _cliff,
        "ending",
    ),
    "Taxi": View(
        "You drive a taxi over 5 rows and 5 columns. Fetch the passenger, drive where the passenger wants to go, and "
        "let the passenger out. South leads to a larger row, east to a larger column. Walls stop you:\n"
        "+---------+\n|R: | : :G|\n| : | : : |\n| : : : : |\n| | : | : |\n|Y| : |B: |\n+---------+",
        ("south", "north", "east", "west", "pickup", "dropoff"),
        _taxi,
        "ending",
    ),
    "Blackjack": View(
        "You play blackjack: come nearer to 21 than the dealer, but not over it.", ("stick", "hit"), _cards
    ),
}
