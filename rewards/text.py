"""How near the completion is to a reference text: BLEU and chrF by sacrebleu, ROUGE by rouge-score, edit distances by
rapidfuzz. All are scaled to 0..1, and with several references the library's own rule says which of them count.

They reward words in common, not meaning: a wrong answer in the reference's words scores high. Each says what fools it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import Any, Literal

import regex
from pydantic import Field, model_validator

from rlft.rewards.base import Config, answer
from rlft.rewards.pooled import Verdict, library, pooled
from rlft.rewards.sentences import words_in
from rlft.types import InputError, Reward, Task, Trajectory

KEY = "Column of the task that holds the reference, one text or a list of them."


class Compared(Config):
    """A reward that compares with reference texts."""

    key: str = Field(default="answer", description=KEY)

    def check(self, task: Task) -> None:
        """As for every reward: there is something to compare with."""
        self.golds(task)

    def golds(self, task: Task) -> list[str]:
        """The references. Raises InputError where the task has none that this can compare with."""
        return references(task, self.key)


class Bleu(Compared):
    """BLEU of the completion (Papineni et al. 2002) as sacrebleu has it for one sentence, from 0 to 1.

    Logged: reward/<name>/brevity, the penalty for a completion shorter than the reference, 1 for none.
    """

    type: Literal["bleu"] = "bleu"
    order: int = Field(default=4, ge=1, description="Words in the longest sequences compared.")
    effective: bool = Field(
        default=True,
        description="Leave out sequences longer than the completion, without which most short ones have nearly 0.",
    )
    tokenize: Literal["13a", "intl", "zh", "char", "none"] = Field(
        default="13a", description="sacrebleu's way to cut words. `zh` for Chinese, `char` for others without spaces."
    )
    smooth: Literal["exp", "floor", "add-k", "none"] = Field(
        default="exp", description="What counts for a sequence length without a match. `none`: the value is 0."
    )
    ignore_case: bool = Field(default=False, description="Take capital and small letters as equal.")

    def judge(self, name: str) -> Reward:
        metric = library("sacrebleu.metrics", "the reward `bleu`").BLEU(
            lowercase=self.ignore_case,
            tokenize=self.tokenize,
            smooth_method=self.smooth,
            max_ngram_order=self.order,
            effective_order=self.effective,
        )

        def verdict(trajectory: Trajectory) -> Verdict:
            golds = self.golds(trajectory.task)
            if self.effective:
                said = metric.sentence_score(trajectory.completion, golds)
            else:  # the same for one sentence, and sacrebleu does not warn about it each time
                said = metric.corpus_score([trajectory.completion], [[gold] for gold in golds])
            return said.score / 100, {"brevity": said.bp}

        return pooled(verdict, name)


class Chrf(Compared):
    """chrF of the completion (Popovic 2015), or chrF++ with `words: 2`, by sacrebleu, from 0 to 1."""

    type: Literal["chrf"] = "chrf"
    characters: int = Field(default=6, ge=1, description="Characters in the longest sequences compared.")
    words: int = Field(default=0, ge=0, description="Words in the longest sequences compared; 2 makes it chrF++.")
    beta: int = Field(default=2, ge=1, description="How many times recall counts as much as precision.")
    ignore_case: bool = Field(default=False, description="Take capital and small letters as equal.")

    def judge(self, name: str) -> Reward:
        metric = library("sacrebleu.metrics", "the reward `chrf`").CHRF(
            char_order=self.characters, word_order=self.words, beta=self.beta, lowercase=self.ignore_case
        )

        def verdict(trajectory: Trajectory) -> Verdict:
            return metric.sentence_score(trajectory.completion, self.golds(trajectory.task)).score / 100, {}

        return pooled(verdict, name)


class Rouge(Compared):
    """ROUGE of the completion (Lin 2004) by rouge-score, from 0 to 1: of several references the best by F1.

    Logged under reward/<name>/: precision, recall and f1 of the variant chosen.
    """

    type: Literal["rouge"] = "rouge"
    variant: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = Field(
        default="rougeL",
        description="Single words, pairs, the longest common subsequence, or that of each line put together.",
    )
    measure: Literal["f1", "precision", "recall"] = Field(
        default="f1", description="`recall` alone is raised by writing more, `precision` by writing less."
    )
    stem: bool = Field(default=False, description="Compare English words by their stems (Porter).")
    words: Literal["english", "any"] = Field(
        default="english",
        description="`english`: words of a-z and 0-9 and nothing else, as is published. `any`: of every script.",
    )

    @model_validator(mode="after")
    def _stems_of_english(self) -> Rouge:
        if self.stem and self.words == "any":
            raise ValueError("stem: only English words have stems here; set `words: english` or leave out `stem`")
        return self

    def judge(self, name: str) -> Reward:
        scorer = library("rouge_score.rouge_scorer", "the reward `rouge`").RougeScorer(
            [self.variant], use_stemmer=self.stem, tokenizer=Words() if self.words == "any" else None
        )

        def verdict(trajectory: Trajectory) -> Verdict:
            said = scorer.score_multi(self.golds(trajectory.task), trajectory.completion)[self.variant]
            logged = {"precision": float(said.precision), "recall": float(said.recall), "f1": float(said.fmeasure)}
            return logged[self.measure], logged

        return pooled(verdict, name)

    def golds(self, task: Task) -> list[str]:
        """Those that hold a word."""
        golds = super().golds(task)
        if all(map(Words().tokenize if self.words == "any" else _english, golds)):
            return golds
        raise InputError(
            f"task '{task.id}': column '{self.key}' has no word of a-z or 0-9, so that ROUGE would be 0 whatever was "
            "said. Set the reward's `words: any`, or repair that row."
        )


class Fuzzy(Compared):
    """How alike the completion and the right answer are as strings, from 0 to 1, by rapidfuzz: the best reference."""

    type: Literal["fuzzy"] = "fuzzy"
    measure: Literal["ratio", "partial", "sorted_words", "word_set", "levenshtein", "jaro_winkler"] = Field(
        default="ratio",
        description="`ratio`: insertions and deletions. `levenshtein`: replacements too. `partial`: the best-fitting "
        "piece of the longer text. `sorted_words`: in any order. `word_set`: each word once; words in only one of the "
        "texts hardly count. `jaro_winkler`: for names.",
    )
    at_least: float = Field(default=0.0, ge=0, le=1, description="What is less alike than this has 0.")
    ignore_case: bool = Field(default=True, description="Take capital and small letters as equal.")
    punctuation: bool = Field(default=False, description="Compare punctuation too; false reads it as spaces.")

    def judge(self, name: str) -> Reward:
        alike = _likeness(self.measure)

        def verdict(trajectory: Trajectory) -> Verdict:
            said = self.plain(trajectory.completion)
            best = max(alike(said, gold) for gold in self.golds(trajectory.task)) if said else 0.0
            return best if best >= self.at_least else 0.0, {}

        return pooled(verdict, name)

    def golds(self, task: Task) -> list[str]:
        """As they are compared."""
        golds = [self.plain(text) for text in super().golds(task)]
        if all(golds):
            return golds
        raise InputError(
            f"task '{task.id}': column '{self.key}' holds only punctuation. Set the reward's `punctuation: true`, or "
            "repair that row."
        )

    def plain(self, text: str) -> str:
        """The text as it is compared: white space made one, and what is not to count left out."""
        text = unicodedata.normalize("NFC", text)
        text = text if self.punctuation else regex.sub(r"[^\w\p{M}\s]|_", " ", text)
        return " ".join((text.casefold() if self.ignore_case else text).split())


class Words:
    """rouge-score's tokenizer for texts that are not English: runs of letters and digits of any script."""

    def tokenize(self, text: str) -> list[str]:
        return words_in(unicodedata.normalize("NFC", text).casefold())


