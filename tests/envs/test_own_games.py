"""The small games: their rules, a player that wins each, one that seldom does, and what holds for every world."""

from __future__ import annotations

import itertools
import random
import re
from functools import cache
from typing import Any

import pytest
from pydantic import ValidationError

from rlft.chat import Chat
from rlft.envs.own.blackjack import FACES, Blackjack, BlackjackConfig, worth
from rlft.envs.own.bulls import BullsConfig, marks
from rlft.envs.own.guess import GuessConfig
from rlft.envs.own.numberline import NumberLine, NumberLineConfig
from rlft.envs.own.play import last_number, last_word, most
from rlft.envs.own.walk import WalkConfig, distances, inside, towards
from tests.envs.playing import among, holds, played, wins

DIGITS = tuple("123456")


class Halving:
    """Wins `guess`: the middle of what is left."""

    def __init__(self, highest: int) -> None:
        self.low, self.high, self.said = 1, highest, 0

    def __call__(self, env: Any, heard: str) -> str:
        if "is higher" in heard:
            self.low = self.said + 1
        elif "is lower" in heard:
            self.high = self.said - 1
        self.said = (self.low + self.high) // 2
        return f"I guess {self.said}."


class Consistent:
    """Wins `bulls`: a secret that agrees with every answer."""

    def __init__(self) -> None:
        self.left = ["".join(digits) for digits in itertools.permutations(DIGITS, 3)]

    def __call__(self, env: Any, heard: str) -> str:
        if told := re.fullmatch(r"Bulls: (\d), cows: (\d)\.", heard):
            self.left = [one for one in self.left if marks(self.left[0], one) == tuple(map(int, told.groups()))]
        return self.left[0]


def shortest(env: Any, heard: str) -> str:
    """Wins `walk`: one step nearer, by a map that the policy has not."""
    world = env._world
    left = distances(world._goal, world._size, world._walls)
    ways = [way for way in ("north", "east", "south", "west") if world._free(towards(world._at, way))]
    return min(ways, key=lambda way: left[towards(world._at, way)])


def nearer(env: Any, heard: str) -> str:
    target, current = map(int, re.findall(r"(?:Target|Current): (\d+)", heard))
    return "+" if target > current else "-"


def test_halving_always_finds_the_number_and_chance_seldom_does() -> None:
    for seed in range(60):
        assert played(GuessConfig(), Halving(100), seed).won
    assert wins(GuessConfig(), among(*map(str, range(1, 101))), 200) < 0.2  # 7 of 100 at best


def test_guess_says_what_is_wrong() -> None:
    said = iter(["forty", "101", "1", "100", "0"])
    heard = played(GuessConfig(turns=5), lambda env, heard: next(said), "seed").heard
    assert heard[0].startswith("I think of a whole number from 1 to 100. Find it in at most 5 guesses.")
    assert heard[1:] == [
        "Answer with one number from 1 to 100. Guesses left: 4.",
        "Answer with one number from 1 to 100. Guesses left: 3.",
        "My number is higher. Guesses left: 2.",
        "My number is lower. Guesses left: 1.",
    ]


@pytest.mark.parametrize(("text", "number"), [
    ("50", 50), ("Perhaps 12, no: 13.", 13), ("1,000 or 2,500", 2500), ("-4", -4), ("x7 3.5", None), ("", None),
    ("9" * 5000, None), ("3-4", 4),
])  # fmt: skip
def test_the_last_number(text: str, number: int | None) -> None:
    assert last_number(text) == number


def test_marks_by_hand() -> None:
    assert marks("123", "123") == (3, 0)
    assert marks("123", "312") == (0, 3)
    assert marks("145", "153") == (1, 1)


def test_consistent_guesses_find_the_secret_and_chance_seldom_does() -> None:
    for seed in range(60):
        assert played(BullsConfig(), Consistent(), seed).won
    secrets = ["".join(digits) for digits in itertools.permutations(DIGITS, 3)]
    assert wins(BullsConfig(), among(*secrets), 200) < 0.2  # 8 of 120 guesses: 6.5%


def test_no_more_places_than_digits() -> None:
    with pytest.raises(ValidationError, match="raise `digits`"):
        BullsConfig(places=4, digits=3)


def test_the_shortest_way_wins_and_chance_seldom_does() -> None:
    knobs = WalkConfig()
    lengths = []
    for seed in range(60):
        episode = played(knobs, shortest, seed)
        assert episode.won
        lengths.append(len(episode.turns))
    assert max(lengths) == 4  # half of the turns
    assert wins(knobs, among("north", "east", "south", "west"), 200) < 0.5


def test_letters_that_only_look_like_a_word_s_are_no_word() -> None:
    assert last_word("go NORTH, then \u017fouth", ("north", "south")) == "north"
    assert not WalkConfig().world(random.Random(0)).move("\u017fouth").fit


@pytest.mark.parametrize("walls", [0.0, 0.3, 0.6])
def test_the_goal_is_in_reach(walls: float) -> None:
    for seed in range(100):
        world = WalkConfig(size=3, walls=walls).world(random.Random(seed))
        steps = distances(world._at, 3, world._walls)
        assert inside(world._goal, 3)
        assert 0 < steps[world._goal] <= 4


def test_numberline_pays_as_gym_cards_does() -> None:
    world = NumberLine(random.Random(0), 5)
    world._at, world._target = 1, 3
    assert [(m.reward, m.won) for m in map(world.move, "-+++")] == [(-1, None), (0, None), (0, None), (1, True)]
    world._at, world._target = 0, 3
    assert world.move("-") == world.move('{"thoughts": "well-known", "action": "-"}')  # at the end of the line
    assert (world._at, world.move("-").reward, world.move("up").fit) == (0, -1.0, False)


