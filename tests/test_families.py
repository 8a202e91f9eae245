"""Episodes with the chat templates of many model families: what is trained on is what the engine returned."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from rlft.chat import Chat, Rewritten
from rlft.engine.local import LocalEngine
from rlft.envs.base import Action
from rlft.player import Limits, Player
from rlft.types import InputError, Message, Sampling, Task, Trajectory, Turn
from tests.test_rollout import Recording

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = Path(__file__).parent / "data" / "chat_templates"
FAMILIES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
UNSTABLE = {"gptoss"}  # its last answer is written in another way than those before it
NO_TOOLS = {"cohere2": "does not show", "gemma3": "must alternate", "phi3_5": "does not show"}
CASES = [(f, calls) for f in FAMILIES for calls in (False, True) if not (calls and f in NO_TOOLS)]
TASK = Task("task-1", ({"role": "user", "content": "What is 12 + 34?"},))
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "The sum.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "description": "first"}},
            "required": ["a"],
        },
    },
}


@dataclass
class Asking:
    """Three more questions, or results of a tool that it takes every answer to have called."""

    task: Task
    calls: bool
    tools: tuple[dict[str, Any], ...] = ()
    said: int = 0
    seen: list[Action] = field(default_factory=list)

    async def reset(self) -> tuple[Message, ...]:
        self.tools = (TOOL,) if self.calls else ()
        return self.task.messages

    async def step(self, action: Action) -> Turn:
        self.seen.append(action)
        if len(self.seen) == 4:
            return Turn()
        if not self.calls:
            return Turn(({"role": "user", "content": f"And {len(self.seen)} more?"},), done=False)
        call = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
        result = {"role": "tool", "name": "add", "tool_call_id": "call00001", "content": "46"}
        read = {"role": "assistant", "content": "", "tool_calls": [call]}
        return Turn((result,), done=False, said=read)

    async def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> LocalEngine:
    tokenizer = Chat(tiny_model).tokenizer
    return LocalEngine(tiny_model, torch.float32, torch.device("cpu"), tokenizer=tokenizer)


def play(engine: LocalEngine, chat: Chat, calls: bool, split: bool) -> tuple[Recording, Trajectory]:
    recorded = Recording(engine)
    sampling = Sampling(max_tokens=60, stop=("e", "a", "s"))
    limits = Limits(split=split)
    player = Player(recorded, chat, lambda task: Asking(task, calls), sampling, 9000, limits=limits)  # type: ignore[arg-type]
    return recorded, asyncio.run(player.play(TASK, 3))


@pytest.mark.parametrize(("family", "calls"), CASES)
def test_traps_1_and_2_in_every_family(family: str, calls: bool, engine: LocalEngine, tiny_model: Path) -> None:
    """Each sample is the prompt and every completion, id by id, with the template's own text between them."""
    chat, split = Chat(tiny_model, str(FOLDER / f"{family}.jinja")), family in UNSTABLE and not calls
    if split:
        with pytest.raises(Rewritten, match="history=split"):
            play(engine, chat, calls, split=False)
    recorded, trajectory = play(engine, chat, calls, split)
    assert len(recorded.completions) == 4
    assert len(trajectory.samples) == (4 if split else 1)
    turn = 0
    for number, sample in enumerate(trajectory.samples):
        place = 0
        while turn < 4 and trajectory.said[turn].sample == number:
            prompt, completion = recorded.prompts[turn], recorded.completions[turn]
            assert sample.tokens[: len(prompt)] == prompt, "the engine went on from what is trained on"
            assert not any(sample.mask[place : len(prompt)])
            place = len(prompt) + len(completion.tokens)
            assert sample.tokens[len(prompt) : place] == completion.tokens
            assert sample.logprobs[len(prompt) : place] == completion.logprobs
            assert all(sample.mask[len(prompt) : place])
            turn += 1
        assert place == len(sample.tokens)
    assert turn == 4


