"""Agents written for OpenAI's client, unaware of rlft: what they ask is played, recorded and trained token by token."""

from __future__ import annotations

import asyncio
import json
import random
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from rlft.chat import Chat
from rlft.engine.local import LocalEngine
from rlft.envs.agent import AgentConfig
from rlft.envs.agent_chat import Refused, read
from rlft.envs.agent_endpoint import paid
from rlft.envs.agent_start import _last
from rlft.envs.placed import placed
from rlft.player import Limits, Player
from rlft.session import begin
from rlft.settings import load, validate
from rlft.terminal import Terminal
from rlft.types import InputError, Sampling, Task, Trajectory
from tests.envs import agents
from tests.envs.conftest import Recording

ROOT = Path(__file__).parents[2]
HERE = "tests.envs.agents:"
FREE = Limits()
STOPS = ("e", "a", "s")
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool.function.name }}{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
RESULT = "<|im_start|>tool\n3<|im_end|>"
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'


def task(name: str = "t1") -> Task:
    return Task(name, ({"role": "user", "content": f"Say {name}."},))


@dataclass
class Played:
    """Episodes that were played at once, and what the engine was asked and answered."""

    engine: Recording
    trajectories: list[Trajectory]

    @property
    def one(self) -> Trajectory:
        (trajectory,) = self.trajectories
        return trajectory

    @property
    def pay(self) -> float:
        return sum(sum(sample.rewards) for sample in self.one.samples)

    def check(self) -> None:
        """All that was sampled stands in the samples where it was sampled, and nothing else is learned from."""
        samples = [sample for trajectory in self.trajectories for sample in trajectory.samples]
        for prompt, completion in zip(self.engine.prompts, self.engine.completions, strict=True):
            n, end = len(prompt), len(prompt) + len(completion.tokens)
            found = [s for s in samples if s.tokens[:end] == [*prompt, *completion.tokens] and all(s.mask[n:end])]
            assert any(sample.logprobs[n:end] == completion.logprobs for sample in found)
        assert sum(t.length for t in self.trajectories) == sum(len(one.tokens) for one in self.engine.completions)
        for trajectory in self.trajectories:
            assert [sum(s.mask) for s in trajectory.samples] == [
                sum(x == x for x in s.logprobs) for s in trajectory.samples
            ]


class Bench:
    """Plays agents on an engine."""

    def __init__(self, chat: Chat, engine: LocalEngine) -> None:
        self.chat, self.engine = chat, engine

    def __call__(
        self, path: str = "", tasks: Sequence[Task] = (task(),), limits: Limits = FREE, seed: int = 3, **knobs: Any
    ) -> Played:
        config = AgentConfig(**({"path": HERE + path} if path else {}), **knobs)
        return self.of(config, tasks, limits, seed)

    def of(self, config: AgentConfig, tasks: Sequence[Task], limits: Limits = FREE, seed: int = 3) -> Played:
        engine = Recording(self.engine)
        sampling = Sampling(max_tokens=20, stop=STOPS)
        player = Player(engine, self.chat, placed(config), sampling, 600, limits=limits)  # type: ignore[arg-type]

        async def play() -> list[Trajectory]:
            return await asyncio.gather(*(player.play(one, seed + i) for i, one in enumerate(tasks)))

        return Played(engine, asyncio.run(play()))


@pytest.fixture(scope="module")
def bench(chat: Chat, engine: LocalEngine) -> Bench:
    return Bench(chat, engine)


def test_a_conversation_is_one_sample_of_the_tokens_that_were_sampled(bench: Bench) -> None:
    played = bench("talks")
    played.check()
    trajectory = played.one
    assert len(trajectory.samples) == 1, "every request went on with what was said"
    assert [m["role"] for m in trajectory.messages] == ["user", "assistant", "user", "assistant", "user", "assistant"]
    assert (played.pay, trajectory.samples[0].rewards[trajectory.said[-1].end]) == (1.0, 1.0)
    told = {name: trajectory.metrics[f"env/{name}"] for name in ("requests", "histories", "overridden", "turns")}
    assert told == {"requests": 3, "histories": 1, "overridden": 0, "turns": 3}
    again = bench("talks").one
    assert (again.samples[0].tokens, again.said) == (trajectory.samples[0].tokens, trajectory.said)


def test_episodes_at_once_do_not_mix(bench: Bench) -> None:
    tasks = [task(f"word{i}") for i in range(6)]
    played = bench("talks", tasks)
    played.check()
    for i, trajectory in enumerate(played.trajectories):
        heard = [m["content"] for m in trajectory.messages if m["role"] == "user"]
        assert heard == [f"Say word{i}.", f"word{i} 0", f"word{i} 1"]
        assert trajectory.metrics["env/requests"] == 3


def test_a_changed_history_is_a_new_sample(bench: Bench) -> None:
    played = bench("forgets")
    played.check()
    first, second = played.one.samples
    assert played.one.metrics["env/histories"] == 2
    assert "Nothing." in bench.chat.decode(second.tokens)
    assert second.tokens[: len(first.tokens)] != first.tokens
    assert [turn.sample for turn in played.one.said] == [0, 1]


def test_conversations_in_turn_go_on_each_in_its_own_sample(bench: Bench) -> None:
    played = bench("branches")
    played.check()
    texts = [bench.chat.decode(sample.tokens) for sample in played.one.samples]
    assert [("one" in text, "two" in text) for text in texts] == [(True, False), (False, True)]
    assert all(text.count("more") == 1 for text in texts)
    assert [turn.sample for turn in played.one.said] == [0, 1, 0, 1]
    for turn in played.one.said:
        sample = played.one.samples[turn.sample]
        assert sample.mask[turn.end]
        assert turn.text in bench.chat.decode(sample.tokens[: turn.end + 1])


def test_a_streaming_async_client(bench: Bench) -> None:
    played = bench("streams")
    played.check()
    assert len(played.one.samples) == 1
    assert played.pay == 1.0
    assert played.one.metrics["env/used"] == played.one.length, "the tokens that the client was told"


def test_the_runs_sampling_holds_and_the_difference_is_counted(bench: Bench) -> None:
    plain, hot = bench("talks"), bench("talks", options={"temperature": 0.2, "top_p": 0.9})
    assert hot.one.metrics["env/overridden"] == 3
    assert hot.one.samples[0].tokens == plain.one.samples[0].tokens
    same = bench("talks", options={"temperature": 1.0, "presence_penalty": 0, "user": "me", "n": 1, "seed": 9})
    assert same.one.metrics["env/overridden"] == 0
    assert same.one.samples[0].tokens == plain.one.samples[0].tokens


def test_a_client_may_ask_for_less(bench: Bench) -> None:
    short = bench("talks", options={"max_tokens": 2, "turns": 2})
    short.check()
    assert [len(one.tokens) for one in short.engine.completions] == [2, 2]
    assert (short.one.finish, short.one.cut, short.pay) == ("length", "", 1.0), "the agent said how it ended"
    assert len(short.one.samples) == 1, "it goes on behind the answer that was cut off"
    letters = bench("talks", options={"stop": ["o", "i"], "turns": 1}, seed=11)
    letters.check()
    said = letters.one.completion
    whole = bench.chat.decode(letters.engine.completions[0].tokens)
    assert not set("oi") & set(said)
    assert whole.startswith(said)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"n": 2}, "n"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [agents.TOOL], "tool_choice": "required"}, "tool_choice"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "assistant", "content": "Hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0]"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 1e-320}, "temperature"),
        ({"temperature": 10**400}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 7}, "top_p"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": -3}, "min_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"top_k": 2**31}, "top_k"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stream_options": "x"}, "stream_options"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages"),
        ({"tools": [agents.TOOL, {"type": "function", "function": {"name": "\ud800"}}]}, "tools"),
        ({"stop": ["\ud800"]}, "stop"),
        ({"model": "\ud800"}, "model"),
        ({"tools": [{"type": "function"}]}, "tools"),
    ],
)
def test_what_cannot_be_had_is_refused_as_openai_does(asked: dict[str, Any], param: str) -> None:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hi"}], **asked}).encode()
    with pytest.raises(Refused, match=param.partition("[")[0]) as refused:
        read(body)
    assert refused.value.status == 400
    assert refused.value.body["error"]["type"] == "invalid_request_error"
    assert refused.value.body["error"]["param"] == param


