"""Configs as a newcomer writes them: what loads, what overrides do, and what each mistake is answered with."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlft.config import Config
from rlft.config_data import Generated
from rlft.config_rollout import Local, Vllm
from rlft.settings import dump, load, validate
from rlft.types import InputError

PLAIN: dict[str, Any] = {
    "name": "sums",
    "steps": 3,
    "model": {"path": "smollm2-135m-q4"},
    "data": {"train": {"type": "generated"}},
    "reward": {
        "type": "weighted",
        "terms": {"correct": {"type": "number"}, "bare": {"type": "format", "pattern": r"\d+", "weight": 0.3}},
    },
    "rollout": {"engine": {"type": "local"}, "group_size": 4},
    "algorithm": {"type": "grpo", "clip_low": 0.1},
}
ADALORA: dict[str, Any] = {"type": "adalora", "total_step": 8}


def with_(changes: dict[str, Any]) -> dict[str, Any]:
    """PLAIN with dotted keys set."""
    plain = copy.deepcopy(PLAIN)
    for dotted, value in changes.items():
        *path, leaf = dotted.split(".")
        block = plain
        for part in path:
            block = block.setdefault(part, {})
        block[leaf] = value
    return plain


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "sums.yaml"
    path.write_text(yaml.safe_dump(PLAIN))
    return path


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load(path, overrides)
    return str(caught.value)


def test_blocks_that_are_not_written_have_their_defaults(file: Path) -> None:
    config = load(file)
    assert (config.learner.lr, config.learner.max_grad_norm, config.checkpoint.keep) == (1e-5, 1.0, 2)
    assert config.adapter.type == "lora"
    assert config.rollout.engine == Local()
    assert config.data.train == Generated()
    assert config.online


def test_overrides_take_the_types_of_yaml(file: Path) -> None:
    config = load(file, ["learner.lr=1e-3", "track=[tensorboard]", "rollout.sampling.stop=['a','b']", "adapter.r=4"])
    assert config.learner.lr == 1e-3
    assert config.track == ("tensorboard",)
    assert config.rollout.sampling.stop == ("a", "b")
    assert config.adapter.settings() == {"type": "lora", "r": 4}


def test_a_later_override_wins(file: Path) -> None:
    assert load(file, ["steps=5", "steps=7"]).steps == 7


def test_a_new_type_drops_the_old_type_s_keys(file: Path) -> None:
    assert load(file, ["algorithm.type=rloo"]).algorithm.type == "rloo"
    assert load(file, ["algorithm.type=grpo"]).algorithm.model_dump()["clip_low"] == 0.1
    assert load(file, ["rollout.engine.type=vllm"]).rollout.engine == Vllm()
    exchanged = load(file, ["reward.terms.bare.type=length", "reward.terms.bare.limit=9"])
    assert exchanged.reward is not None
    assert exchanged.reward.model_dump()["terms"]["bare"] == {"type": "length", "weight": 1.0, "free": 0, "limit": 9}


def test_adapter_none_is_full_fine_tuning(file: Path) -> None:
    assert load(file, ["adapter=none"]).adapter.settings() is None
    assert load(file, ["adapter.type=none"]).adapter.settings() is None
    assert validate(with_({"adapter": None})).adapter.settings() is None


def test_a_string_is_a_file_of_data(file: Path) -> None:
    (file.parent / "rows.jsonl").write_text("{}\n")
    config = load(file, ["data.train=rows.jsonl"])
    assert config.data.train.model_dump()["path"] == str(file.parent / "rows.jsonl"), "relative to the config's folder"


def test_a_hub_id_is_left_as_it_is(file: Path) -> None:
    config = load(file, ["data.train=openai/gsm8k", "model.path=Qwen/Qwen3-0.6B"])
    assert config.data.train.model_dump()["path"] == "openai/gsm8k"
    assert config.model.path == "Qwen/Qwen3-0.6B"


def test_the_dump_loads_to_the_same_config(file: Path) -> None:
    config = load(file, ["adapter.r=4", "track=[wandb]", "rollout.sampling.stop=['\\n']", "sync.type=merged"])
    again = file.parent / "again.yaml"
    again.write_text(dump(config))
    assert load(again) == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"stepps": 3}, ["stepps: there is no such key", "did you mean 'steps'?"]),
        ({"learner.learning_rat": 1.0}, ["learner.learning_rat: there is no such key", "lr"]),
        ({"learner.micro_token": 1}, ["learner.micro_token: there is no such key", "did you mean 'micro_tokens'?"]),
        ({"rollout.sampling.temprature": 1}, ["rollout.sampling.temprature: ", "did you mean 'temperature'?"]),
        ({"rollout.engine.contxt": 9}, ["rollout.engine.contxt: ", "did you mean 'context'?"]),
        ({"algorithm.clip": 0.1}, ["algorithm.clip: there is no such key", "clip_low"]),
        ({"reward.terms.bare.patern": "x"}, ["reward.terms.bare.patern: ", "did you mean 'pattern'?"]),
        ({"data.train.digit": 2}, ["data.train.digit: ", "did you mean 'digits'?"]),
        ({"algorithm.type": "grop"}, ["algorithm.type: there is no algorithm 'grop'", "did you mean 'grpo'?"]),
        ({"reward.type": "wieghted"}, ["reward.type: there is no reward 'wieghted'", "did you mean 'weighted'?"]),
        ({"reward.terms.bare.type": "formt"}, ["reward.terms.bare.type: ", "'formt'", "did you mean 'format'?"]),
        ({"rollout.engine.type": "vlm"}, ["rollout.engine.type: ", "'vlm'", "did you mean 'vllm'?"]),
        ({"algorithm": {}}, ["algorithm.type: say which algorithm it is"]),
        ({"track": ["wandbb"]}, ["track: there is no tracker 'wandbb'", "wandb"]),
        ({"name": "a/b"}, ["name: ", "'a/b'"]),
        ({"steps": -1}, ["steps: ", "greater than or equal to 0", "-1"]),
        ({"learner.lr": "fast"}, ["learner.lr: ", "number", "'fast'"]),
        ({"rollout.sampling.top_p": 0.9}, ["rollout.sampling", "top_p=0.9", "Leave top_p at 1"]),
        ({"rollout.sampling.top_k": 5}, ["top_k=5", "Leave top_k at 0"]),
        ({"rollout.sampling.min_p": 0.1}, ["min_p=0.1", "Leave min_p at 0"]),
        ({"rollout.group_size": 1}, ["rollout.group_size: grpo", "2 or more"]),
        (
            {"algorithm": {"type": "xpo", "references": 5}, "rollout.group_size": 4},
            ["rollout.group_size: xpo", "4 are too few; set it to 5 or more"],
        ),
        ({"learner.minibatches": 33}, ["learner.minibatches: 32 samples a step cannot be cut into 33"]),
        ({"adapter": {**ADALORA, "orth_reg_weight": 0.5}}, ["adapter.orth_reg_weight: PEFT adds it", "remove it"]),
        (
            {"steps": 8, "adapter": {**ADALORA, "total_step": 20, "tfinal": 2}},
            ["adapter.total_step:", "at step 18", "set it to 8"],
        ),
        ({"steps": 8, "adapter": {**ADALORA, "target_r": 12}}, ["adapter.target_r: 12 must be less than init_r, 12"]),
        ({"adapter.lora_dropout": 0.1}, ["adapter.lora_dropout: with 0.1", "set it to 0"]),
        (
            {"data.columns.completion": "answer"},
            ["data.columns.completion: grpo learns from its own samples", "Take an algorithm for recorded data"],
        ),
        ({"eval.accuracy": "right"}, ["eval.accuracy: ", "'right'", "it has correct, bare"]),
        ({"eval.every": 2}, ["eval.every: there are no held-out tasks", "data.eval"]),
        ({"sync.type": "adapter"}, ["sync.type: the local engine takes merged weights only"]),
        ({"reward": None}, ["reward: samples of the policy need a reward"]),
        (
            {"algorithm": {"type": "kto"}, "rollout.tasks_per_step": 1},
            ["rollout.tasks_per_step: kto", "that to another task", "2 or more"],
        ),
        (
            {"algorithm": {"type": "on_policy_distillation", "reward": 0.5}, "teacher.path": "x", "reward": None},
            ["reward: samples of the policy need a reward"],
        ),
        ({"reward.terms": {}}, ["reward.terms: "]),
        ({"reward.terms.bare.pattern": "("}, ["reward.terms.bare.pattern: ", "regular expression"]),
    ],
)
def test_a_mistake_is_one_message_that_names_the_key(tmp_path: Path, changes: dict[str, Any], said: list[str]) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(with_(changes), sort_keys=False))
    message = refused(path)
    for part in said:
        assert part in message
    assert len(message.splitlines()) == 1
    for noise in ("pydantic", "For further information", "type=value", "Local.", ".grpo.", ".weighted."):
        assert noise not in message


def test_what_is_required_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("name: x\n")
    message = refused(path)
    assert [line.split(":")[0] for line in message.splitlines()] == ["steps", "model", "data", "algorithm"]


def test_every_mistake_has_a_line(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(with_({"stepps": 3, "learner.lr": -1})))
    assert [line.split(":")[0] for line in refused(path).splitlines()] == ["learner.lr", "stepps"]


def test_recorded_data_may_have_groups_of_one_and_dropout() -> None:
    changes = {"algorithm": {"type": "sft"}, "rollout.group_size": 1, "adapter.lora_dropout": 0.1, "reward": None}
    assert not validate(with_(changes)).online


@pytest.mark.parametrize("role", ["completion", "completions", "chosen"])
def test_recorded_answers_under_their_own_name_are_refused_where_own_samples_are_needed(
    tmp_path: Path, role: str
) -> None:
    """Nobody has to map a column for it to be seen; the fix that the message names works."""
    (tmp_path / "rows.jsonl").write_text(f'{{"prompt": "a", "answer": "1", "{role}": "b"}}\n')
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(with_({"data.train": "rows.jsonl"})))
    message = refused(path)
    assert f"data.columns.{role}: grpo learns from its own samples" in message
    assert f"such as data.columns.recorded={role}" in message
    assert load(path, [f"data.columns.recorded={role}"]).online


def test_one_task_a_step_is_enough_where_answers_are_not_compared() -> None:
    one = {"algorithm": {"type": "kto", "loss": "apo_zero_unpaired"}, "rollout.tasks_per_step": 1}
    assert validate(with_(one)).rollout.tasks_per_step == 1


@pytest.mark.parametrize("kind", ["on_policy_distillation", "gkd"])
def test_what_a_teacher_says_needs_no_reward(kind: str) -> None:
    assert validate(with_({"algorithm": {"type": kind}, "teacher.path": "x", "reward": None})).online


def test_what_a_tool_searches_is_found_beside_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "people.jsonl").write_text('{"text": "Nils lives in Delhi."}\n')
    monkeypatch.chdir(tmp_path.parent)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(with_({"env": {"type": "tools", "corpus": {"file": "people.jsonl"}}})))
    assert load(path).model_dump()["env"]["corpus"]["file"] == str(tmp_path / "people.jsonl")


def test_a_teacher_and_a_reward_beside_the_config_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At any depth of the reward; a module:function and a user's own options are left alone."""
    for name in ("judge", "base", "teacher", "mine:build"):
        (tmp_path / "models" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path.parent)
    terms = {
        "model": {"type": "model", "path": "models/judge", "base": "models/base"},
        "own": {"type": "custom", "path": "mine:build", "options": {"path": "models/judge"}},
    }
    changes = {
        "reward": {"type": "weighted", "terms": terms},
        "algorithm": {"type": "on_policy_distillation"},
        "teacher.path": "models/teacher",
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(with_(changes)))
    config = load(path).model_dump()
    assert config["teacher"]["path"] == str(tmp_path / "models/teacher")
    found = config["reward"]["terms"]
    assert (found["model"]["path"], found["model"]["base"]) == tuple(
        str(tmp_path / f"models/{n}") for n in ("judge", "base")
    )
    assert (found["own"]["path"], found["own"]["options"]) == ("mine:build", {"path": "models/judge"})


