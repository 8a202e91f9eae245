"""What the pages say must be what the code does: names, defaults, messages, links, and examples that work."""

from __future__ import annotations

import ast
import asyncio
import copy
import math
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
import yaml
from pydantic import BaseModel

from rlft.algorithms import catalog as algorithms
from rlft.algorithms.base import Algorithm, Outputs
from rlft.batch import Batch
from rlft.config import Config
from rlft.envs import catalog as envs
from rlft.envs.base import Action
from rlft.rewards import catalog as rewards
from rlft.settings import validate
from rlft.track import SCHEMA
from rlft.types import Sample, Task, Trajectory
from tests.envs.libraries import skip_without

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MINE = (
    "index",
    "concepts",
    "algorithms",
    "configs",
    "environments",
    "troubleshooting",
    "faults",
    "memory",
    "speed",
    "evaluation",
    "curriculum",
)
KINDS = tuple(path.stem for kind in ("rewards", "envs") for path in sorted(DOCS.glob(f"{kind}-*.md")))
PAGES = {name: (DOCS / f"{name}.md").read_text() for name in (*MINE, "rewards", "sync", *KINDS)}
FAMILIES = (
    "reward|completion|advantage|loss|learner|policy|kl|parity|tokens|sync|time|eval|value|preference|reference"
    "|curriculum"
)

# What an example that shows one block stands in.
AROUND: dict[str, Any] = {
    "name": "example",
    "steps": 1,
    "model": {"path": "smollm2-135m-q4"},
    "data": {"train": {"type": "generated"}},
    "reward": {"type": "number"},
    "algorithm": {"type": "grpo"},
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.S)


def rows(text: str) -> list[list[str]]:
    """The cells of every table row, without heads and rules."""
    found = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    heads = {i - 1 for i, row in enumerate(found) if set("".join(row)) <= set("-| ")}
    return [row for i, row in enumerate(found) if i not in heads and i - 1 not in heads]


