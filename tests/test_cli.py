"""The command line as a newcomer tries it: exit codes, one clear message, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

import rlft.cli as cli

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [{"ask": f"Say {a} and {b}", "gold": a} for a, b in zip("abcdef", "bcdefg", strict=True)]
REWARD = '''
def share(trajectory, fail=False):
    """The share of sampled tokens whose id is small."""
    if fail:
        raise ValueError("the grader fell over")
    said = [t for s in trajectory.samples for t, chosen in zip(s.tokens, s.mask) if chosen]
    return sum(token < 100 for token in said) / len(said)
'''


@dataclass
class Result:
    """What a command left on the screen."""

    code: int
    out: str
    err: str

    def refused(self, code: int = 2) -> str:
        """The one message of a command that failed."""
        assert self.code == code, self
        assert "Traceback" not in self.out + self.err
        lines = [line for line in self.err.splitlines() if line.startswith("rlft: ")]
        assert len(lines) == 1, self.err
        return self.err[self.err.index("rlft: ") :]


Rlft = Callable[..., Result]


@pytest.fixture
def rlft(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Rlft:
    """rlft("train", path, ...) runs the program in this process."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["rlft", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return Result(int(ended.value.code or 0), out, err)

    return run


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "rlft_cli_rewards.py").write_text(REWARD)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


def write(folder: Path, model: Path, **changes: Any) -> Path:
    """A config with its data in `folder`; the run goes to `folder/run`."""
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS[:2]))
    plain: dict[str, Any] = {
        "name": "toy",
        "steps": 2,
        "out": str(folder / "run"),
        "model": {"path": str(model), "device": "cpu"},
        "adapter": {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "data": {"train": "train.jsonl", "eval": "held.jsonl", "columns": {"prompt": "ask"}},
        "reward": {"type": "custom", "path": "rlft_cli_rewards:share"},
        "rollout": {"engine": {"type": "local"}, "tasks_per_step": 2, "group_size": 4, "sampling": {"max_tokens": 6}},
        "algorithm": {"type": "grpo"},
        "learner": {"lr": 0.02},
    }
    for dotted, value in changes.items():
        *path, leaf = dotted.split("__")
        block: Any = plain
        for part in path:
            block = block.setdefault(part, {})
        block[leaf] = value
    (folder / "toy.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    return folder / "toy.yaml"


@pytest.fixture
def config(tmp_path: Path, tiny_model: Path, rewards: Path) -> Path:
    return write(tmp_path / "toy", tiny_model)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rewards: Path) -> Path:
    """The folder of a run that is done, trained by the program."""
    from rlft.session import begin
    from rlft.settings import load
    from rlft.terminal import Terminal

    path = write(tmp_path_factory.mktemp("finished"), tiny_model, steps=3, show__every=2)
    assert begin(load(path), Terminal()) == 0
    return path.parent / "run"


def program(arguments: Sequence[object], rewards: Path, **environment: str) -> subprocess.Popen[str]:
    """The installed program, in a session of its own as a terminal would start it."""
    settings = {"PYTHONPATH": str(rewards), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", "rlft.cli", *map(str, arguments)],
        env=os.environ | settings | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str]) -> Result:
    """Wait for a program; nobody whom it started is left."""
    out, err = process.communicate(timeout=240)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return Result(process.returncode, out, err)