def test_evaluation_without_a_reward_is_refused() -> None:
    with pytest.raises(InputError, match=r"reward: data\.eval needs a reward"):
        validate(with_({"algorithm": {"type": "sft"}, "reward": None, "data.eval": {"type": "generated"}}))


@pytest.mark.parametrize("text", ["learner.lr", "=3", "steps"])
def test_an_override_without_a_key_or_a_value(file: Path, text: str) -> None:
    assert refused(file, text).startswith(f"{text!r}: an override has the form key=value, such as learner.lr=1e-5")


@pytest.mark.parametrize("text", ["steps=[", "learner={a: ", "steps.type=3", "name.x.type=y"])
def test_an_override_that_does_not_fit(file: Path, text: str) -> None:
    message = refused(file, text)
    assert text.partition("=")[0].partition(".")[0] in message
    assert "Traceback" not in message


def test_a_key_inside_a_value(file: Path) -> None:
    assert "steps" in refused(file, "steps.more=3")


def test_an_override_of_a_type_in_a_block_that_is_not_written(file: Path) -> None:
    assert load(file, ["sync.type=merged"]).sync.type == "merged"


def test_a_config_that_is_not_there(file: Path) -> None:
    message = refused(file.with_name("sum.yaml"))
    assert "there is no such config file" in message
    assert f"did you mean {file}?" in message


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "\tx: 1", "", "a: ${b}", "\x00"])
def test_a_file_that_is_no_config(tmp_path: Path, text: str) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    assert str(path) in refused(path) or "required" in refused(path)