def quoted(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@cache
def literals() -> list[str]:
    """Every string in the source; an f-string as its parts, {} where a value goes."""
    found = []
    for folder in ("rlft", "algorithms", "rewards", "envs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "{}" for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models(argument)]


def leaves(kind: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key, dotted, with its default as the page writes it; None where it is one type of a union."""
    for name, info in kind.model_fields.items():
        key, below = prefix + name, models(info.annotation)
        repeated = name in ("terms", "of", "gate", "verifier") or key == "eval.env"  # blocks that stand elsewhere
        if below and not repeated:
            for model in below:
                yield from leaves(model, f"{key}.")
            if info.is_required() or info.get_default() is not None:
                continue
        tag = name == "type" and len(get_args(info.annotation)) == 1
        default = None if tag else "required" if info.is_required() else info.get_default(call_default_factory=True)
        yield key, None if tag else "none" if default is None else default


def same(shown: str, default: Any) -> bool:
    """Whether a cell shows a default."""
    if isinstance(default, float) and not isinstance(default, bool):
        return float(shown) == default
    plain = list(default) if isinstance(default, tuple) else default
    return shown == plain or yaml.safe_load(shown) == plain


KEYS = list(leaves())


@pytest.mark.parametrize(("page", "names"), [
    ("algorithms", algorithms.names()), ("rewards", rewards.names()), ("environments", envs.names()),
])  # fmt: skip
def test_every_catalog_entry_has_a_row(page: str, names: list[str]) -> None:
    listed = {name for row in rows(PAGES[page]) for name in quoted(row[0])}
    assert set(names) <= listed


@pytest.mark.parametrize("name", algorithms.names())
def test_every_algorithm_has_a_section_with_its_knobs(name: str) -> None:
    section = re.split(r"^## ", PAGES["algorithms"], flags=re.M)
    (own,) = [part for part in section if part.startswith(f"{name}\n")]
    for knob in algorithms.entries()[name].model_fields:
        assert knob == "type" or f"`{knob}`" in own


@pytest.mark.parametrize(("key", "default"), KEYS, ids=[f"{key}-{i}" for i, (key, _) in enumerate(KEYS)])
def test_every_key_is_listed_with_its_default(key: str, default: Any) -> None:
    shown = [row[1] for row in rows(PAGES["configs"]) if key in quoted(row[0])]
    assert shown, f"docs/configs.md has no row for {key}"
    assert default is None or any(same(cell, default) for cell in shown), f"{key} is {default!r}, shown as {shown}"


def test_no_key_is_listed_that_is_gone() -> None:
    listed = {name for row in rows(PAGES["configs"]) if len(row) == 3 and row[1] for name in quoted(row[0])}
    dotted = {name for name in listed if "." in name}
    assert dotted <= {key for key, _ in KEYS}


def metric_names() -> list[str]:
    table = PAGES["concepts"].partition("### Names in metrics.jsonl")[2].partition("\n## ")[0]
    return [name for row in rows(table) for name in quoted(row[0])]


@pytest.mark.parametrize("name", metric_names())
def test_every_metric_on_the_page_is_written_somewhere(name: str) -> None:
    assert re.sub(r"<.*?>", "{}", name) in literals()


def test_every_metric_that_is_written_is_on_the_page() -> None:
    written = {text for text in literals() if re.fullmatch(rf"({FAMILIES})/[\w{{}}@]+", text)}
    shown = {re.sub(r"<.*?>", "{}", name) for name in metric_names()}
    assert {name for name in written if not name.endswith("@")} <= shown  # what stands before a number is no name


def test_every_column_of_the_rollouts_is_on_the_page() -> None:
    (row,) = [row for row in rows(PAGES["concepts"]) if row[0].startswith("`rollouts/")]
    assert set(SCHEMA.names) <= set(quoted(row[1]))


def test_messages_are_those_of_the_code() -> None:
    """What the first column quotes is a message, a metric or a setting."""
    page = PAGES["troubleshooting"]
    settings = re.compile(rf"rlft |[\w.]+(=|/|: )|({'|'.join(Config.model_fields)})\b")
    seen = 0
    for head, body in re.findall(r"^#{2,3} ([^\n]*)\n(.*?)(?=^#|\Z)", page, re.M | re.S):
        if head in ("Exit codes", "Out of memory"):
            continue
        for text in (text for row in rows(body) for text in quoted(row[0]) if not settings.match(text)):
            assert any(text in literal for literal in literals()), f"no message says {text!r}"
            seen += 1
    assert seen > 20
    for name in set(re.findall(rf"`((?:{FAMILIES})/\w+)`", page)):
        assert name in literals()


@pytest.mark.parametrize("page", MINE)
def test_links_resolve(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = DOCS / (file or f"{page}.md")
        assert path.is_file(), target
        heads = re.findall(r"^#+ (.*)", path.read_text(), re.M) if path.suffix == ".md" else []
        anchors = ["", *(re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads)]
        assert anchor in anchors, target


def test_the_index_lists_every_page() -> None:
    assert set(re.findall(r"\(([\w-]+)\.md\)", PAGES["index"])) == set(PAGES) - {"index"}


@pytest.mark.parametrize(
    ("page", "text"), [(page, text) for page in PAGES for text in blocks(page, "yaml")], ids=lambda value: value[:12]
)
def test_yaml_examples_are_valid(page: str, text: str) -> None:
    skip_without(text)
    shown = yaml.safe_load(text)
    config = validate(shown if "name" in shown else copy.deepcopy(AROUND) | shown)
    assert config.name


def test_the_examples_learn_from_what_they_say() -> None:
    online = {config["name"]: validate(config).online for config in map(yaml.safe_load, blocks("configs", "yaml"))}
    assert online == {"questions": True, "demonstrations": False, "best-of-eight": True}


@pytest.mark.parametrize(("page", "text"), [(p, t) for p in PAGES for t in blocks(p, "python")], ids=lambda v: v[:12])
def test_python_examples_compile(page: str, text: str) -> None:
    compile(text, f"docs/{page}.md", "exec")


def executed(page: str) -> ModuleType:
    (code,) = blocks(page, "python")
    module = ModuleType(page)
    exec(compile(code, f"docs/{page}.md", "exec"), module.__dict__)
    return module


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Algorithm:
    """The page's own algorithm, by the way a config takes."""
    (tmp_path / "my_algorithms.py").write_text(blocks("algorithms", "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    (block,) = map(yaml.safe_load, blocks("algorithms", "yaml"))
    return validate(copy.deepcopy(AROUND) | block).algorithm.build()


def two(gap: float) -> Batch:
    """A group of two, each a prompt of one token and one chosen token; the first is right.

    gap: how much more probable the first answer is now than when it was sampled.
    """

    def play(score: float) -> Trajectory:
        sample = Sample([5, 6], [False, True], [math.nan, -1.0], [0.0, 0.0], 0)
        return Trajectory(Task("t", ()), (), [sample], score=score)

    batch = Batch.of([(play(1.0), play(0.0))])
    old = batch.logprobs.clone()
    old[0, 1] -= gap
    return batch.with_(old_logprobs=old)


@pytest.mark.parametrize(("gap", "weight"), [(0.0, 1.0), (0.5, math.exp(0.5)), (3.0, 2.0)])
def test_the_own_algorithm_runs(own: Algorithm, gap: float, weight: float) -> None:
    batch = own.weigh(own.credit(two(gap)))
    logprobs = torch.tensor([[0.0, -1.0], [0.0, -1.0]], requires_grad=True)
    loss, metrics = own.loss(Outputs(logprobs, torch.zeros(2, 2)), batch)
    loss.backward()
    # scores 1 and 0: the std with n - 1 is 0.7071, so A = +-0.5 / 0.7072 = +-0.7070; each token weighs a half
    a = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert logprobs.grad is not None
    assert logprobs.grad.flatten().tolist() == pytest.approx([0.0, -weight * a / 2, 0.0, a / 2], rel=1e-5)
    assert loss.item() == pytest.approx((weight - 1) * a / 2, abs=1e-6)
    assert metrics["policy/capped"].value == (0.5 if weight == 2.0 else 0.0)
    assert "min(r, 2)" in own.formula


def test_the_environment_of_several_turns() -> None:
    guess = executed("environments").Guess
    question = ({"role": "user", "content": "Guess."},)

    async def episode(*said: str) -> list[Any]:
        env = guess(Task("t", question, {"answer": 40}))
        assert await env.reset() == question
        turns = [await env.step(Action(text, "stop")) for text in said]
        await env.close()
        return turns

    low, high, odd, right = asyncio.run(episode("7", " 50 ", "forty", "40"))
    assert [turn.messages[0]["content"] for turn in (low, high, odd)] == ["Higher.", "Lower.", "Only a number."]
    assert not low.done
    assert (right.done, right.reward, right.messages) == (True, 1.0, ())
    *_, last = asyncio.run(episode(*"1234567"))
    assert (last.done, last.reward) == (True, 0.0)


@pytest.mark.parametrize("page", MINE)
def test_pages_name_no_machine(page: str) -> None:
    assert not re.search(r"/(work|home|root|tmp)/", PAGES[page])


def test_no_placeholder_is_left_in_what_people_read() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text()
        for word in ("TODO", "FIXME", "DEMO" + "_OUTPUT", "XXX"):
            assert word not in text, f"{page.name} still holds {word}"
