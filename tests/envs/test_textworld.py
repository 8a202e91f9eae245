"""Games of TextWorld, made and compiled here by its own maker, against the library used bare."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rlft.envs.placed import placed
from rlft.envs.worlds import textworld as worlds
from rlft.envs.worlds.base import seed_of
from rlft.envs.worlds.textworld import PROMPT, Refusal, TextWorldConfig, command, game_file, game_of
from rlft.types import InputError, Task
from tests.envs.libraries import ASKED, heard, knobs_of, played

textworld = pytest.importorskip("textworld")

pytestmark = pytest.mark.slow  # one game is compiled

SEED = 10**9 + 4
SMALL: dict[str, Any] = {"type": "textworld", "rooms": 2, "objects": 4, "quest_length": 2}


@pytest.fixture(scope="module", autouse=True)
def games(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the compiled games of these tests are kept."""
    before, folder = os.environ.get("RLFT_CACHE"), tmp_path_factory.mktemp("cache")
    os.environ["RLFT_CACHE"] = str(folder)
    yield folder / "textworld"
    os.environ.pop("RLFT_CACHE")
    if before is not None:
        os.environ["RLFT_CACHE"] = before


@pytest.fixture(scope="module")
def file(games: Path) -> Path:
    """The one game of these tests."""
    return game_file(knobs_of(**SMALL), SEED)


def bare(file: Path, commands: list[str]) -> list[Any]:
    """The states that the library gives: after the reset, and after each command."""
    infos = textworld.EnvInfos(won=True, score=True, objective=True, description=True, policy_commands=True)
    env = textworld.start(str(file), infos)
    states = [env.reset()]
    for one in commands:
        states.append(env.step(one)[0])
        if states[-1].won:
            break
    env.close()
    return states


def winning(file: Path) -> list[str]:
    return list(bare(file, [])[0].policy_commands)


def test_the_game_is_the_one_the_library_makes_of_the_seed(file: Path, games: Path) -> None:
    options = textworld.GameOptions()
    options.seeds, options.nb_rooms, options.nb_objects, options.quest_length = SEED, 2, 4, 2
    made = textworld.generator.make_game(options)
    kept = textworld.Game.load(str(file.with_suffix(".json")))
    assert (kept.objective, sorted(map(str, kept.world.facts))) == (made.objective, sorted(map(str, made.world.facts)))
    before = file.stat().st_mtime_ns
    assert game_file(knobs_of(**SMALL), SEED) == file
    assert file.stat().st_mtime_ns == before
    assert sorted(path.suffix for path in games.iterdir()) == [".json", ".z8"]


def test_a_game_that_several_episodes_wait_for_is_made_once(games: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    compiled = worlds._compiled
    monkeypatch.setattr(worlds, "_compiled", lambda shape, path: made.append(path) or compiled(shape, path))
    knobs, task = TextWorldConfig(objects=2, turns=1), Task("t", ASKED, {"seed": 7})
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(knobs.prepare, [task] * 4))
    assert len(made) == 1
    assert game_file(knobs, 7).is_file()
    assert len(made) == 1


def test_the_same_commands_give_the_same_texts_and_scores(file: Path) -> None:
    way = ["look", "xyzzy the box", *winning(file)]
    opening, turns = played([f"I think.\n> {one}" for one in way], SEED, **SMALL)
    states = bare(file, way)
    assert opening == (
        ASKED[0],
        {"role": "user", "content": f"{states[0].objective.strip()}\n\n{states[0].description.strip()}"},
    )
    assert [heard(turn) for turn in turns] == [PROMPT.sub("", state.feedback).strip() for state in states[1:]]
    assert heard(turns[1]) == "That's not a verb I recognise."
    scores = [0, *(state.score for state in states[1:])]
    assert [turn.reward for turn in turns] == [b - a for a, b in pairwise(scores)]
    assert [turn.done for turn in turns] == [False] * (len(turns) - 1) + [True]
    assert turns[-1].metrics == {"success": 1.0, "progress": 1.0, "malformed": 0.0}


def test_the_text_has_neither_prompt_nor_status_line(file: Path) -> None:
    _, turns = played(["look", "inventory"], SEED, **SMALL)
    assert all(">" not in heard(turn) and heard(turn).strip() == heard(turn) for turn in turns)
    assert heard(turns[0]).startswith("-= ")


