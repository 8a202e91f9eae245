"""Curves of runs as a picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlft.cli import app
from rlft.curves import ACCURACY, draw, read, series
from rlft.types import InputError

ROWS = [
    {"step": 0, ACCURACY: 0.1, f"{ACCURACY}_low": 0.05, f"{ACCURACY}_high": 0.2},
    {"step": 1, "reward/mean": 0.5},
    {"step": 2, "reward/mean": 9.0},
    {"step": 2, "reward/mean": 0.7, ACCURACY: 0.4, f"{ACCURACY}_low": 0.3, f"{ACCURACY}_high": 0.5},
    {"step": 3, "reward/mean": float("nan")},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path / "run"


def test_the_later_row_of_a_step_counts_and_what_is_no_number_is_left_out(run: Path) -> None:
    assert series(read(run), "reward/mean") == ([1.0, 2.0], [0.5, 0.7])
    assert series(read(run), ACCURACY) == ([0.0, 2.0], [0.1, 0.4])
    assert series(read(run), "else") == ([], [])


def test_runs_are_drawn_beside_each_other(run: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    ran = CliRunner().invoke(app, ["plot", str(run), str(run), "--to", str(tmp_path / "new/curves.png")])
    assert ran.exit_code == 0, ran.output
    drawn = image.imread(tmp_path / "new/curves.png")
    assert drawn.shape[:2] == (480, 1200)
    assert drawn[..., :3].std() > 0.05, "it is not blank"


def test_what_cannot_be_drawn_is_refused(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match=r"curves\.mp3 ends in \.mp3, and can end in .*png"):
        draw([run], tmp_path / "curves.mp3")
    with pytest.raises(InputError, match=r"holds no metrics\.jsonl"):
        draw([tmp_path], tmp_path / "curves.png")
    assert not list(tmp_path.glob("curves*"))
