"""Every file in configs/ is a config that loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlft.build import material
from rlft.settings import dump, load
from rlft.types import InputError

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.rglob("*.yaml"))


def test_there_is_the_demo() -> None:
    assert FOLDER / "demo.yaml" in FILES


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(FOLDER)) for path in FILES])
def test_it_validates(path: Path, tmp_path: Path) -> None:
    config = load(path)
    again = tmp_path / "config.yaml"
    again.write_text(dump(config))
    assert load(again) == config


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(FOLDER)) for path in FILES])
def test_its_data_fit_a_model(path: Path, tiny_model: Path) -> None:
    """The rows, the columns and the adapter's fields are right; the lengths are counted by another tokenizer."""
    stuff = material(load(path, [f"model.path={tiny_model}"]))
    assert stuff.tasks or stuff.groups


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(FOLDER)) for path in FILES])
def test_a_typing_mistake_in_it_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match=r"learner\.lrr"):
        load(path, ["learner.lrr=1"])
