"""Text adventures made by TextWorld (Côté et al. 2018, arXiv:1806.11532): rooms, things, and a quest made of a seed.

The library makes a game from the task's seed and compiles it (Inform 7, which its package brings along) to a file that
is kept and played by Jericho. An answer's last line is the command, and the game itself answers what it does not know.
What it is not given: what stops, saves or restores the game or writes files, and characters that its interpreter, a C
library, crashes at.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rlft.envs.base import Action
from rlft.envs.placed import Placed
from rlft.envs.worlds.base import LibraryKnobs, library, opened, said, seed_of
from rlft.types import InputError, Message, Task, Turn

OUTSIDE = {
    *("save", "restore", "restart", "quit", "q", "script", "transcript", "noscript", "unscript"),
    *("verify", "undo", "version"),
}
READ = 9  # letters of a word that a game reads, so that a longer one is the same word to it
LONGEST = 200  # characters of a command
READY = re.compile(r"\.(z[1-8]|ulx|tw-pddl)\Z")
PROMPT = re.compile(r"\n*>\s*(?:-=.*)?\Z")  # and the status line behind it
TABLES = threading.Lock()  # those of the library's maker and parser are the whole process's
MAKERS = threading.Lock()  # so that one maker at most stands in the way of games that open
MAKING: dict[str, threading.Lock] = {}  # by file, so that no game is made twice
COMPILING = threading.Semaphore(max(1, (os.cpu_count() or 1) // 2))


class TextWorld:
    """One episode."""

    def __init__(self, task: Task, knobs: TextWorldConfig) -> None:
        self._task = task
        self._knobs = knobs
        self._env: Any = None
        self._state: Any = None
        self._left = knobs.turns
        self._score = 0.0
        self._malformed = 0

    def reset(self) -> tuple[Message, ...]:
        """The quest and the first room, as the game says them."""
        textworld = library("textworld", "textworld")
        file = game_of(self._knobs, self._task)
        infos = textworld.EnvInfos(
            won=True, lost=True, score=True, max_score=True, objective=True, description=True,
            admissible_commands=self._knobs.commands,
        )  # fmt: skip
        warnings.filterwarnings("ignore", message=".* is not fully supported")  # of every game that is made
        with TABLES:
            self._env = textworld.start(str(file), infos)
            self._state = self._env.reset()
        # A game that TextWorld did not make has neither of them, and opens with its own text.
        made = (self._state.objective, self._state.description)
        parts = (*(made if any(made) else (PROMPT.sub("", self._state.feedback),)), self._allowed())
        return opened(self._task, "\n\n".join(part.strip() for part in parts if part))

    def step(self, action: Action) -> Turn:
        """What the game says to the command, and by how much its score rose."""
        self._left -= 1
        told = command(action.text)
        if isinstance(told, Refusal):
            self._malformed += 1
            return Turn((said(told),), done=self._left <= 0, metrics=self._metrics())
        self._state, score, done = self._env.step(told)
        score = float(score or 0.0)  # None in a game whose description is not there
        reward, self._score = score - self._score, score
        parts = (PROMPT.sub("", self._state.feedback), "" if done else self._allowed())
        text = "\n\n".join(part.strip() for part in parts if part.strip())
        return Turn((said(text or "."),), reward, bool(done) or self._left <= 0, metrics=self._metrics())

    def close(self) -> None:
        """End the interpreter."""
        if self._env is not None:
            self._env.close()

    def _allowed(self) -> str:
        """The commands that do something now, where they are to be shown."""
        return "You can: " + ", ".join(self._state.admissible_commands) + "." if self._knobs.commands else ""

    def _metrics(self) -> dict[str, float]:
        most = self._state.max_score or 1
        return {
            "success": float(bool(self._state.won)),
            "progress": self._score / most,
            "malformed": float(self._malformed),
        }


class TextWorldConfig(LibraryKnobs, Placed):
    """Text adventures of TextWorld, each made of its seed."""

    type: Literal["textworld"] = "textworld"
    rooms: int = Field(default=1, ge=1, description="rooms of the map")
    objects: int = Field(default=5, ge=1, description="things in it, at least")
    quest_length: int = Field(default=1, ge=1, description="commands that the quest takes at least")
    games: list[str] = Field(
        default_factory=list,
        description="ready games instead, files that textworld.start takes, in turn by the seed; a task's column "
        "`game` names its own",
    )
    commands: bool = Field(default=False, description="say after each answer which commands do something now")

    def prepare(self, task: Task) -> None:
        """Make and compile the task's game: seconds, of which a step or an evaluation takes many."""
        game_of(self, task)

    def build(self) -> Callable[[Task], Any]:
        library("textworld", "textworld")
        for game in self.games:
            ready(game, "env.games")
        return partial(TextWorld, knobs=self)