def test_numberline_is_won_and_by_chance_less() -> None:
    knobs = NumberLineConfig()
    episodes = [played(knobs, nearer, seed) for seed in range(100)]
    assert all(episode.won and episode.reward == 1.0 and len(episode.turns) <= 5 for episode in episodes)
    far = NumberLineConfig(longest=20)
    assert wins(far, among("+", "-"), 100) < 0.5


def test_hands_by_hand() -> None:
    assert worth(["A", "K"]) == (21, True)
    assert worth(["A", "A"]) == (12, True)
    assert worth(["A", "9", "5"]) == (15, False)
    assert worth(["Q", "J", "2"]) == (22, False)


def test_hands_are_worth_what_gymnasium_says() -> None:
    """gym_cards counts by the functions of gymnasium's Blackjack-v1."""
    theirs = pytest.importorskip("gymnasium.envs.toy_text.blackjack")
    chance = random.Random(0)
    for _ in range(2000):
        hand = chance.choices(FACES, k=chance.randint(2, 9))
        values = [points(card) for card in hand]
        assert worth(hand) == (theirs.sum_hand(values), bool(theirs.usable_ace(values)))


@cache
def dealt(total: int, ace: bool) -> tuple[tuple[int, float], ...]:
    """How likely the dealer ends with which sum (0: bust), from a hard sum and whether there is an ace."""
    best = total + 10 if ace and total <= 11 else total
    if best >= 17:
        return ((best if best <= 21 else 0, 1.0),)
    ends: dict[int, float] = {}
    for face in range(1, 14):
        for end, p in dealt(total + min(face, 10), ace or face == 1):
            ends[end] = ends.get(end, 0.0) + p / 13
    return tuple(ends.items())


@cache
def value(total: int, ace: bool, shown: int) -> tuple[float, bool]:
    """What the best player expects, and whether it hits."""
    if total > 21:
        return -1.0, False
    best = total + 10 if ace and total <= 11 else total
    stand = sum(
        p / 13 * ((best > end) - (best < end))
        for hidden in range(1, 14)
        for end, p in dealt(shown + min(hidden, 10), shown == 1 or hidden == 1)
    )
    hit = sum(value(total + min(face, 10), ace or face == 1, shown)[0] for face in range(1, 14)) / 13
    return max(stand, hit), hit > stand


def points(card: str) -> int:
    return min(10, FACES.index(card) + 1)


def best(env: Any, heard: str) -> str:
    dealer, mine = re.findall(r"^(?:Dealer|You): (.*)$", heard, re.M)
    cards = mine.split()
    return "hit" if value(sum(map(points, cards)), "A" in cards, points(dealer))[1] else "stand"


def test_blackjack_pays_what_the_best_player_expects() -> None:
    """The expectation is worked out over all cards, from the rules alone."""
    expected = sum(
        value(min(a, 10) + min(b, 10), 1 in (a, b), min(shown, 10))[0] / 13**3
        for a, b, shown in itertools.product(range(1, 14), repeat=3)
    )
    paid = [played(BlackjackConfig(turns=20), best, seed).reward for seed in range(3000)]
    assert sum(paid) / 3000 == pytest.approx(expected, abs=3 * 0.96 / 3000**0.5)
    assert -0.06 < expected < -0.03
    chance = [played(BlackjackConfig(), among("hit", "stand"), seed).reward for seed in range(500)]
    assert sum(chance) / 500 < -0.15


def test_a_hand_that_never_stands_is_lost() -> None:
    assert played(BlackjackConfig(turns=3), lambda env, heard: "I wait", 0).reward == -1.0
    world = Blackjack(random.Random(0))
    world._mine, world._dealer = ["10", "8"], ["10", "7"]
    assert (world.move("Stand!").reward, world.move("stick").won) == (1.0, True)
    world._mine = ["10", "7"]
    draw = world.move("I stand")
    assert (draw.reward, draw.won, draw.metrics) == (0.0, False, {"draw": 1.0})


GAMES = [
    (GuessConfig(), ("5", "50", "75")),
    (GuessConfig(highest=10**6, turns=6), ("5", "999999", "500000")),
    (BullsConfig(), ("123", "456", "111")),
    (BullsConfig(places=9, digits=9), ("123456789", "987654321")),
    (WalkConfig(), ("north", "east", "south", "west")),
    (WalkConfig(size=50, walls=0.6, turns=30), ("north", "east", "south", "west")),
    (NumberLineConfig(), ("+", "-")),
    (BlackjackConfig(), ("hit", "stand")),
    (BlackjackConfig(turns=25), ("hit", "hit", "hit")),
]


@pytest.mark.parametrize(("knobs", "moves"), GAMES, ids=[knobs.type for knobs, _ in GAMES])
def test_what_holds_for_every_world(knobs: Any, moves: tuple[str, ...]) -> None:
    bounds = {"numberline": (-10.0, 1.0), "blackjack": (-1.0, 1.0)}.get(knobs.type, (0.0, 0.0))
    holds(knobs, moves, least=bounds[0], most=bounds[1])
    assert knobs.pays == (knobs.type in ("numberline", "blackjack"))


def test_room_is_enough_for_a_real_tokenizer(chat: Chat) -> None:
    def count(text: str) -> int:
        return len(chat.encode(text))

    for knobs, moves in GAMES:
        for seed in range(5):
            heard = played(knobs, among(*moves, seed=seed), seed).heard
            assert sum(map(count, heard)) <= knobs.room(0, count)


def test_each_digit_may_be_a_token() -> None:
    assert most("a 10 b", lambda text: len(text.split())) == 1 + 2 + 1
    assert most("10", len) == 2
