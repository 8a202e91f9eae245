"""Language consistency by script: whether an answer keeps to the letters of its question's language.

DeepSeek-R1 (arXiv:2501.12948) gives its reasoning the share of words in the target language, because a policy that is
only asked for right answers comes to mix languages. Most of what it mixes is seen by the letters alone, Chinese in an
English answer or English in a Russian one; that takes no model of languages and is right about single words. German in
an English answer is not seen.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections import Counter
from itertools import groupby
from typing import Literal

from pydantic import Field

from rlft.rewards.base import each
from rlft.rewards.parts import OfPart
from rlft.types import Reward, Task, Trajectory

Name = Literal[
    "arabic", "armenian", "bengali", "cyrillic", "devanagari", "ethiopic", "georgian", "greek", "gujarati", "gurmukhi",
    "hangul", "han", "hebrew", "hiragana", "kannada", "katakana", "khmer", "lao", "latin", "malayalam", "myanmar",
    "sinhala", "tamil", "telugu", "thai", "tibetan",
]  # fmt: skip
COMMAND = re.compile(r"\\[A-Za-z]+")  # of LaTeX
RUN = re.compile(r"[^\W\d_]+")
KANA = {"hiragana", "katakana"}
JAPANESE = KANA | {"han"}  # one language in three scripts
WORD_IN_ONE = {"han", "hiragana", "katakana", "hangul"}  # a letter alone may be a word; elsewhere it is a symbol


class Script(OfPart):
    """The share of an answer's letters that are of the scripts asked for; 1 where there is no letter.

    A letter that stands alone, as x and pi do in formulas, does not count, nor do LaTeX commands. Logs 1 where letters
    of other scripts are found as reward/<name>/mixed, else 0.
    """

    type: Literal["script"] = "script"
    scripts: list[Name] = Field(
        default_factory=list, description="Scripts that may be used. Empty: those of the task's own user messages."
    )

    def judge(self, name: str) -> Reward:
        def verdict(trajectory: Trajectory) -> float:
            wanted = set(self.scripts) or _asked(trajectory.task)
            found = letters(self.read(trajectory))
            other = sum(count for script, count in found.items() if wanted and script not in wanted)
            trajectory.metrics[f"reward/{name}/mixed"] = float(other > 0)
            return 1 - other / max(found.total(), 1)

        return each(verdict)


def letters(text: str) -> Counter[str]:
    """How many letters there are of each script. Marks that are no letters of their own (accents, vowel signs) do not
    count; letters in other widths or mathematical fonts count as what they stand for.
    """
    plain = unicodedata.normalize("NFKC", COMMAND.sub(" ", text))
    plain = "".join(char for char in plain if not unicodedata.category(char).startswith("M"))
    found: Counter[str] = Counter()
    for run in RUN.findall(plain):
        scripts = [script for script, same in groupby(run, _script) for _ in _counted(script, list(same))]
        if len(run) > 1 or WORD_IN_ONE.issuperset(scripts):
            found.update(scripts)
    return found


def _counted(script: str, piece: list[str]) -> list[str]:
    """A piece of a word in one script. A Greek letter alone beside others is a symbol: kΩ, Δx."""
    return [] if script == "greek" and len(piece) == 1 else piece


def _asked(task: Task) -> set[str]:
    """The scripts of what the user said; none where that has no letter, and then nothing is foreign."""
    said = " ".join(str(message["content"]) for message in task.messages if message["role"] == "user")
    found = set(letters(said))
    return found | JAPANESE if found & KANA else found


def writing(char: str) -> str:
    """The script of a letter; the three of Japanese, of which Chinese has one, are the same."""
    script = _script(char)
    return "han" if script in JAPANESE else script


@functools.cache
def _script(char: str) -> str:
    """By the first word of the letter's name in Unicode, which is its script."""
    first = unicodedata.name(char, "unknown").split()[0].split("-")[0].lower()
    return {"cjk": "han", "ideographic": "han"}.get(first, first)