def test_a_config_is_a_closed_and_frozen_thing() -> None:
    config = validate(PLAIN)
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 4  # type: ignore[misc]
    assert Config.model_validate(config.model_dump()) == config


def test_a_block_of_another_type_replaces_the_old_one(tmp_path: Path) -> None:
    """Whether the type is named alone or with the new block: nothing of the old type stays."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(PLAIN | {"reward": {"type": "format", "pattern": "x"}}))
    for override in ("reward={type: length, limit: 9}", "reward.type=number"):
        assert load(path, [override]).reward.type in ("length", "number")  # type: ignore[union-attr]
    assert load(path, ["reward={weight: 0.5}"]).reward.pattern == "x"  # type: ignore[union-attr]


@pytest.mark.parametrize(("knob", "value"), [("top_p", 0.9), ("top_k", 40), ("min_p", 0.05)])
def test_trap_12_a_truncated_distribution_is_refused(knob: str, value: float) -> None:
    """The learner would score another distribution than the one that was sampled from; neutral values pass."""
    with pytest.raises(InputError, match=f"{knob}={value:g} cuts the distribution"):
        validate(PLAIN | {"rollout": {"sampling": {knob: value}}})
    neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0}[knob]
    validate(PLAIN | {"rollout": {"sampling": {knob: neutral}}})
