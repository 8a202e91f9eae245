"""What must not be read, and what must not be written: pickles, secrets, and paths that a row of data would choose."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlft.models import locate
from rlft.policy import Policy
from rlft.secrets import hidden
from rlft.settings import dump, load, shown
from rlft.types import InputError

SECRET = "sk-live-7f3b9a1c55d0"
ROOT = Path(__file__).parents[1]
REWARD = """
def judged(trajectory, api_key, region):
    if trajectory.task.id.endswith(":2"):
        raise ValueError(f"the judge refused {api_key}")
    return float(len(api_key) + trajectory.length % 2)
"""


def plain(folder: Path, model: str, **more: Any) -> dict[str, Any]:
    rows = [{"prompt": f"Say {i}", "name": "../../out", "id": f"../../{i}", "path": "/etc/passwd"} for i in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"api_key": "${oc.env:JUDGE_KEY}", "region": "${oc.env:REGION,north}"}
    return {
        "name": "kept",
        "steps": 2,
        "out": str(folder / "run"),
        "model": {"path": model},
        "adapter": {"type": "lora", "r": 2, "target_modules": "all-linear"},
        "data": {"train": "rows.jsonl"},
        "reward": {"type": "custom", "path": "judges:judged", "options": options},
        "rollout": {"engine": {"type": "local"}, "tasks_per_step": 4, "group_size": 2, "sampling": {"max_tokens": 4}},
        "algorithm": {"type": "grpo"},
        "learner": {"lr": "${oc.env:RATE}"},
        "track": ["tensorboard"],
        **more,
    }  # fmt: skip


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    monkeypatch.setenv("RATE", "0.01")
    path = tmp_path / "kept.yaml"
    path.write_text(yaml.safe_dump(plain(tmp_path, "tiny-random")))
    return path


def test_text_from_the_environment_is_written_as_its_name(file: Path) -> None:
    """And is there all the same; numbers are written, so that a run can be told from its config."""
    config = load(file)
    options = config.model_dump()["reward"]["options"]
    assert options == {"api_key": SECRET, "region": "north"}
    written = yaml.safe_load(dump(config))
    assert written == shown(config)
    assert written["reward"]["options"] == {"api_key": "${oc.env:JUDGE_KEY}", "region": "${oc.env:REGION,north}"}
    assert written["learner"]["lr"] == 0.01
    file.write_text(dump(config))
    assert load(file).model_dump() == config.model_dump()


def test_an_override_may_name_the_environment(file: Path) -> None:
    config = load(file, ["reward.options.region=${oc.env:JUDGE_KEY}", "steps=5"])
    assert config.model_dump()["reward"]["options"]["region"] == SECRET
    assert SECRET not in dump(config)


@pytest.mark.parametrize(
    "written",
    ["${ oc.env:JUDGE_KEY}", "Bearer ${oc.env:JUDGE_KEY}", "${reward.options.api_key}", "Bearer ${.api_key}",
     "${oc.env:JUDGE_KEY,none}"],
)  # fmt: skip
def test_no_spelling_brings_it_into_what_is_written(file: Path, written: str) -> None:
    config = load(file, [f"reward.options.header='{written}'"])
    assert SECRET in config.model_dump()["reward"]["options"]["header"]
    assert SECRET not in dump(config) + json.dumps(shown(config))
    assert hidden(f"401: bad key {SECRET}") == "401: bad key ${oc.env:JUDGE_KEY}"
    file.write_text(dump(config))
    assert load(file).model_dump() == config.model_dump()


def test_what_only_looks_like_a_reference_is_read_as_it_stands(file: Path) -> None:
    written = yaml.safe_load(file.read_text())
    written["reward"]["options"]["pattern"] = r"\${x}"
    file.write_text(yaml.safe_dump(written))
    config = load(file)
    assert config.model_dump()["reward"]["options"]["pattern"] == "${x}"
    assert shown(config)["reward"]["options"]["pattern"] == "${x}"
    file.write_text(dump(config))
    assert load(file).model_dump() == config.model_dump()


def test_a_path_from_the_environment_is_the_same_from_the_runs_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/rows.jsonl").write_text('{"prompt": "x"}\n')
    monkeypatch.setenv("DD", "d")
    config = load(file, ["data.train={type: file, path: '${oc.env:DD}/rows.jsonl'}"])
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(dump(config))
    assert load(tmp_path / "run/config.yaml").model_dump() == config.model_dump()


def test_a_variable_that_is_not_set_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(InputError, match="JUDGE_KEY"):
        load(file)


@pytest.mark.parametrize("key", ["api_key", "apikey", "OPENAI_API_KEY", "hf_token", "access_token", "client_secret"])
def test_a_secret_that_is_written_out_is_refused(file: Path, key: str) -> None:
    with pytest.raises(InputError, match=rf"reward.options.{key}: .*oc.env") as caught:
        load(file, [f"reward.options.{key}={SECRET}"])
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", ["max_tokens", "end_token", "pad_token", "keyboard", "secretary", "tokens"])
def test_a_name_that_only_sounds_like_one_is_not(file: Path, name: str) -> None:
    assert load(file, [f"reward.options.{name}=x"]).model_dump()["reward"]["options"][name] == "x"


def test_a_message_does_not_tell_it(file: Path) -> None:
    with pytest.raises(InputError, match=r"learner.optimizer") as caught:
        load(file, ["learner.optimizer=${oc.env:JUDGE_KEY}"])
    assert SECRET not in str(caught.value)
    assert "${oc.env:JUDGE_KEY}" in str(caught.value)
    assert hidden(f"url?key={SECRET}&x") == "url?key=${oc.env:JUDGE_KEY}&x"


def files_with(folder: Path, word: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and word in path.read_bytes()]


@pytest.mark.slow
def test_no_file_of_a_run_holds_the_secret_and_no_row_chooses_a_path(tmp_path: Path, tiny_model: Path) -> None:
    """Config, metrics, trackers, failures, the log, the terminal; a failed reward names it, and it is taken out."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / "judges.py").write_text(REWARD)
    path = inner / "kept.yaml"
    path.write_text(yaml.safe_dump(plain(inner, str(tiny_model), faults={"reward": 0.5})))
    environment = {**os.environ, "JUDGE_KEY": SECRET, "RATE": "0.01"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])

    def rlft(*arguments: str) -> str:
        command = [sys.executable, "-m", "rlft.cli", *arguments]
        done = subprocess.run(command, env=environment, cwd=inner, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    said = rlft("train", str(path)) + rlft("resume", str(inner / "run"), "steps=3")
    made = {p for p in tmp_path.rglob("*") if p.is_file() and "__pycache__" not in p.parts} - before
    assert made
    assert all((inner / "run") in p.parents for p in made), "a row of data chose where to write"
    failures = (inner / "run/failures.jsonl").read_text()
    assert "the judge refused ${oc.env:JUDGE_KEY}" in failures
    assert SECRET not in said
    assert not files_with(inner / "run", SECRET.encode())
    assert any("tfevents" in p.name for p in made), "a tracker was given the config"


# --- pickles ----------------------------------------------------------------------------------------------------------


class Trap:
    """Unpickling one leaves a file behind."""

    def __init__(self, to: Path) -> None:
        self.to = to

    def __reduce__(self) -> Any:
        return Path.touch, (self.to,)


def test_pickled_weights_are_not_read(tmp_path: Path, tiny_model: Path) -> None:
    """A model whose weights are a pickle, and an adapter whose are: refused, and nothing in them runs."""
    model, adapter, sprung = tmp_path / "model", tmp_path / "adapter", tmp_path / "sprung"
    for folder, name in ((model, "pytorch_model.bin"), (adapter, "adapter_model.bin")):
        folder.mkdir()
        torch.save(Trap(sprung), folder / name)
    (model / "config.json").write_text((tiny_model / "config.json").read_text())
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "task_type": "CAUSAL_LM"}')
    with pytest.raises(InputError, match=r"model\.path.*pickled.*safetensors"):
        locate(str(model))
    with pytest.raises(InputError, match=r"model\.path.*does not load"):
        Policy(model, None, device="cpu")
    with pytest.raises(InputError, match=r"adapter\.path.*pickled.*safetensors"):
        Policy(tiny_model, {"type": "saved", "path": str(adapter)}, device="cpu")
    assert not sprung.exists()


def test_no_module_reads_a_pickle_or_runs_a_models_code_unasked() -> None:
    """But the pipes between a run and the processes of its own environments, both of whose ends are its own."""
    found = {}
    for folder in ("rlft", "algorithms", "rewards", "envs"):
        for path in sorted((ROOT / folder).glob("**/*.py")):
            words = re.findall(r"torch\.load|pickle\.loads?\b|np\.load|joblib|trust_remote_code=True", path.read_text())
            if words:
                found[path.name] = words
    assert found == {"child.py": ["pickle.load"] * 2, "process.py": ["pickle.loads"]}
