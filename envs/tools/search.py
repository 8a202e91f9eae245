"""Search over a corpus in a file, by words: BM25 (Robertson and Zaragoza 2009), as bm25s computes it."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from rlft.envs.tools.base import Refused, Schema, Tool, function_schema
from rlft.types import InputError, Task

WORD = re.compile(r"\w\w+")


class Corpus(BaseModel):
    """A file of documents that the tool `search` looks through."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str = Field(min_length=1, description="JSON lines with `text`, and with `title` where there is one")
    top: int = Field(default=3, ge=1, description="documents that one search shows")
    snippet: int = Field(
        default=300, ge=20, description="characters of each that are shown, around the words asked for"
    )
    about: str = Field(default="a collection of documents", description="what the policy is told that is searched")


class Search:
    """A source of one tool: `search`. The index is made once. Raises InputError."""

    def __init__(self, corpus: Corpus) -> None:
        path = Path(corpus.file)
        if not path.is_file():
            raise InputError(f"env.corpus.file: there is no file {corpus.file!r}. Name one that holds JSON lines")
        self._corpus = corpus
        self._index = indexed(path.resolve(), path.stat().st_mtime_ns)
        self._schema = function_schema(
            "search",
            f"Searches {corpus.about} by words, and returns the parts that fit best.",
            {
                "type": "object",
                "properties": {"query": {"type": "string", "description": "the words to look for"}},
                "required": ["query"],
            },
        )

    @property
    def schemas(self) -> list[Schema]:
        """Of the one tool."""
        return [self._schema]

    def kit(self, task: Task) -> Search:
        """It keeps nothing of an episode."""
        return self

    async def open(self) -> list[Tool]:
        """The one tool."""
        return [Tool(self._schema, _query, self._search)]

    def metrics(self) -> Mapping[str, float]:
        """None."""
        return {}

    async def close(self) -> None:
        """Nothing to close."""

    async def _search(self, query: str) -> str:
        return await asyncio.to_thread(self._shown, query)

    def _shown(self, query: str) -> str:
        shown = [
            f"[{i}] {title}\n{snippet(text, query, self._corpus.snippet)}".replace("] \n", "]\n")
            for i, (title, text) in enumerate(self._index.best(query, self._corpus.top), 1)
        ]
        return "\n\n".join(shown) or "Nothing was found."


class Index:
    """Documents with the weights of their words. Raises InputError where bm25s is missing."""

    def __init__(self, documents: list[tuple[str, str]]) -> None:
        try:
            import bm25s
        except ImportError as error:
            raise InputError("env.corpus needs the package bm25s; install it with pip install rlft[tools]") from error
        self._documents = documents
        self._words = bm25s.tokenize
        self._weights = bm25s.BM25()
        whole = [f"{title}\n{text}" for title, text in documents]
        self._weights.index(self._words(whole, show_progress=False), show_progress=False)

    def best(self, query: str, top: int) -> list[tuple[str, str]]:
        """Titles and texts, the best first; of equal ones the earlier first. Those that share no word are left out."""
        words = map(str, self._words(query, return_ids=False, show_progress=False)[0])
        known = [word for word in words if word in self._weights.vocab_dict]
        if not known:
            return []
        scores = self._weights.get_scores(known)
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:top]
        return [self._documents[i] for i in order if scores[i] > 0]


@lru_cache(maxsize=4)
def indexed(path: Path, changed: int) -> Index:
    """The index of a file as it was then. Raises InputError."""
    try:
        with path.open(encoding="utf-8") as lines:  # whose lines end where JSON lines do, and not at U+2028
            documents = [_document(line, path.name, i) for i, line in enumerate(lines, 1) if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(f"env.corpus.file: {path.name} is no UTF-8: {error}. Write it in that encoding") from error
    if not any(WORD.search(text) for _, text in documents):
        raise InputError(f"env.corpus.file: {path.name} holds no text. Give it lines with `text`")
    return Index(documents)


def _document(line: str, name: str, number: int) -> tuple[str, str]:
    try:
        row = json.loads(line)
        return str(row.get("title") or ""), row["text"].strip()  # which only a text has
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(
            f"env.corpus.file: {name}, line {number} is no JSON object with a `text`. Repair that line"
        ) from error


def snippet(text: str, query: str, longest: int) -> str:
    """The part of a text in which most of the query's words stand, of at most so many characters."""
    if len(text) <= longest:
        return text
    asked = {word.lower() for word in WORD.findall(query)}
    places = [(word.start(), word[0].lower()) for word in WORD.finditer(text) if word[0].lower() in asked]
    within: Counter[str] = Counter()  # the words from one place on
    best = most = end = 0
    for at, word in places:
        while end < len(places) and places[end][0] <= at + longest * 0.8:
            within[places[end][1]] += 1
            end += 1
        if len(within) > most:
            best, most = at, len(within)
        within[word] -= 1
        if not within[word]:
            del within[word]
    start = max(0, min(best - longest // 10, len(text) - longest))
    return f"{'...' if start else ''}{text[start : start + longest]}{'...' if start + longest < len(text) else ''}"


def _query(arguments: Mapping[str, Any]) -> str:
    if set(arguments) != {"query"} or not isinstance(arguments["query"], str) or not arguments["query"].strip():
        raise Refused("it takes one argument, 'query', a text")
    return arguments["query"]
