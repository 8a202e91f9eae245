"""A reward held against cases: counts by hand, and what a user gets to see."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlft.audit import audit
from rlft.cli import app
from rlft.types import InputError

PAGE = (Path(__file__).parents[1] / "docs/rewards-guards.md").read_text()


def write(folder: Path, rows: list[dict[str, Any]], reward: str = "{type: number}") -> tuple[Path, Path]:
    config, cases = folder / "reward.yaml", folder / "cases.jsonl"
    config.write_text(f"reward: {reward}\n")
    cases.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config, cases


def test_the_example_of_the_page(tmp_path: Path):
    config, cases = tmp_path / "reward.yaml", tmp_path / "cases.jsonl"
    [text] = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
    config.write_text(text)
    [rows] = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    cases.write_text(rows)
    result = CliRunner().invoke(app, ["audit", str(config), str(cases)])
    assert result.exit_code == 0
    said = re.sub(r"[^\w.,()%\n]+", " ", result.stdout)
    [shown] = re.findall(r"```text\n(.*?)```", PAGE, re.S)
    for line in shown.splitlines():
        assert re.sub(r"[^\w.,()%]+", " ", line) in said
    assert "I counted 3, then 12" in said
    assert "So it is 12" not in said
    assert CliRunner().invoke(app, ["audit", str(config), str(cases), "--strict"]).exit_code == 1


def test_what_has_no_score_is_a_mistake_and_told(tmp_path: Path):
    rows = [{"completion": "$9^{9^{9^9}}$", "answer": "9", "good": False}, {"completion": "9", "answer": "9"}]
    done = audit(*at(write(tmp_path, rows, "{type: math, seconds: 0.3}")), label="good", threshold=0.5)
    assert done.verdicts == [None, 1.0]
    assert (done.count(False, None), done.count(None, True), done.mistakes) == (1, 1, [0])


def test_a_verdict_at_the_threshold_passes(tmp_path: Path):
    written = write(tmp_path, [{"completion": "x", "good": True}], "{type: length, limit: 2}")  # one word of two: 0.5
    done = audit(*at(written), label="good", threshold=0.5)
    assert (done.verdicts, done.count(True, True)) == ([0.5], 1)


def at(paths: tuple[Path, Path]) -> tuple[Path, list[str], Path]:
    return paths[0], [], paths[1]


def test_rows_of_one_prompt_are_one_group(tmp_path: Path):
    """The shorter of two gets 0.5, the longer -0.5: by itself each would get 0."""
    rows = [{"prompt": "q", "completion": text, "answer": 1, "ok": "yes"} for text in ("1", "so then it is 1")]
    written = write(tmp_path, rows, "{type: relative_length, of: {type: number}}")
    assert audit(*at(written), label="ok", threshold=0).verdicts == [0.5, -0.5]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"answer": 1, "good": True}, r"row 1: `completion` is missing"),
        ({"completion": "1", "answer": 1, "good": "maybe"}, r"row 1: `good` holds 'maybe'"),
        ({"completion": "1", "good": True}, "column 'answer' is missing"),
    ],
)
def test_bad_rows_are_named(row: dict[str, Any], says: str, tmp_path: Path):
    with pytest.raises(InputError, match=says):
        audit(*at(write(tmp_path, [row])), label="good", threshold=0.5)


def test_bad_files_and_rewards_are_named(tmp_path: Path):
    config, cases = write(tmp_path, [{"completion": "1", "answer": 1}])
    with pytest.raises(InputError, match="no file"):
        audit(config, [], tmp_path / "none.jsonl", "good", 0.5)
    config.write_text("reward: {type: per_turn, of: {type: number}}\n")
    with pytest.raises(InputError, match="audit the reward inside it"):
        audit(config, [], cases, "good", 0.5)