class Refusal(str):
    """Why an answer is not given to the game."""


def command(text: str) -> str:
    """The command of an answer: its last line. A Refusal where it is none, or not for the game."""
    lines = [line.strip().lstrip("> ") for line in text.splitlines() if line.strip().lstrip("> ")]
    if not lines:
        return Refusal("Answer with one command, such as: look")
    told = lines[-1]
    if len(told) > LONGEST or not (told.isascii() and told.isprintable()):
        return Refusal(f"A command is at most {LONGEST} plain letters, on a line of its own.")
    outside = {word[:READ] for word in OUTSIDE}
    if found := sorted(word for word in re.findall(r"\w+", told.casefold()) if word[:READ] in outside):
        return Refusal(f"{found[0]} is no command of this game.")
    return told


def ready(game: str, key: str) -> Path:
    """The file of a ready game. Raises InputError where there is none, or it is of a kind that is not played."""
    file = Path(game).expanduser()
    if not file.is_file():
        raise InputError(f"{key}: there is no file {file.absolute()}; tw-make makes games, and compiles them")
    if not READY.search(file.name):
        raise InputError(f"{key}: {file.name} is no game that TextWorld plays: .z1 to .z8, .ulx or .tw-pddl")
    if file.suffix == ".tw-pddl":
        try:
            importlib.import_module("fast_downward")
        except ImportError as error:
            raise InputError(
                f"{key}: {file.name} is a game of PDDL and needs its planner: pip install 'textworld[pddl]' ({error})"
            ) from error
    return file


def game_of(knobs: TextWorldConfig, task: Task) -> Path:
    """The task's own game, one of the ready ones, or the one that is made of the seed. Raises InputError."""
    if "game" in task.info:
        return ready(str(task.info["game"]), "the column game")
    if knobs.games:
        return ready(knobs.games[seed_of(task) % len(knobs.games)], "env.games")
    return game_file(knobs, seed_of(task))


def game_file(knobs: TextWorldConfig, seed: int) -> Path:
    """The compiled game of a seed, made once. The library's description of it stands beside it."""
    shape = {"rooms": knobs.rooms, "objects": knobs.objects, "quest_length": knobs.quest_length, "seed": seed}
    version = library("textworld", "textworld").__version__
    key = hashlib.sha256(json.dumps([version, shape]).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("RLFT_CACHE") or Path.home() / ".cache" / "rlft") / "textworld"
    file = folder / f"{key}.z8"
    if not file.is_file():
        with MAKING.setdefault(str(file), threading.Lock()):
            if not file.is_file():
                _make(shape, file)
    return file


def _make(shape: dict[str, int], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as made:
        compiled = Path(_compiled(shape, str(Path(made) / file.name)))
        # The game comes last: whoever sees it finds its description too.
        for suffix in (".json", ".z8"):
            os.replace(compiled.with_suffix(suffix), file.with_suffix(suffix))


def _compiled(shape: dict[str, int], path: str) -> str:
    textworld = library("textworld", "textworld")
    options = textworld.GameOptions()
    options.seeds = shape["seed"] % 2**32
    options.nb_rooms, options.nb_objects = shape["rooms"], shape["objects"]
    options.quest_length = shape["quest_length"]
    options.path = path
    with MAKERS, TABLES:
        game = textworld.generator.make_game(options)
    with COMPILING:
        return textworld.generator.compile_game(game, options)