def references(task: Task, key: str) -> list[str]:
    """The texts to compare with. Raises InputError where the column has none, or one that is empty or no text."""
    value = task.info.get(key)
    if not isinstance(value, list | tuple):
        return [answer(task, key)]
    if value and all(isinstance(one, str) and one.strip() for one in value):
        return list(value)
    raise InputError(
        f"task '{task.id}': column '{key}' holds {'a list with something else than a text' if value else 'no text'}; "
        "the reward compares with one text or a list of them. Repair that row, or set the reward's `key`."
    )


def _english(text: str) -> bool:
    return re.search(r"[a-z0-9]", text.lower()) is not None


def _likeness(measure: str) -> Callable[[str, str], float]:
    fuzz: Any = library("rapidfuzz.fuzz", "the reward `fuzzy`")
    distance: Any = library("rapidfuzz.distance", "the reward `fuzzy`")
    scaled = {
        "ratio": fuzz.ratio,
        "partial": fuzz.partial_ratio,
        "sorted_words": fuzz.token_sort_ratio,
        "word_set": fuzz.token_set_ratio,
    }
    if measure in scaled:
        return lambda said, gold: scaled[measure](said, gold) / 100
    return {
        "levenshtein": distance.Levenshtein.normalized_similarity,
        "jaro_winkler": distance.JaroWinkler.normalized_similarity,
    }[measure]
