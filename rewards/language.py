"""Which language a text is written in: by py3langid for a reward, by langdetect where IFEval's verdict is asked for.

py3langid (Lui and Baldwin 2012, kept by A. Barbaresi) gives the same verdict for the same text. langdetect draws
samples of the text, so its verdict depends on a seed, which is fixed here; it has not been released since 2021 and is
here for IFEval alone, whose published verdicts are its own.
"""

from __future__ import annotations

import functools
import re
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from rlft.rewards.base import answer
from rlft.rewards.parts import OfPart
from rlft.rewards.pooled import Verdict, library, pooled
from rlft.rewards.script import COMMAND, letters, writing
from rlft.types import InputError, Reward, Task, Trajectory

Code = Annotated[str, StringConstraints(pattern="^[a-z]{2,3}$")]
PROMPT = "prompt"
SENTENCE_END = re.compile(r"(?<=[.!?…।])\s+|(?<=[。！？])|\n+")


class Language(OfPart):
    """1 if the completion is written in the language asked for, else 0, by the library py3langid.

    Or the share of it that is, sentence by sentence, as DeepSeek-R1 (arXiv:2501.12948) rewards the share of its
    reasoning's words. What has no letter is in no language. Logged: reward/<name>/probability, that of the language for
    what is read as a whole; under `share` reward/<name>/pieces, how many were told apart.
    """

    type: Literal["language"] = "language"
    language: Code | Literal["prompt"] | None = Field(
        default=None,
        description="Its code in ISO 639-1: en, de, zh. `prompt`: that of the task's user messages. Or name a `key`.",
    )
    key: str | None = Field(default=None, description="Column of the task that holds the code, in place of `language`.")
    among: list[Code] = Field(
        default_factory=list,
        description="The languages to tell apart; all 140 that the library knows unless given. Fewer are told apart "
        "better, in short texts above all; one that is not listed is taken for the nearest that is.",
    )
    value: Literal["most_likely", "probability", "share"] = Field(
        default="most_likely",
        description="`most_likely`: 1 if no other language is likelier. `probability`: that of the language. `share`: "
        "of the letters, those in sentences (and in pieces of one, where it changes its script) of which no other "
        "language is likelier.",
    )
    empty: float = Field(default=0.0, ge=0, le=1, description="The value where what is read has no letter.")

    @model_validator(mode="after")
    def _one_language(self) -> Language:
        if (self.language is None) == (self.key is None):
            raise ValueError("set either `language` or `key`: which language the completion is to be written in")
        fixed = self.language if self.language != PROMPT else None
        if len(self.among) == 1 or (fixed and self.among and fixed not in self.among):
            raise ValueError("`among` must list the language asked for, and at least one to tell it from")
        return self

    def judge(self, name: str) -> Reward:
        identify = _identifier(tuple(self.among))
        known = sorted(identify.labels)
        if self.language and self.language not in (PROMPT, *known):
            raise InputError(f"the reward's `language`: {self.language!r} is not among {', '.join(known)}.")

        def verdict(trajectory: Trajectory) -> Verdict:
            asked, text = self._asked(trajectory.task), self.read(trajectory)
            if not any(map(str.isalpha, text)):
                return self.empty, {"probability": 0.0}
            ranked = dict(identify.rank(text))
            logged = {"probability": float(ranked[asked])}
            if self.value == "probability":
                return logged["probability"], logged
            if self.value == "most_likely":
                return float(next(iter(ranked)) == asked), logged
            found = [(letters(piece).total(), identify.classify(piece)[0]) for piece in pieces(text)]
            own, whole = sum(n for n, told in found if told == asked), sum(n for n, _ in found)
            return (own / whole if whole else self.empty), logged | {"pieces": float(len(found))}

        return pooled(verdict, name)

    def check(self, task: Task) -> None:
        self._asked(task)

    def _asked(self, task: Task) -> str:
        if self.language == PROMPT:
            return self._of_prompt(task)
        if self.language:
            return self.language
        asked, known = answer(task, str(self.key)).strip(), _identifier(tuple(self.among)).labels
        if asked in known:
            return asked
        raise InputError(
            f"task '{task.id}': column '{self.key}' asks for the language {asked!r}, which is not among "
            f"{', '.join(sorted(known))}. Repair that row, or the reward's `among`."
        )

    def _of_prompt(self, task: Task) -> str:
        said = "\n".join(str(message["content"]) for message in task.messages if message["role"] == "user")
        if any(map(str.isalpha, said)):
            return str(_identifier(tuple(self.among)).classify(said)[0])
        raise InputError(
            f"task '{task.id}': its prompt has no letter, so `language: prompt` says nothing. Name the column with the "
            "language in the reward's `key`, or repair that row."
        )


def pieces(text: str) -> list[str]:
    """The sentences and lines of a text without LaTeX commands, each cut where letters of another script begin."""
    found: list[str] = []
    for sentence in SENTENCE_END.split(COMMAND.sub(" ", text)):
        start, before = 0, None
        for place, char in enumerate(sentence):
            script = writing(char) if char.isalpha() else before
            if before is not None and script != before:
                found.append(sentence[start:place])
                start = place
            before = script
        found.append(sentence[start:])
    return [piece for piece in found if any(map(str.isalpha, piece))]


@functools.cache
def _identifier(among: tuple[str, ...]) -> Any:
    """py3langid with probabilities, told to choose among these, or all that it knows."""
    langid = library("py3langid.langid", "the reward `language`")
    identifier = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    if unknown := set(among) - set(identifier.labels):
        raise InputError(
            f"the reward's `among` lists {', '.join(sorted(unknown))}, which py3langid does not know. It knows "
            f"{', '.join(sorted(identifier.labels))}."
        )
    if among:
        identifier.set_languages(list(among))
    return identifier


@functools.cache
def _detectors() -> Any:
    """langdetect's factory with its profiles read, half a second's work, and apart from the one of the package."""
    package = library("langdetect.detector_factory", "IFEval's check of a language")
    factory = package.DetectorFactory()
    factory.seed = 0
    factory.load_profile(package.PROFILES_DIRECTORY)
    return factory


def known_to_langdetect() -> list[str]:
    """The codes of the languages that it tells apart."""
    return sorted(_detectors().langlist)


def langdetected(text: str) -> str | None:
    """langdetect's guess, with a fixed seed; None where it finds nothing in the text to go by, such as digits alone."""
    nothing = library("langdetect.lang_detect_exception", "IFEval's check of a language").LangDetectException
    detector = _detectors().create()
    detector.append(text)
    try:
        return detector.detect()
    except nothing:
        return None