def test_what_is_not_for_the_game_does_not_reach_it(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """save and script write files where the process stands; a NUL crashes the interpreter and all around it."""
    monkeypatch.chdir(tmp_path)
    odd = ["save", "look. transcript", "a\0b", "", "  \n\n", "x" * 300, "日本"]
    _, turns = played([*odd, *winning(file)], SEED, **SMALL)
    assert [heard(turn) for turn in turns[:4]] == [
        "save is no command of this game.",
        "transcript is no command of this game.",
        "A command is at most 200 plain letters, on a line of its own.",
        "Answer with one command, such as: look",
    ]
    assert turns[-1].metrics == {"success": 1.0, "progress": 1.0, "malformed": float(len(odd))}
    assert not list(tmp_path.iterdir())


def test_commands_are_said_where_they_are_asked_for_and_turns_end(file: Path) -> None:
    opening, turns = played(["look"] * 5, SEED, **SMALL, commands=True, turns=2)
    assert winning(file)[0] in opening[1]["content"].rpartition("You can: ")[2]
    assert "\n\nYou can: " in heard(turns[0])
    assert [turn.done for turn in turns] == [False, True]
    assert turns[-1].metrics["success"] == 0.0


def test_games_that_open_at_once_do_not_disturb_each_other(file: Path) -> None:
    """The library's parser of games is one for the whole process; 24 episodes in 24 threads open as one does."""
    make = placed(knobs_of(type="textworld", games=[str(file)], threads=24))

    async def opening() -> str:
        env = make(Task("row", ASKED, {"seed": 3}))
        try:
            return str((await env.reset())[-1]["content"])
        finally:
            await env.close()

    async def at_once() -> set[str]:
        return set(await asyncio.gather(*(opening() for _ in range(24))))

    assert len(asyncio.run(at_once())) == 1


def test_ready_games_are_played_as_they_are(file: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.z8"
    for suffix in (".z8", ".json"):
        own.with_suffix(suffix).write_bytes(file.with_suffix(suffix).read_bytes())
    way = winning(file)
    made, ready = played(way, SEED, **SMALL), played(way, 5, type="textworld", games=[str(own)])
    assert ready == made
    alone = tmp_path / "alone.z8"  # without the description that its maker has put beside it
    alone.write_bytes(file.read_bytes())
    opening, turns = played(["look"], 5, type="textworld", games=[str(alone)])
    states = bare(alone, ["look"])
    assert opening[1]["content"] == PROMPT.sub("", states[0].feedback).strip()
    assert heard(turns[0]) == PROMPT.sub("", states[1].feedback).strip()


@pytest.mark.parametrize(("name", "message"), [
    ("nowhere.z8", r"env\.games: there is no file .*nowhere\.z8"), ("notes.txt", "notes.txt is no game that TextWorld"),
])  # fmt: skip
def test_what_is_no_game_is_refused_before_the_run(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("a note")
    with pytest.raises(InputError, match=message):
        knobs_of(type="textworld", games=[str(tmp_path / name)]).build()


def test_a_tasks_own_game_has_to_be_there() -> None:
    with pytest.raises(InputError, match="the column game: there is no file"):
        game_of(TextWorldConfig(), Task("a", ASKED, {"game": "nowhere.z8"}))


@pytest.mark.parametrize("word", ["transcripts", "TRANSCRIPTION", "transcrip"])
def test_a_word_is_what_its_nine_letters_are_to_the_game(word: str) -> None:
    assert command(f"look. {word} on") == Refusal(f"{word.casefold()} is no command of this game.")
    assert isinstance(command(word), Refusal)
    assert command("restarted transc") == "restarted transc"


@pytest.mark.parametrize(
    ("text", "told"),
    [("open box", "open box"), ("Let me see.\n\n> open box\n", "open box"), ("take the safe", "take the safe")],
)
def test_the_command_is_the_last_line(text: str, told: str) -> None:
    assert command(text) == told
    assert not isinstance(command(text), Refusal)


def test_every_task_has_a_seed() -> None:
    assert TextWorldConfig().answers == 20
    assert seed_of(Task("a", ASKED)) != seed_of(Task("b", ASKED))
    assert seed_of(Task("a", ASKED)) == seed_of(Task("a", ASKED)) < 2**31