@pytest.mark.parametrize(("family", "calls"), CASES)
def test_what_stands_between_the_turns_is_what_the_template_writes(
    family: str, calls: bool, engine: LocalEngine, tiny_model: Path
) -> None:
    """A conversation whose answers the template leaves as they are reads, in tokens and turn by turn, as it renders."""
    chat, split = Chat(tiny_model, str(FOLDER / f"{family}.jinja")), family in UNSTABLE and not calls
    _, trajectory = play(engine, chat, calls, split)
    tools = (TOOL,) if calls else ()
    for said in trajectory.said[1:]:
        sample = trajectory.samples[said.sample]
        asked = said.messages[:-1]
        start = said.end + 1 - next(i for i in range(10_000) if not sample.mask[said.end - i])
        written = chat.tokenizer.decode(sample.tokens[:start])
        rendered = chat.render(asked, True, tools)
        if split:
            assert written == rendered
            continue
        last = asked[-1]["content"]
        assert written[written.rindex(str(last)) :] == rendered[rendered.rindex(str(last)) :]


@pytest.mark.parametrize("family", NO_TOOLS)
def test_a_template_that_knows_no_tools_says_so(family: str, engine: LocalEngine, tiny_model: Path) -> None:
    """A result that the policy would never see is no result."""
    with pytest.raises(InputError, match=NO_TOOLS[family]):
        play(engine, Chat(tiny_model, str(FOLDER / f"{family}.jinja")), True, False)


def special(tiny_model: Path, folder: Path, family: str, *tokens: str) -> Chat:
    """A renderer whose tokenizer has the family's own special tokens."""
    tokenizer = Chat(tiny_model).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    tokenizer.save_pretrained(folder)
    return Chat(folder, str(FOLDER / f"{family}.jinja"))


CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLED = ({"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "name": "add", "content": "46"})
ASKED = ({"role": "assistant", "content": "It is 46."}, {"role": "user", "content": "And more?"})


@pytest.mark.parametrize(
    ("family", "said", "ends"),
    [
        ("cohere2", ASKED, ("<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>")),
        ("llama3_1", ASKED, ("<|eot_id|>",)),
        ("phi3_5", ASKED, ("<|end|>",)),
        ("qwen3", ASKED, ("<|im_end|>",)),
        ("gptoss", CALLED, ("<|call|>",)),
        ("llama3_1", CALLED, ("<|eot_id|>",)),
    ],
)
def test_trap_2_what_ended_a_turn_is_not_written_twice(
    family: str, said: tuple[Message, Message], ends: tuple[str, ...], tiny_model: Path, tmp_path: Path
) -> None:
    """The policy ends its turn with one special token or two, as the template does; the rest is the template's."""
    chat = special(tiny_model, tmp_path, family, *ends, "<|return|>", "<|start|>")
    tools = (TOOL,) if said is CALLED else ()
    before, after = (*TASK.messages, said[0]), (*TASK.messages, *said)
    last = chat.tokenizer.convert_tokens_to_ids(ends[-1])
    suffix = chat.tokenizer.decode(chat.suffix(before, after, last, tools))
    longer = chat.render(after, True, tools)
    assert longer.endswith(suffix)
    assert longer.removesuffix(suffix).endswith("".join(ends))


@pytest.mark.parametrize("family", ["deepseek_r1_distill", "deepseekv3", "qwen3", "glm4moe"])
def test_trap_2_thinking_that_is_stripped_from_history_is_refused(family: str, tiny_model: Path) -> None:
    chat = Chat(tiny_model, str(FOLDER / f"{family}.jinja"))
    before = (*TASK.messages, {"role": "assistant", "content": "<think>\nAdd.\n</think>\n\n46"})
    with pytest.raises(Rewritten):
        chat.suffix(before, (*before, {"role": "user", "content": "And more?"}), 5)


def test_what_is_no_character_is_replaced(tiny_model: Path) -> None:
    """Half of a pair, as JSON may hold it: a tool's reply with one must not end the run."""
    chat = Chat(tiny_model)
    assert chat.encode("a\ud800b") == chat.encode("a\ufffdb")
    assert chat.encode("a\U0001f600b") == chat.encode("a" + "\ud83d\ude00" + "b")