def test_sampling_at_the_ends_of_its_ranges_is_read() -> None:
    for wanted in (
        {"temperature": 0, "top_p": 1, "min_p": 1, "top_k": -1},
        {"temperature": 2.0, "min_p": 0, "top_k": 0},
    ):
        asked = read(json.dumps({"messages": [{"role": "user", "content": "Hi"}], **wanted}).encode())
        assert asked.wanted == wanted


def test_a_last_line_that_is_no_number_is_no_verdict() -> None:
    assert (_last("1\n0.5\n"), _last('{"reward": 1}'), _last("0.5\ntrue\n")) == (0.5, {"reward": 1}, None)


def test_a_refusal_reaches_the_client_and_the_episode_goes_on(bench: Bench) -> None:
    played = bench("errs", options={"n": 3})
    assert (played.pay, played.one.metrics["env/n"], played.one.metrics["env/requests"]) == (400, 1, 1)


def test_what_comes_back_from_a_client_is_what_was_given_out() -> None:
    call = {"id": "000000000", "type": "function", "function": {"name": "add", "arguments": '{"a":1,  "b": 2}'}}
    given = {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = [
        {"role": "developer", "content": parts},
        given,
        {"role": "tool", "tool_call_id": "000000000", "content": "3"},
    ]
    system, said, _ = read(json.dumps({"messages": asked}).encode()).messages
    assert system == {"role": "system", "content": "ab"}
    made = {"type": "function", "id": "000000000", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
    assert said == {"role": "assistant", "content": "", "tool_calls": [made]}


@pytest.mark.parametrize("path", ["crashes", "silent"])
def test_an_agent_that_fails_costs_its_episode(bench: Bench, path: str) -> None:
    played = bench(path, [task("a"), task("b")])
    assert all(trajectory.failed and trajectory.cut == "failed" for trajectory in played.trajectories)
    said = played.trajectories[0].failures[0].said
    assert (
        said
        == {
            "crashes": "ValueError: the agent has a bug",
            "silent": "RuntimeError: the agent returned before it asked the policy anything",
        }[path]
    )


def test_an_agent_that_hangs_costs_its_episode(bench: Bench) -> None:
    begun = time.monotonic()
    played = bench("hangs", limits=Limits(call=1.0))
    assert time.monotonic() - begun < 10
    assert played.one.failures[0].kind == "timeout"


def test_a_limit_ends_the_agent_with_an_error_of_openai(bench: Bench, tmp_path: Path) -> None:
    played = bench("talks", limits=Limits(turns=2), options={"turns": 9})
    assert (played.one.cut, len(played.one.said), played.one.failures) == ("turns", 2, [])
    played = bench("persists", limits=Limits(turns=1), options={"note": str(tmp_path / "note")})
    assert played.one.cut == "turns"
    for _ in range(400):
        if (tmp_path / "note").exists():
            break
        time.sleep(0.05)
    assert (tmp_path / "note").read_text() == "410 episode_over"


def test_a_program_that_knows_only_its_environment(bench: Bench) -> None:
    played = bench(command=(sys.executable, "-m", "tests.envs.agents"))
    played.check()
    assert (played.pay, played.one.metrics["env/posted"], played.one.failures) == (0.25, 1, [])


def test_a_function_in_a_process_of_its_own(bench: Bench) -> None:
    played = bench("printing", place="process")
    assert (played.pay, played.one.failures) == (0.75, []), "what it prints is not its verdict"


def test_programs_that_fail_or_hang(bench: Bench) -> None:
    bad = bench(command=(sys.executable, "-c", "raise SystemExit('no luck')")).one.failures[0]
    assert bad.said == "RuntimeError: the program ended with 1: no luck"
    begun = time.monotonic()
    late = bench(command=("sleep", "30"), limits=Limits(call=0.5)).one.failures[0]
    assert (late.kind, time.monotonic() - begun < 10) == ("timeout", True)


def test_programs_wait_for_their_turn_without_a_limit(bench: Bench) -> None:
    """Three take longer than a call may; one at a time, each has its own."""
    slow = "sleep 1.2; echo done >&2; exit 1"
    tasks = [task("a"), task("b"), task("c")]
    played = bench(command=("sh", "-c", slow), processes=1, tasks=tasks, limits=Limits(call=3.0))
    assert [one.failures[0].said.rpartition(" ")[2] for one in played.trajectories] == ["done"] * 3


@pytest.mark.parametrize(
    "verdict",
    ["good", float("nan"), True, 10**400, {"reward": True}, {"reward": "1"}, {"score": 1}, {}, [1], {"metrics": 3}],
)
def test_a_verdict_that_is_none(verdict: Any) -> None:
    with pytest.raises(TypeError, match="neither a number nor"):
        paid(verdict)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"path": HERE + "printing"}, "does not take api_key and base_url"),
        ({"path": HERE + "talks", "options": {"turns": 1, "model": "x"}}, "multiple values|cannot be called"),
        ({"path": HERE + "calculates", "options": {"unknown": 1}}, "cannot be called"),
        ({"path": HERE + "nobody"}, "cannot be had"),
        ({"command": ("no-such-program",)}, "there is no program 'no-such-program'"),
    ],
)
def test_what_cannot_be_started_is_refused(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        AgentConfig(**knobs).build()


def test_a_model_whose_template_shows_no_tools_refuses_them(chat: Chat, engine: LocalEngine) -> None:
    make = AgentConfig(path=HERE + "errs", options={"tools": [agents.TOOL]}).build_for(chat.tokenizer, "{{ messages }}")
    player = Player(engine, chat, make, Sampling(max_tokens=9), 500)
    played = asyncio.run(player.play(task(), 1))
    assert (sum(played.samples[0].rewards), played.metrics["env/tools"]) == (400, 1)


def test_a_port_that_is_taken(bench: Bench) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match=r"env\.port"):
        bench("talks", port=taken.getsockname()[1])


