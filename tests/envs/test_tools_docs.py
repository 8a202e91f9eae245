"""The page on tools: its example runs as it stands there, and what it says is said."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from rlft.config import Config
from rlft.envs.tools.calling import ToolsConfig
from rlft.settings import validate
from rlft.types import Task
from tests.envs.test_tools import called, play, told
from tests.test_docs import AROUND

PAGE = (Path(__file__).parents[2] / "docs" / "envs-tools.md").read_text()
TASK = Task("t", ({"role": "user", "content": "Pay 12.50 dollars."},), {"money": 10})


@pytest.fixture
def knobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ToolsConfig]:
    """The page's own first config, with its own file in the folder that rlft is started in."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    (tmp_path / "my_tools.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    block = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, re.S)[0])
    config: Config = validate(AROUND | block)
    assert isinstance(config.env, ToolsConfig)
    yield config.env.model_copy(update={"format": "hermes"})
    sys.modules.pop("my_tools", None)


def test_the_example_runs(knobs: ToolsConfig) -> None:
    two = called("convert", amount=10.0, to="USD") + called("python", code="10 * 1.25")
    first, second, last = play(knobs, two, called("pay", amount=10), "Paid.", task=TASK)
    assert told(first) == ["12.5", "12.5"]
    assert told(second) == ["0 euros are left"]
    assert (last.done, last.metrics["success"]) == (True, 1.0)


@pytest.mark.parametrize(("call", "error"), [
    ('<tool_call>{"a": 1 "b": 2}</tool_call>', "the call is no JSON"),
    (called("plus"), "there is no tool"),
    (called("convert", amount=1), "is missing"),
    (called("pay", amount=11), "ValueError"),
])  # fmt: skip
def test_the_table_of_errors_is_what_is_said(knobs: ToolsConfig, call: str, error: str) -> None:
    (turn,) = play(knobs.model_copy(update={"python": None}), call, task=TASK)
    said = re.sub(r"</?result>", "", told(turn)[0]).strip()
    assert error in said
    assert f"| `{said}` |" in PAGE


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)\n```\n", PAGE, re.S), ids=lambda text: text[:20])
def test_every_config_builds_but_for_what_it_needs(text: str) -> None:
    """With all its keys; the files and commands that it names are not there."""
    config = validate(AROUND | yaml.safe_load(text))
    assert config.env.type in ("tools", "python")
    assert config.env.several