def steps(run: Path) -> list[int]:
    """The steps in metrics.jsonl, all of whose lines are whole."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    assert not text or text.endswith("\n")
    return [json.loads(line)["step"] for line in text.splitlines()]


def scraps(folder: Path) -> list[Path]:
    """Whatever has a temporary name."""
    return [path for path in folder.rglob("*") if "writing" in path.name]


# What is wrong before anything begins: exit 2, no folder.


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["learner.lrr=1"], ["learner.lrr: there is no such key", "did you mean 'lr'?"]),
        (["algorithm.type=grop"], ["algorithm.type", "'grop'", "did you mean 'grpo'?"]),
        (["reward.type=numbr"], ["reward.type", "'numbr'", "did you mean 'number'?"]),
        (["adapter.type=lorra"], ["adapter.type: there is no adapter 'lorra'", "did you mean 'lora'?"]),
        (["adapter.rank=4"], ["adapter.rank: LoraConfig of PEFT has no such field"]),
        (["rollout.group_size=1"], ["rollout.group_size: grpo", "2 or more"]),
        (["rollout.sampling.top_p=0.9"], ["top_p=0.9", "Leave top_p at 1"]),
        (["adapter.lora_dropout=0.1"], ["adapter.lora_dropout"]),
        (["eval.accuracy=right"], ["eval.accuracy", "'right'", "custom"]),
        (["data.columns.completion=gold"], ["data.columns.completion: grpo"]),
        (["algorithm.type=sft"], ["train: 6 row(s) where completion is empty, null or missing: 1, 2, 3, 4, 5 ..."]),
        (["data.train=gone.jsonl"], ["data", "there is no file", "gone.jsonl"]),
        (["data.columns.prompt=question"], ["data.columns.prompt: train has no column 'question'; it has ask, gold"]),
        (["rollout.engine.context=10"], ["prompts are longer than 4 tokens", "train:1"]),
        (["rollout.sampling.max_tokens=511"], ["prompts are longer than 1 tokens", "rollout.sampling.max_tokens"]),
        (["learner.lr"], ["'learner.lr': an override has the form key=value"]),
        (["model.path=./nothing"], ["model.path: './nothing' is not a model folder"]),
        (["model.chat_template=no.jinja"], ["model.chat_template: no file 'no.jinja'"]),
        (["reward.path=rlft_cli_rewards:shar"], ["custom reward", "has no function 'shar'", "share"]),
        (["track=[mlflow]"], ["track: mlflow is not installed", "pip install mlflow"]),
    ],
)
def test_bad_input_is_one_message_and_exit_2(rlft: Rlft, config: Path, overrides: list[str], said: list[str]) -> None:
    message = rlft("train", config, *overrides).refused()
    for part in said:
        assert part in message
    assert not (config.parent / "run").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no rows"),
        ('{"ask": "a"}\n{"gold": "b"}\n', "train: 1 row(s) where prompt is null or missing: 2"),
        ('{"ask": "a"}\n{"ask": null}\n', "train: 1 row(s) where prompt is null or missing: 2"),
        ('{"ask": "a"}\n{"ask": ""}\n', "train: 1 row(s) where prompt is empty or null: 2"),
        ('{"ask": "a"}\n{"ask": \n', "train.jsonl line 2 is not JSON"),
    ],
)
def test_bad_rows_are_named(rlft: Rlft, config: Path, text: str, said: str) -> None:
    (config.parent / "train.jsonl").write_text(text)
    for command in ("train", "plan"):
        assert said in rlft(command, config).refused()
    assert not (config.parent / "run").exists()


def test_a_missing_config_names_its_neighbour(rlft: Rlft, config: Path) -> None:
    for command in ("train", "plan", "eval"):
        message = rlft(command, config.with_name("tory.yaml")).refused()
        assert "there is no such config file" in message
        assert f"did you mean {config}?" in message


@pytest.mark.parametrize("command", ["resume", "export", "doctor", "eval", "replay", "explain"])
def test_a_folder_that_is_no_run(rlft: Rlft, tmp_path: Path, command: str) -> None:
    more = {"export": ["--to", tmp_path / "to"], "explain": [1, 0]}.get(command, [])
    assert f"{tmp_path} is not a run: there is no config.yaml in it" in rlft(command, tmp_path, *more).refused()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["train", "a.yaml", "--nothing"], ["list", "rewardz"]])
def test_bad_usage_is_exit_2(rlft: Rlft, arguments: list[str]) -> None:
    result = rlft(*arguments)
    assert result.code == 2
    assert "Traceback" not in result.err


def test_help_is_everywhere(rlft: Rlft) -> None:
    for command in ("train", "resume", "plan", "eval", "sample", "export", "doctor", "list", "replay", "explain"):
        assert command in rlft("--help").out
        result = rlft(command, "--help")
        assert (result.code, "Usage" in result.out) == (0, True)


def test_a_hub_id_that_cannot_be_reached_offers_the_default_model(
    rlft: Rlft, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    message = rlft("train", config, "model.path=nobody/nothing-7b").refused()
    assert "'nobody/nothing-7b' is not a folder here" in message
    assert "use smollm2-135m-q4, which needs no hub" in message


@pytest.mark.slow
def test_from_outside_a_message_is_all_one_sees(config: Path, rewards: Path) -> None:
    """The installed program without a hub."""
    result = ended(program(["train", config, "model.path=nobody/nothing-7b"], rewards, HF_HUB_OFFLINE="1"))
    message = result.refused()
    assert message.startswith("rlft: model.path: 'nobody/nothing-7b' is not a folder here, and the hub did not give it")
    assert "use smollm2-135m-q4, which needs no hub" in message
    assert result.err == message, "and nothing else"
    assert not (config.parent / "run").exists()


# In the middle of a run: exit 1, and what was kept is whole.


def test_a_reward_that_raises_is_exit_1(rlft: Rlft, config: Path) -> None:
    message = rlft("train", config, "reward.options={fail: true}", "eval.every=0", "data.eval=null").refused(1)
    assert "reward 'custom' failed on task 'train:" in message
    assert "ValueError: the grader fell over" in message
    assert "rlft resume" in message


def test_out_that_holds_a_run_is_left_alone(rlft: Rlft, config: Path, finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    message = rlft("train", config, f"out={finished}").refused()
    assert f"out: {finished} already holds a run" in message
    assert f"rlft resume {finished}" in message
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)  # lazily: a failed write may still hold it


@pytest.mark.parametrize("room_kb", [0, 8, 24, 300, 3000])
def test_a_full_disk(rlft: Rlft, tmp_path: Path, tiny_model: Path, rewards: Path, disk: Path, room_kb: int) -> None:
    """Full when the config, the records or a checkpoint is written; with more room, the run goes on to its end."""
    changes = {"adapter": {"type": "none"}, "checkpoint__every": 1, "checkpoint__keep": 5, "steps": 3}
    path = write(tmp_path / "toy", tiny_model, out=str(disk / "run"), **changes)
    if room_kb < 3000:
        (disk / "filler").write_bytes(b"x" * ((3 * 1024 - room_kb) * 1024))
    message = rlft("train", path).refused(1)
    assert "cannot write" in message
    assert "No space left on device" in message
    assert "go on with `rlft resume`" in message
    assert not scraps(disk)
    done = steps(disk / "run")
    assert done in ([], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3])
    if 3 in done:  # a row stands before its checkpoint is written, and a resume takes it back
        assert not (disk / "run" / "checkpoints" / "step-000003").exists()
    for folder in (disk / "run" / "checkpoints").glob("*"):
        assert json.loads((folder / "state.json").read_text())["step"] == int(folder.name[5:])
        assert all(load_file(file) for file in folder.rglob("*.safetensors"))
    for file in disk.rglob("*.parquet"):
        assert pq.read_table(file).num_rows
    subprocess.run(["mount", "-o", "remount,size=40m", str(disk)], check=True)
    if room_kb == 0:
        assert rlft("train", path).code == 0
    else:
        assert rlft("resume", disk / "run").code == 0
    assert steps(disk / "run") == [0, 1, 2, 3]


# Ctrl-C.


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 200
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        pytest.param({"rollout__sampling__max_tokens": 400}, 2, id="generation"),
        pytest.param({"learner__epochs": 40}, 3, id="learning"),
    ],
)
def test_ctrl_c_keeps_a_checkpoint(
    rlft: Rlft, tmp_path: Path, tiny_model: Path, rewards: Path, changes: dict[str, Any], kept: int
) -> None:
    """Stopped in the third step: what was only being sampled is dropped, what was being learned is finished."""
    path = write(tmp_path / "toy", tiny_model, steps=4, data__eval=None, learner__lr=1e-4, **changes)
    run = path.parent / "run"
    process = program(["train", path], rewards)
    wait_for(process, lambda: (run / "metrics.jsonl").exists() and steps(run) == [1, 2])
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    result = ended(process)
    assert result.code == 130, result
    assert "Traceback" not in result.err
    assert f"stopped: step {kept} of 4 is kept. Go on with: rlft resume {run}" in result.out
    assert steps(run) == list(range(1, kept + 1))
    assert [p.name for p in (run / "checkpoints").iterdir()] == [f"step-{kept:06d}"]
    assert not scraps(run)
    assert rlft("resume", run).code == 0
    assert steps(run) == [1, 2, 3, 4]
    whole = run.with_name("whole")
    assert rlft("train", path, f"out={whole}").code == 0
    ours, theirs = (load_file(folder / "checkpoints/step-000004/trained.safetensors") for folder in (run, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items()), "as if nobody had stopped it"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["loading", "learning"])
def test_ctrl_c_at_once(rlft: Rlft, tmp_path: Path, tiny_model: Path, rewards: Path, moment: str) -> None:
    """While the policy is loaded, or twice: the program ends without finishing anything, and a resume goes on."""
    path = write(tmp_path / "toy", tiny_model, steps=3, data__eval=None, learner__epochs=400, checkpoint__every=1)
    run = path.parent / "run"
    process = program(["train", path], rewards, PYTHONUNBUFFERED="1")
    if moment == "loading":
        wait_for(process, lambda: (run / "config.yaml").exists())
    else:
        wait_for(process, lambda: (run / "metrics.jsonl").exists() and steps(run) == [1])
        time.sleep(0.3)
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)
    result = ended(process)
    assert result.code == 130, result
    assert "Traceback" not in result.err
    assert "rlft resume" in result.err
    assert steps(run) == ([] if moment == "loading" else [1])
    assert not scraps(run)
    assert rlft("resume", run, "learner.epochs=1").code == 0
    assert steps(run) == [1, 2, 3]


# What works.


def test_train_says_what_it_does_and_how_to_go_on(rlft: Rlft, config: Path) -> None:
    result = rlft("train", config, "show.every=1", "show.samples=2")
    run = config.parent / "run"
    assert result.code == 0, result
    for part in ("step 1: reward", "step 2: reward", "held-out accuracy", "before", f"rlft sample {run}", "Say "):
        assert part in result.out
    assert steps(run) == [0, 1, 2]
    assert not scraps(run)


def test_resume_of_a_finished_run_says_so(rlft: Rlft, finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    result = rlft("resume", finished)
    assert result.code == 0
    assert f"{finished} is finished: step 3 of 3" in result.out
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_plan_says_the_run_in_words(rlft: Rlft, config: Path) -> None:
    result = rlft("plan", config, "algorithm.kl=0.1")
    assert result.code == 0
    for part in ("toy: 2 steps", "6 tasks to train on, 2 held out", "2 tasks x 4 samples", "at most 48 tokens sampled",
                 "merged, after every step", "KL(policy || reference)", "lora on 14 layers", "custom"):  # fmt: skip
        assert part in result.out
    assert not (config.parent / "run").exists()
    recorded = rlft("plan", config, "algorithm.type=sft", "data.columns.completion=gold", "data.eval=null")
    assert "6 recorded groups" in recorded.out
    assert "none: nothing is sampled" in recorded.out


@pytest.mark.parametrize(
    ("what", "known"),
    [("algorithms", "grpo"), ("rewards", "weighted"), ("envs", "single_turn"), ("engines", "local")],
)
def test_list_names_what_there_is(rlft: Rlft, what: str, known: str) -> None:
    entries = json.loads(rlft("list", what, "--json").out)
    assert known in [entry["name"] for entry in entries]
    assert all(entry["about"] for entry in entries)
    assert known in rlft("list", what).out


def test_doctor_looks_at_the_machine_and_at_a_run(rlft: Rlft, finished: Path) -> None:
    result = rlft("doctor", finished)
    assert result.code == (1 if "MEND" in result.out else 0)
    for part in ("Python 3.", "torch 2.", "disk free", "the model hub is", f"{finished}: step 3 of 3 is kept"):
        assert part in result.out


def metrics(text: str) -> dict[str, float]:
    return {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line.startswith("eval/")}


def test_eval_of_a_run_is_what_the_run_measured(rlft: Rlft, finished: Path) -> None:
    logged = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    measured = metrics(rlft("eval", finished).out)
    assert measured["eval/reward"] == pytest.approx(logged[-1]["eval/reward"], abs=1e-4)
    start = metrics(rlft("eval", finished.parent / "toy.yaml").out)
    assert start["eval/reward"] == pytest.approx(logged[0]["eval/reward"], abs=1e-4)
    assert "--step: " in rlft("eval", finished, "--step", 2).refused()


def test_eval_without_held_out_tasks(rlft: Rlft, config: Path) -> None:
    assert "data.eval" in rlft("eval", config, "data.eval=null").refused()


def test_sample_shows_base_and_tuned(rlft: Rlft, finished: Path, tiny_model: Path) -> None:
    of_run = rlft("sample", finished, "--prompt", "Say a", "--max-tokens", 4)
    assert (of_run.code, "base" in of_run.out, "tuned" in of_run.out) == (0, True, True)
    of_model = rlft("sample", tiny_model, "--prompt", "Say a", "--max-tokens", 4)
    assert (of_model.code, "base" in of_model.out, "tuned" in of_model.out) == (0, True, False)


@pytest.mark.parametrize("merged", [False, True])
def test_an_export_has_the_log_probs_of_the_run(
    rlft: Rlft, finished: Path, tiny_model: Path, tmp_path: Path, merged: bool
) -> None:
    """In plain PEFT and transformers, on the answers that the run's engine gave at its last evaluation."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    to = tmp_path / "exported"
    assert rlft("export", finished, "--to", to, *(["--merged"] if merged else [])).code == 0
    model: Any = AutoModelForCausalLM.from_pretrained(to if merged else tiny_model, dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    if not merged:
        model = PeftModel.from_pretrained(model, to)
    assert AutoTokenizer.from_pretrained(to).chat_template
    moved = 0.0
    for sample in pq.read_table(finished / "eval/step-000003.parquet").to_pylist():
        tokens = torch.tensor([sample["tokens"]])
        chosen = torch.tensor(sample["mask"])[1:]
        recorded = torch.tensor(sample["logprobs"])[1:][chosen]

        def score(of: Any, tokens: torch.Tensor = tokens, chosen: torch.Tensor = chosen) -> torch.Tensor:
            with torch.no_grad():
                logprobs = of(tokens).logits[0, :-1].log_softmax(-1)
            return logprobs.gather(-1, tokens[0, 1:, None]).squeeze(-1)[chosen]

        torch.testing.assert_close(score(model), recorded, rtol=0, atol=1e-5)
        moved = max(moved, float((score(base) - recorded).abs().max()))
    assert moved > 1e-3, "the base alone would not pass"


def test_an_export_to_a_full_disk(rlft: Rlft, finished: Path, disk: Path) -> None:
    (disk / "filler").write_bytes(b"x" * (3 * 1024 - 100) * 1024)
    message = rlft("export", finished, "--to", disk / "to", "--merged").refused(1)
    assert "No space left on device" in message
    assert "run the same command again" in message
    assert "resume" not in message
    assert [p.name for p in disk.iterdir()] == ["filler"]


def test_an_export_never_overwrites(rlft: Rlft, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    assert f"--to: {tmp_path} is not empty" in rlft("export", finished, "--to", tmp_path).refused()
    assert "--step: " in rlft("export", finished, "--to", tmp_path / "new", "--step", 77).refused()
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
def test_vllm_trains_and_loads_the_export(tmp_path: Path, tiny_model: Path, rewards: Path, rlft: Rlft) -> None:
    """Real vLLM by the config, through the program; then the merged export answers in vLLM as in transformers."""
    from transformers import AutoModelForCausalLM

    path = write(
        tmp_path / "toy", tiny_model, rollout__engine={"type": "vllm", "cache_gb": 0.1}, rollout__tasks_per_step=4
    )
    run = path.parent / "run"
    result = ended(program(["train", path], rewards))
    assert result.code == 0, result
    assert steps(run) == [0, 1, 2]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["parity/logprob_max"] < 1e-2 for row in rows[1:])
    for noise in ("INFO", "WARNING", "vllm."):
        assert noise not in result.out + result.err
    assert rlft("export", run, "--to", tmp_path / "merged", "--merged").code == 0
    prompt = pq.read_table(run / "eval/step-000002.parquet").to_pylist()[0]
    asked = [t for t, chosen in zip(prompt["tokens"], prompt["mask"], strict=True) if not chosen]
    code = (
        "import json\nfrom vllm import LLM, SamplingParams\n"
        f"llm = LLM({str(tmp_path / 'merged')!r}, dtype='float32', enforce_eager=True, max_model_len=64,"
        " kv_cache_memory_bytes=50_000_000)\n"
        "drawn = SamplingParams(temperature=0, max_tokens=6)\n"
        f"(done,) = llm.generate({{'prompt_token_ids': {asked}}}, drawn)\n"
        "print('TOKENS', json.dumps(list(done.outputs[0].token_ids)))"
    )
    settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answered = json.loads(done.stdout.split("TOKENS ")[1])
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    expected = model.generate(torch.tensor([asked]), do_sample=False, max_new_tokens=6)[0, len(asked) :].tolist()
    assert answered == expected


def test_replay_and_explain_print_tables_and_json(rlft: Rlft, finished: Path) -> None:
    said = rlft("replay", finished, "algorithm.type=rloo", "--steps", "1").out
    for word in ("recorded", "replayed", "cosine", "norm in the log", "largest change"):
        assert word in said
    report = json.loads(rlft("replay", finished, "--steps", "1", "--json").out)
    assert report["steps"][0]["gradient"]["cosine"] == pytest.approx(1)
    assert "rollout" in rlft("explain", finished, 1, 2).out
    assert json.loads(rlft("explain", finished, 1, 2, "--json").out)["row"] == 2
    assert "there is no 99" in rlft("explain", finished, 1, 99).refused()
    assert "none in 9" in rlft("replay", finished, "--steps", "9").refused()