# A model that calls a tool, or does not, by chance: two conversations learned by heart.


@pytest.fixture(scope="module")
def caller(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caller") / "model"
    chat = Chat(tiny_model)
    chat.tokenizer.chat_template = TEMPLATE
    asked = ({"role": "system", "content": "Sum."}, {"role": "user", "content": "1 + 2?"})
    called = {"role": "assistant", "content": CALL}
    told = (*asked, called, {"role": "tool", "content": "3"}, {"role": "assistant", "content": "It is 3."})
    plain = (*asked, {"role": "assistant", "content": "No."})
    rows = [chat.encode(chat.render(talk, False, [agents.TOOL])) for talk in (told, plain)]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    labels = torch.tensor([[*row, *[-100] * (width - len(row))] for row in rows])
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for left in range(120, 0, -1):
        optimizer.param_groups[0]["lr"] = 5e-3 * left / 120
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02, "it knows both by heart"
    model.save_pretrained(folder)
    chat.tokenizer.save_pretrained(folder)
    return folder


def agent_config(caller: Path, tmp_path: Path, **more: Any) -> Any:
    data = tmp_path / "sums.jsonl"
    data.write_text('{"prompt": "1 + 2?"}\n')
    return validate(
        {
            "name": "agent",
            "out": str(tmp_path / "run"),
            "steps": 4,
            "model": {"path": str(caller), "device": "cpu"},
            "adapter": {"type": "none"},
            "data": {"train": str(data)},
            "env": {"type": "agent", "path": HERE + "calculates", "most_answers": 4, "most_said": 100},
            "reward": {"type": "format", "pattern": "never"},
            "algorithm": {"type": "grpo"},
            "learner": {"lr": 1e-3},
            "rollout": {
                "engine": {"type": "local"},
                "tasks_per_step": 1,
                "group_size": 12,
                "sampling": {"max_tokens": 90, "temperature": 0.5},
            },
        }
        | more
    )


def test_an_unaware_agent_that_calls_tools_is_trained(caller: Path, tmp_path: Path) -> None:
    config = agent_config(caller, tmp_path)
    assert begin(config, Terminal(Console(quiet=True))) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(line["parity/logprob_max"] < 1e-3 for line in lines), "what is trained on is what was sampled"
    rows = pq.read_table(tmp_path / "run/rollouts/step-000001.parquet").to_pylist()
    chat = Chat(caller)
    assert len(rows) == 12, "every conversation is one sample"
    for row in rows:
        text = chat.decode(row["tokens"], special=True)
        said, heard = parts(chat, row)
        assert said == "".join(re.findall(r"<\|im_start\|>assistant\n(.*?(?:<\|im_end\|>|\Z))", text, re.S))
        assert sum(row["token_rewards"]) == 0.5 * heard.count(RESULT)
    first, last = (calling(tmp_path / f"run/rollouts/step-{step:06d}.parquet", chat) for step in (1, 4))
    assert 0 < first < last, "calls were paid for, so there are more of them"


def parts(chat: Chat, row: dict[str, Any]) -> tuple[str, str]:
    """What the policy chose, and what it did not."""
    sides = ([t for t, own in zip(row["tokens"], row["mask"], strict=True) if own == side] for side in (True, False))
    said, heard = (chat.decode(side, special=True) for side in sides)
    return said, heard


def calling(path: Path, chat: Chat) -> float:
    """The share of episodes in which a tool was called."""
    rows = pq.read_table(path).to_pylist()
    return sum(RESULT in parts(chat, row)[1] for row in rows) / len(rows)


def test_tool_calls_token_by_token(caller: Path) -> None:
    chat = Chat(caller)
    engine = LocalEngine(caller, torch.float32, torch.device("cpu"), tokenizer=chat.tokenizer)
    recording = Recording(engine)
    player = Player(
        recording,  # type: ignore[arg-type]
        chat,
        placed(AgentConfig(path=HERE + "calculates"), chat.tokenizer, chat.template),
        Sampling(temperature=0.5, max_tokens=90),
        500,
    )
    one = Task("t", ({"role": "user", "content": "1 + 2?"},))

    async def play() -> list[Trajectory]:
        return await asyncio.gather(*(player.play(one, seed) for seed in range(12)))

    played = Played(recording, asyncio.run(play()))
    played.check()
    called = [t for t in played.trajectories if any(m["role"] == "tool" for m in t.messages)]
    assert 0 < len(called) < 12
    for trajectory in called:
        _, _, said, result, *_ = trajectory.messages
        assert said["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1, "b": 2}}
        assert (said["content"], result["content"], result["tool_call_id"]) == ("", "3", said["tool_calls"][0]["id"])
        (sample,) = trajectory.samples
        assert sum(sample.rewards) == 0.5
        text = chat.decode(sample.tokens, special=True)
        assert text.startswith("<|im_start|>system\nadd<|im_end|>\n<|im_start|>system\nSum.<|im_end|>")
        assert text.count(CALL) == 1, "as it was sampled, and not written anew by the template"


def test_the_pages_agent(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs/envs-served-policy.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "page_agent.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    one = Task("t", ({"role": "user", "content": "Which letter?"},), {"answer": "\N{SNOWMAN}"})
    played = bench.of(AgentConfig(path="page_agent:run"), [one])
    played.check()
    assert (played.pay, len(played.one.said), len(played.one.samples)) == (0.0, 3, 1)
    played = bench.of(AgentConfig(path="page_agent:run"), [Task("t", one.messages, {"answer": ""})])
    assert (played.pay, len(played.one.said), played.one.metrics["env/success"]) == (1.0, 1, 1)


def test_the_agent_of_the_ready_run(bench: Bench) -> None:
    """What it says of each guess is true of one number, and it goes on in one conversation."""
    asked = [Task(f"t{seed}", ({"role": "user", "content": "Begin."},), {"seed": seed}) for seed in range(12)]
    played = bench.of(load(ROOT / "configs/agent.yaml").env, asked)  # type: ignore[arg-type]
    played.check()
    for seed, trajectory in enumerate(played.trajectories):
        number, metrics = random.Random(seed).randint(1, 10), trajectory.metrics
        assert (metrics["env/requests"], metrics["env/histories"]) == (metrics["env/guesses"], 1)
        talk = trajectory.messages[1:]
        for said, hint in zip(talk[::2], talk[1::2], strict=False):
            found = re.search(r"\d+", said["content"])
            way = "higher" if found and int(found[0]) < number else "lower"
            assert hint["content"] == (f"My number is {way} than {int(found[0])}." if found else "That is no number.")
        last = re.search(r"\d+", talk[-1 - (len(talk) + 1) % 2]["content"])
        assert metrics["env/success"] == sum(map(sum, (s.rewards for s in trajectory.samples)))
        assert metrics["env/success"] == float(bool(last) and int(last[0]) == number)
