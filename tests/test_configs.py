"""Every file in configs/ is a config that loads."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlft.cli import app
from rlft.material import material
from rlft.settings import dump, load
from rlft.types import InputError
from tests.envs.libraries import skip_without

FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_there_is_the_demo() -> None:
    assert FOLDER / "demo.yaml" in FILES


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(FOLDER)) for path in FILES])
def test_it_validates(path: Path, tmp_path: Path) -> None:
    skip_without(path.read_text())
    config = load(path)
    again = tmp_path / "config.yaml"
    again.write_text(dump(config))
    assert load(again) == config


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(FOLDER)) for path in FILES])
def test_its_data_fit_a_model(path: Path, tiny_model: Path) -> None:
    """The rows, the columns and the adapter's fields are right; the lengths are counted by another tokenizer."""
    skip_without(path.read_text())
    stuff = material(load(path, [f"model.path={tiny_model}"]))
    assert stuff.tasks or stuff.groups


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(FOLDER)) for path in FILES])
def test_a_typing_mistake_in_it_is_refused(path: Path) -> None:
    with pytest.raises(InputError, match=r"learner\.lrr"):
        load(path, ["learner.lrr=1"])


def test_math_plans_on_gsm8k_too(gsm8k: str, tiny_model: Path) -> None:
    """Its questions, its worked answers and its configuration need no further key."""
    stuff = material(load(FOLDER / "math.yaml", [f"data.train={gsm8k}", f"model.path={tiny_model}"]))
    first = stuff.tasks[0]
    assert first.messages[-1]["content"].startswith("main: Ann has 1 apples")
    assert first.messages[-1]["content"].endswith("put the final answer into \\boxed{}.\n")
    assert first.info["answer"].endswith("#### 6")
    ran = CliRunner().invoke(
        app, ["plan", str(FOLDER / "math.yaml"), f"data.train={gsm8k}", f"model.path={tiny_model}"]
    )
    assert ran.exit_code == 0
    assert "8 tasks to train on" in ran.output
