"""Who may import whom, read from the source with `ast`; and the engine room never names an algorithm.

To add a module, add its line to MAY_IMPORT. A module that has none may import `types` and nothing else of rlft.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlft.algorithms import catalog

ROOT = Path(__file__).parent.parent
FOLDERS = {"rlft": "rlft", "rlft.algorithms": "algorithms", "rlft.rewards": "rewards", "rlft.envs": "envs"}
ANYTHING = "anything"

# Names without the leading "rlft.". A package stands for all its modules (a package may always import itself);
# every module may import `types` and rlft's version.
MAY_IMPORT: dict[str, set[str]] = {
    "types": set(),
    "batch": set(),
    "peek": set(),
    "tiny": set(),
    "models": {"lock", "tiny"},
    "chat": set(),
    "lock": set(),
    "whole": set(),
    "chance": set(),
    "generated": set(),
    "formula": set(),
    "templates": {"formula"},
    "steps": set(),
    "reasoning": set(),
    "rows": {"config_data", "generated", "reasoning", "templates"},
    "wording": set(),
    "data": {"chat", "rows", "steps"},
    "directions": set(),
    "kernels": set(),
    "prefix": {"batch"},
    "segments": set(),
    "packing": {"batch", "prefix", "segments"},
    "head": {"kernels", "packing"},
    # what is learned, the verdicts and the worlds never see each other, nor the engine
    "algorithms": {"batch"},
    # but a trained reward model must read a conversation as it did in training, through the same renderer
    "rewards": {"reasoning", "steps", "chat", "threads", "sandbox"},
    "envs": {"threads", "sandbox", "listening"},
    # sampling
    "engine": {"lock", "models", "swap"},
    "threads": set(),
    "sandbox": set(),
    "episode": set(),
    "together": set(),
    "asking": {"chat", "envs.base", "episode"},
    "player": {"asking", "earlier", "engine.base", "chat", "envs.base", "episode"},
    "fork": {"player"},
    "draws": {"chat", "episode", "fork", "player", "together"},
    "recover": {"chance"},
    "roles": set(),
    "earlier": {"roles"},
    "rollout": {"player", "draws", "recover", "roles", "together"},
    "source": {"earlier", "explore", "player", "rollout"},
    "curriculum": {"player", "rows", "source"},
    "ahead": {"chance", "source"},
    "explore": {"episode", "player"},
    "interval": set(),
    "vote": {"config_eval", "interval", "rewards.base"},
    "evaluate": {"interval", "player", "recover", "rollout", "vote"},
    # learning
    "swap": set(),
    "allocation": set(),
    "fused": {"kernels"},
    "policy": {"allocation", "fused", "models", "swap"},
    "reference": {"policy", "swap"},
    "ranks": set(),
    "forward": {"policy", "batch", "head", "prefix", "packing", "kernels", "algorithms.base"},
    "schedule": set(),
    "stepper": {"batch", "policy", "reference", "schedule"},
    "own": {"policy", "batch", "forward", "packing", "swap", "algorithms.base"},
    "parity": {"policy", "batch", "algorithms.base"},
    "learner": {
        "parity",
        "own",
        "policy",
        "batch",
        "packing",
        "kernels",
        "forward",
        "ranks",
        "reference",
        "schedule",
        "spans",
        "stepper",
        "algorithms.base",
    },
    "sync": {"engine.base", "lock", "policy", "batch", "spans"},
    "spans": set(),
    "profiling": {"spans", "trainer", "whole"},
    "past": {"earlier", "policy", "swap"},
    "agents": {"algorithms.base", "batch", "engine.base", "learner", "parity", "past", "policy", "swap", "sync"},
    "case": {"batch", "chat", "engine.base", "learner", "parity"},
    "causes": {"batch", "case", "engine.base", "learner", "parity", "policy", "swap"},
    # the run
    "track": {"whole"},
    "checkpoint": {"agents", "allocation", "chance", "learner", "past", "source", "whole"},
    "trainer": {"agents", "chance", "source", "algorithms.base", "batch", "parity"},
    "config_data": {"curriculum.catalog", "peek", "reasoning", "wording"},
    "config_agents": {"config_data"},
    "config_eval": {"config_data", "envs.catalog", "rewards.catalog"},
    "config_memory": {"config_data"},
    "config_parity": {"config_data"},
    "config_rollout": {"config_data"},
    "config": {
        "config_memory",
        "config_parity",
        "config_rollout",
        "curriculum.catalog",
        "allocation",
        "config_agents",
        "config_eval",
        "config_data",
        "algorithms.catalog",
        "rewards.catalog",
        "envs.catalog",
    },
    "secrets": set(),
    "settings": {"config", "secrets", "rewards.base", "rewards.catalog", "envs.base", "envs.catalog"},
    "listening": set(),
    "serve_reward": {"listening", "rewards.base", "rewards.served.wire", "settings"},
    "serve_env": {"envs.base", "envs.placed", "envs.wire", "listening", "settings"},
    "serve_policy": {
        "after",
        "build",
        "material",
        "checkpoint",
        "config",
        "envs.agent",
        "envs.agent_chat",
        "envs.agent_endpoint",
        "envs.agent_start",
        "envs.base",
        "listening",
        "player",
        "session",
        "settings",
    },
    "serve_judge": {"engine.quiet", "models"},
    "terminal": {"interval"},
    "faults": {"checkpoint", "secrets", "stepper", "track", "whole"},
    "guards": set(),
    "hooks": {
        "agents",
        "batch",
        "build",
        "material",
        "chance",
        "checkpoint",
        "faults",
        "terminal",
        "track",
        "evaluate",
        "guards",
        "interval",
    },
    "serving": {"config_rollout", "build", "material", "config", "engine", "faults", "policy", "sync"},
    "unfit": {"config", "rows"},
    "material": {ANYTHING},
    "build": {ANYTHING},
    # memory, before a weight is loaded
    "memory": set(),
    "machine": set(),
    "heap": set(),
    "footprint": {"forward", "fused", "head", "heap", "kernels", "packing", "policy", "segments"},
    "workload": {"algorithms.base", "build", "material", "config", "footprint", "packing"},
    "forecast": {
        "config_rollout",
        "build",
        "material",
        "config",
        "footprint",
        "forward",
        "machine",
        "memory",
        "models",
        "packing",
        "rewards.judge",
        "segments",
        "workload",
    },
    "afford": {"config_rollout", "config", "memory"},
    "fits": {"afford", "build", "material", "config", "forecast", "machine", "memory"},
    # what a command does
    "session": {
        "agents",
        "build",
        "material",
        "case",
        "causes",
        "chat",
        "parity",
        "profiling",
        "chance",
        "checkpoint",
        "config",
        "environment",
        "faults",
        "fits",
        "hooks",
        "lock",
        "settings",
        "terminal",
        "track",
        "trainer",
        "whole",
    },
    "judging": {"build", "material", "rewards.base", "rewards.judges"},
    "plan": {
        "config_rollout",
        "judging",
        "build",
        "material",
        "config",
        "fits",
        "footprint",
        "algorithms.catalog",
        "rewards.catalog",
        "envs.catalog",
    },
    "after": {
        "interval",
        "build",
        "material",
        "config",
        "settings",
        "session",
        "chat",
        "checkpoint",
        "learner",
        "models",
        "policy",
    },
    "environment": {"config", "models", "whole"},
    "replay": {
        "algorithms.base",
        "batch",
        "build",
        "material",
        "checkpoint",
        "config",
        "draws",
        "learner",
        "session",
        "track",
        "rewards.base",
    },
    "explain": {"algorithms.base", "batch", "replay", "session", "track"},
    "tables": set(),
    "curves": {"whole"},
    "audit": {"rewards.base", "rows", "settings"},
    "pairs": {"build", "material", "checkpoint", "session", "settings", "whole"},
    "doctor": {"engine.vllm", "lock", "models", "checkpoint", "environment", "session"},
    "cli": {
        "curves",
        "secrets",
        "session",
        "trainer",
        "settings",
        "plan",
        "after",
        "doctor",
        "terminal",
        "pairs",
        "replay",
        "explain",
        "audit",
        "serve_reward",
        "serve_env",
        "serve_policy",
        "serve_judge",
        "tables",
    },
}

# Catalog names that are ordinary English besides, so that rlft/ may use them as words.
ORDINARY_WORDS = {"custom": "says that something is the user's own"}


def sources() -> Iterator[tuple[str, Path]]:
    """Every module of the project: its full name and its file."""
    for package, folder in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join([package, *parts]).removesuffix(".__init__"), path


MODULES = dict(sources())


def resolve(name: str) -> str:
    """The module in which a dotted name lives: `rlft.types.Task` lives in `rlft.types`."""
    while name not in MODULES and "." in name:
        name = name.rpartition(".")[0]
    return name


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and module of every import of rlft in the source, wherever it stands (functions, TYPE_CHECKING)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base]).rstrip(".")
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] in ("rlft", "algorithms", "rewards", "envs"):
                yield node.lineno, resolve(name)


def unit(module: str) -> str:
    """The entry of the table that a module belongs to: `rlft.engine.vllm` belongs to `engine`."""
    return module.removeprefix("rlft").lstrip(".").split(".")[0]


def allowed(importer: str, target: str) -> bool:
    """Whether the table lets module `importer` import module `target`, both by full name."""
    name = target.removeprefix("rlft").lstrip(".")
    if name in ("", "types") or unit(importer) == unit(target):
        return True
    may = MAY_IMPORT.get(unit(importer), set())
    return ANYTHING in may or any(name == entry or name.startswith(f"{entry}.") for entry in may)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports in `source`, as lines to print, that the table forbids to `module`."""
    found = imported(ast.parse(source), module, is_package)
    return [f"{module}:{line} imports {target}" for line, target in found if not allowed(module, target)]


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_table(module: str) -> None:
    path = MODULES[module]
    assert violations(path.read_text(), module, path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("rlft.algorithms.losses", "from rlft.engine import base"),
        ("rlft.algorithms.losses", "import rlft.rewards.base"),
        ("rlft.rewards.math", "from rlft.batch import Batch"),
        ("rlft.rewards.math", "def f():\n    from ..envs import base"),
        ("rlft.envs.single_turn", "from rlft import rollout"),
        ("rlft.learner", "from rlft.algorithms import catalog"),
        ("rlft.learner", "import algorithms.base"),
        ("rlft.trainer", "from .engine.vllm import Vllm"),
        ("rlft.types", "from rlft.batch import Batch"),
        ("rlft.unknown", "from rlft.batch import Batch"),
    ],
)
def test_a_forbidden_import_is_seen(module: str, source: str) -> None:
    assert len(violations(source, module)) == 1


def test_the_table_lists_no_module_that_is_gone() -> None:
    there = {unit(module) for module in MODULES}
    assert set(MAY_IMPORT) <= there


def test_types_need_only_the_standard_library() -> None:
    for node in ast.walk(ast.parse(MODULES["rlft.types"].read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert all(name.split(".")[0] in sys.stdlib_module_names for name in names)


def test_the_package_itself_imports_the_standard_library_only() -> None:
    tree = ast.parse(MODULES["rlft"].read_text())
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(tree))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert names <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", [name for name in catalog.names() if name not in ORDINARY_WORDS])
def test_the_engine_room_names_no_algorithm(name: str) -> None:
    word = re.compile(rf"(?<![a-z]){re.escape(name)}(?![a-z])", re.IGNORECASE)
    for path in sorted((ROOT / "rlft").rglob("*.py")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            assert not word.search(line), f"{path.relative_to(ROOT)}:{number} names {name}: {line.strip()}"
