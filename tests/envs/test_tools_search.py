"""Search over a file: which documents are found, in which order, and what of them is shown."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest

from rlft.envs.tools.calling import ToolsConfig
from rlft.envs.tools.search import Index, snippet
from rlft.types import InputError
from tests.envs.test_tools import called, play, told

pytest.importorskip("bm25s")
DOCUMENTS = [
    {"title": "Cats", "text": "The cat sleeps. A cat hunts mice at night."},
    {"title": "Dogs", "text": "The dog barks at the postman."},
    {"text": "Mice eat cheese, and the owl eats mice."},
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(map(json.dumps, DOCUMENTS)) + "\n\n")
    return path


def knobs(file: Path, **corpus: Any) -> ToolsConfig:
    return ToolsConfig.model_validate({"corpus": {"file": str(file), **corpus}, "format": "hermes"})


def test_scores_are_bm25_s_by_hand() -> None:
    """Lucene's form with k1 = 1.5 and b = 0.75, over documents of 1, 3 and 2 words, two of which hold the word."""
    index = Index([("", "owl"), ("", "owl owl cheese"), ("", "mouse cheese")])
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    by_hand = [idf * n / (n + 1.5 * (0.25 + 0.75 * length / 2)) for n, length in ((1, 1), (2, 3))]
    scores = index._weights.get_scores(["owl"])
    assert scores[:2] == pytest.approx(by_hand, rel=1e-5)
    assert [text for _, text in index.best("owl", 5)] == ["owl", "owl owl cheese"]
    assert by_hand[0] > by_hand[1]


def test_equal_documents_keep_their_order_and_others_are_left_out() -> None:
    index = Index([(str(i), "owl") for i in range(9)] + [("no", "mouse")])
    assert [title for title, _ in index.best("The owl", 20)] == [str(i) for i in range(9)]
    assert index.best("elephant", 5) == []
    assert index.best("", 5) == []


def test_a_search_shows_the_best_documents(file: Path) -> None:
    first, none, wrong = play(
        knobs(file, top=2), called("search", query="mice?"), called("search", query="zebra"), called("search", q="x")
    )
    assert told(first) == [
        "[1]\nMice eat cheese, and the owl eats mice.\n\n[2] Cats\nThe cat sleeps. A cat hunts mice at night."
    ]
    assert told(none) == ["Nothing was found."]
    assert "it takes one argument, 'query'" in told(wrong)[0]


def test_a_snippet_is_where_the_words_are() -> None:
    text = "alpha " * 30 + "the red fox " + "omega " * 30 + "fox " + "beta " * 30
    shown = snippet(text, "red fox?", 40)
    assert shown.startswith("...")
    assert shown.endswith("...")
    assert "the red fox" in shown
    assert len(shown) == 46
    assert snippet("short", "x", 40) == "short"
    assert snippet(text, "zebra", 40) == text[:40] + "..."


def test_a_snippet_of_a_text_full_of_the_words_takes_no_time() -> None:
    text = "fox " * 50000 + "red fox " + "fox " * 50000
    began = time.monotonic()
    assert "red" in snippet(text, "the red fox", 40)
    assert time.monotonic() - began < 1


def test_a_line_of_a_corpus_ends_where_the_file_s_does(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "the owl\u2028sleeps\u0085now \u00e9"}\n{"text": "a dog"}\n', encoding="utf-8")
    (turn,) = play(knobs(path), called("search", query="owl"))
    assert told(turn) == ["[1]\nthe owl\u2028sleeps\u0085now \u00e9"]
    path.write_bytes(b'{"text": "the owl \xe9"}')
    with pytest.raises(InputError, match=r"corpus\.jsonl is no UTF-8"):
        knobs(path).build()


@pytest.mark.parametrize(("lines", "reason"), [
    ('{"text": "a b"}\n{"title": "x"}', "line 2 is no JSON object with a `text`"),
    ('["a"]', "line 1 is no JSON object"),
    ("text", "line 1 is no JSON object"),
    ('{"text": 3}', "line 1 is no JSON object"),
    ("", "holds no text"),
])  # fmt: skip
def test_a_file_that_is_no_corpus_is_refused(tmp_path: Path, lines: str, reason: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(lines)
    with pytest.raises(InputError, match=reason):
        knobs(path).build()


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        knobs(tmp_path / "nothing.jsonl").build()
