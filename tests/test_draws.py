"""Further members of a group, drawn with a real engine: what is kept is, token by token, what was sampled."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rlft.algorithms import credit, select, weigh
from rlft.algorithms.base import Algorithm
from rlft.algorithms.losses import policy as losses
from rlft.batch import Batch
from rlft.build import sync_kind
from rlft.chat import Chat
from rlft.draws import _fitting, hinted, placeholders
from rlft.engine.base import Engine
from rlft.engine.local import LocalEngine
from rlft.engine.vllm import VllmEngine
from rlft.envs.base import Action
from rlft.envs.single_turn import SingleTurn
from rlft.learner import Learner, Schedule
from rlft.material import material
from rlft.player import Player
from rlft.policy import Policy
from rlft.rollout import rollout
from rlft.settings import validate
from rlft.source import Refilled, Rollouts
from rlft.sync import Sync
from rlft.track import summary
from rlft.types import (
    NAN,
    Completion,
    Draw,
    Group,
    InputError,
    Message,
    RunError,
    Sample,
    Sampling,
    Task,
    Trajectory,
    Turn,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LORA = {"type": "lora", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
TASKS = [Task(f"t{i}", ({"role": "user", "content": f"Say {i}"},), {"answer": str(i), "solution": f"It is {i}."})
         for i in range(3)]  # fmt: skip
SIZE = 2


@dataclass
class Recording:
    """A real engine, and what went in and came out."""

    inner: Engine
    version: int = -1
    calls: list[tuple[list[int], Sampling, Completion]] = field(default_factory=list)

    async def generate(self, prompt: Sequence[int], sampling: Sampling) -> Completion:
        done = await self.inner.generate(prompt, sampling)
        self.calls.append((list(prompt), sampling, done))
        return done


async def digits(group: Group) -> list[float | None]:
    """The share of digits and letters in what was said: a real, deterministic verdict."""
    texts = [trajectory.completion for trajectory in group]
    return [sum(c.isalnum() for c in text) / max(len(text), 1) for text in texts]


def player(engine: Any, chat: Chat, env: Any = SingleTurn, tokens: int = 12) -> Player:
    return Player(engine, chat, env, Sampling(temperature=1.0, max_tokens=tokens), 400)


def play(engine: Any, chat: Chat, *draws: Draw, reward: Any = digits, seed: int = 1, **settings: Any) -> list[Group]:
    return asyncio.run(rollout(player(engine, chat, **settings), reward, TASKS, SIZE, seed, draws))[0]


def own(group: Group) -> Group:
    return tuple(t for t in group if not t.drawn)


def further(group: Group, number: int = 1) -> Group:
    return tuple(t for t in group if t.drawn == number)


def tokens(group: Group) -> list[list[int]]:
    return [sample.tokens for t in group for sample in t.samples]


def chosen(trajectory: Trajectory) -> list[int]:
    (sample,) = trajectory.samples
    return [token for token, mine in zip(sample.tokens, sample.mask, strict=True) if mine]


def all_nan(trajectory: Trajectory) -> bool:
    return all(math.isnan(x) for sample in trajectory.samples for x in sample.logprobs)


# --- seeds, scores and numbers --------------------------------------------------------------------------------------

EVERY = [
    Draw(temperature=0.0),
    Draw(count=2, hint="{prompt} ({answer})"),
    Draw(count=3, go_on=" Wait, ", below=2.0),
    Draw(recorded="solution"),
]


def test_draws_do_not_shift_the_groups_own_samples(engine: LocalEngine, chat: Chat) -> None:
    plain = play(engine, chat)
    drawn = play(engine, chat, *EVERY)
    assert [tokens(own(group)) for group in drawn] == [tokens(group) for group in plain]
    assert [[t.score for t in own(group)] for group in drawn] == [[t.score for t in group] for group in plain]
    assert [[t.drawn for t in group] for group in drawn] == [[0, 0, 1, 2, 2, 4, 3, 3, 3]] * 3
    assert all(t.score is not None for group in drawn for t in group)
    assert summary(drawn) == summary(plain), "what is logged is of the policy's own samples"


def test_draws_are_reproducible_and_depend_on_the_seed(engine: LocalEngine, chat: Chat) -> None:
    first, again, other = (play(engine, chat, *EVERY, seed=seed) for seed in (1, 1, 2))
    assert [tokens(group) for group in first] == [tokens(group) for group in again]
    hinted_once, hinted_twice = further(first[0], 2)
    assert hinted_once.samples[0].tokens != hinted_twice.samples[0].tokens, "each sample has a seed of its own"
    assert tokens(further(first[0], 2)) != tokens(further(other[0], 2))
    assert tokens(further(first[0], 1)) == tokens(further(other[0], 1)), "greedy has none"


def test_a_batch_knows_who_was_drawn_how(engine: LocalEngine, chat: Chat) -> None:
    groups = play(engine, chat, *EVERY)
    batch = Batch.of(groups)
    assert batch.drawn.tolist() == [t.drawn for group in groups for t in group]
    known = torch.isfinite(batch.logprobs)
    assert (known[batch.drawn == 0] == batch.mask[batch.drawn == 0]).all()
    assert not known[batch.drawn > 0].any(), "nobody's log-probs pass for the learner's"


# --- greedy, recorded -----------------------------------------------------------------------------------------------


def test_greedy_is_the_likeliest_answer(engine: LocalEngine, chat: Chat, tiny_model: Path) -> None:
    recorded = Recording(engine)
    groups = play(recorded, chat, Draw(temperature=0.0))
    learner = Learner(Policy(tiny_model, LORA, device="cpu", dtype="float32"), Schedule(lr=1e-3, steps=1))
    for group in groups:
        (greedy,) = further(group)
        assert all_nan(greedy)
        assert greedy.samples[0].version == -1 or greedy.samples[0].version == own(group)[0].samples[0].version
    greedy_calls = [(p, c) for p, s, c in recorded.calls if s.temperature == 0]
    assert [p + c.tokens for p, c in greedy_calls] == [further(group)[0].samples[0].tokens for group in groups]
    batch = Batch.of([(replace(further(group)[0], score=0.0),) for group in groups])
    logits = learner.policy.model(input_ids=batch.tokens, attention_mask=batch.valid.long()).logits
    likeliest = torch.nn.functional.pad(logits.argmax(-1)[:, :-1], (1, 0))
    assert (likeliest == batch.tokens)[batch.mask].all()


def test_a_recorded_answer_is_the_templates_demonstration(engine: LocalEngine, chat: Chat) -> None:
    groups = play(engine, chat, Draw(count=2, recorded="solution"))
    for task, group in zip(TASKS, groups, strict=True):
        for answer in further(group):
            messages = (*task.messages, {"role": "assistant", "content": task.info["solution"]})
            prompt, said = chat.demonstration(messages)
            assert answer.samples[0].tokens == prompt + said
            assert chosen(answer) == said
            assert said[-1] == chat.end
            assert all_nan(answer)
            assert answer.samples[0].version == -1
            assert answer.completion == task.info["solution"]
            assert answer.score == asyncio.run(digits((answer,)))[0]


# --- hints ----------------------------------------------------------------------------------------------------------


def test_a_hint_is_shown_and_not_kept(engine: LocalEngine, chat: Chat) -> None:
    recorded = Recording(engine)
    draw = Draw(count=2, hint="{prompt} ({answer})")
    groups = play(recorded, chat, draw)
    for task, group in zip(TASKS, groups, strict=True):
        shown = chat.prompt(({"role": "user", "content": f"{task.messages[-1]['content']} ({task.info['answer']})"},))
        plain = chat.prompt(task.messages)
        calls = [c.tokens for p, _, c in recorded.calls if p == shown]
        assert len(calls) == 2
        for answer, sampled in zip(further(group), calls, strict=True):
            (sample,) = answer.samples
            assert sample.tokens == plain + sampled
            assert sample.mask == [False] * len(plain) + [True] * len(sampled)
            assert all_nan(answer)
            assert answer.messages[:-1] == task.messages
            assert answer.messages[-1]["content"] == chat.decode(sampled)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        ("{prompt} {key}", ["{key}", "it has answer, solution, prompt"]),
        ("{prompt} {gone}", ["{gone}", "nothing under that name"]),
        ("{prompt} \\boxed{}", ["written twice"]),
        ("{prompt} {0}", ["written twice"]),
        ("{answer.real}", ["the name of a column and nothing else"]),
        ("{answer:>9}", ["the name of a column and nothing else"]),
        ("{prompt} {", ["does not read"]),
    ],
)
def test_a_hint_that_names_no_column_is_refused(hint: str, words: list[str]) -> None:
    task = replace(TASKS[0], info={**TASKS[0].info, "gone": None})
    with pytest.raises(InputError) as refused:
        hinted(Draw(hint=hint), task)
    for word in words:
        assert word in str(refused.value)


def test_braces_written_twice_stand_for_themselves() -> None:
    assert placeholders("{prompt} \\boxed{{{answer}}}") == {"prompt", "answer"}
    (message,) = hinted(Draw(hint="{prompt} \\boxed{{{answer}}}"), TASKS[2])
    assert message["content"] == "Say 2 \\boxed{2}"


@dataclass
class Announced:
    """An environment with a system message of its own, which ends after `turns` answers and pays 0.5 for each."""

    task: Task
    turns: int = 1
    said: int = 0

    async def reset(self) -> tuple[Message, ...]:
        return ({"role": "system", "content": "Be brief."}, *self.task.messages)

    async def step(self, action: Action) -> Turn:
        self.said += 1
        return Turn(({"role": "user", "content": "More?"},), reward=0.5, done=self.said == self.turns)

    async def close(self) -> None: ...


def test_the_environments_opening_stays(engine: LocalEngine, chat: Chat) -> None:
    groups = play(engine, chat, Draw(hint="{prompt} ({answer})"), Draw(recorded="solution"), env=Announced)
    for group in groups:
        prompt = chat.prompt(({"role": "system", "content": "Be brief."}, *group[0].task.messages))
        assert all(t.samples[0].tokens[: len(prompt)] == prompt for t in group)
        assert all(t.messages[0]["role"] == "system" for t in group)


# --- going on -------------------------------------------------------------------------------------------------------


def test_an_answer_is_gone_on_from_its_end(engine: LocalEngine, chat: Chat) -> None:
    recorded = Recording(engine)
    groups = play(recorded, chat, Draw(count=3, go_on=" Wait, again: "), tokens=60)
    hint = chat.encode(" Wait, again: ")
    finishes = set()
    for task, group in zip(TASKS, groups, strict=True):
        prompt = chat.prompt(task.messages)
        for i, answer in enumerate(further(group)):
            earlier = own(group)[i % SIZE]
            said = chosen(earlier)
            finishes.add(earlier.finish)
            begun = prompt + (said[:-1] if earlier.finish == "stop" else said) + hint
            (sampled,) = [c.tokens for p, s, c in recorded.calls if p == begun and p + c.tokens == tokens((answer,))[0]]
            (sample,) = answer.samples
            assert sample.tokens == begun + sampled
            wanted = [False] * len(prompt) + [True] * (len(begun) - len(prompt) - len(hint))
            assert sample.mask == wanted + [False] * len(hint) + [True] * len(sampled)
            assert all_nan(answer)
            assert answer.completion == chat.decode(sample.tokens[len(prompt) :])
    assert finishes == {"stop", "length"}, "the test wants both"


def test_a_hint_that_is_learned_is_chosen(engine: LocalEngine, chat: Chat) -> None:
    plain = play(engine, chat, Draw(go_on=" Wait, "))
    learned = play(engine, chat, Draw(go_on=" Wait, ", learned=True))
    for a, b in zip(plain, learned, strict=True):
        (masked,), (kept,) = further(a), further(b)
        assert masked.samples[0].tokens == kept.samples[0].tokens
        assert kept.length - masked.length == len(chat.encode(" Wait, "))
        assert kept.samples[0].mask.index(True) == len(chat.prompt(kept.task.messages))
        assert all(kept.samples[0].mask[kept.samples[0].mask.index(True) :])


SPOKEN = "It is 12. Wait, 34. Alternatively 46"


def spoken(chat: Chat, text: str, task: Task = TASKS[0]) -> Trajectory:
    """An own answer with this text, in its usual tokens."""
    prompt, said = chat.demonstration((*task.messages, {"role": "assistant", "content": text}))
    mask = [False] * len(prompt) + [True] * len(said)
    paid = [0.5 * (i == len(prompt)) for i in range(len(mask))]  # some world that pays the first word
    sample = Sample(prompt + said, mask, [-1.0 if m else NAN for m in mask], paid, 3)
    return Trajectory(task, task.messages, [sample], score=0.0)


@pytest.mark.parametrize(
    ("at", "kept"),
    [
        (r"\b(Wait|Alternatively)\b", "It is 12. "),
        (r"(?<=Wait,)", "It is 12. Wait,"),
        (r"Alternatively", "It is 12. Wait, 34. "),
        (r"never said", SPOKEN),
        (r"It", ""),
        ("", SPOKEN),
    ],
)
def test_the_place_of_a_hint(engine: LocalEngine, chat: Chat, at: str, kept: str) -> None:
    from rlft.draws import further as draw_further

    recorded = Recording(engine)
    draw = Draw(go_on="Hmm, ", at=at)
    (answer,) = asyncio.run(draw_further(player(recorded, chat), draw, 1, TASKS[0], 5, [spoken(chat, SPOKEN)]))
    ((shown, _, sampled),) = recorded.calls
    prompt = chat.prompt(TASKS[0].messages)
    hint = chat.encode("Hmm, ")
    begun = shown[len(prompt) : len(shown) - len(hint)]
    assert kept.startswith(chat.decode(begun)), "never more than what stands before the place"
    assert len(kept) - len(chat.decode(begun)) <= 1, "cut between tokens: a space may belong to the word after it"
    assert begun == spoken(chat, SPOKEN).samples[0].tokens[len(prompt) : len(prompt) + len(begun)]
    assert shown[-len(hint) :] == hint
    assert answer.samples[0].tokens == shown + sampled.tokens
    assert answer.samples[0].rewards == [0.0] * len(answer.samples[0].tokens), "what was paid before does not count"
    assert answer.samples[0].version == sampled.version


@pytest.mark.parametrize("text", ["naïve 数学 Wait 🙂", "数数数Wait", "🙂🙂Wait🙂", "aé" * 40 + "Wait", "Wait"])
def test_no_character_is_cut_in_half(chat: Chat, text: str) -> None:
    said = chat.encode(text)
    before = text[: text.index("Wait")]
    count = _fitting(chat, said, before)
    assert chat.decode(said[:count]) == before
    assert "\ufffd" not in chat.decode(said[:count])
    for place in range(len(text) + 1):
        kept = chat.decode(said[: _fitting(chat, said, text[:place])])
        assert text[:place].startswith(kept)
        assert place - len(kept) < 8, "the tokens of the longest word"


def test_no_character_is_cut_where_a_byte_decodes_to_a_character(chat: Chat) -> None:
    """Byte fallback, as in Llama's tokenizer: half a character is longer than the whole one."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    plain = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    plain.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    other = copy(chat)
    other.tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain)
    text = "数a🙂数学b🙂"
    said = list(text.encode())
    assert len(other.decode(said[:2])) > len(other.decode(said[:3]))
    for place in range(len(text) + 1):
        kept = other.decode(said[: _fitting(other, said, text[:place])])
        assert text[:place].startswith(kept)
        assert len(kept) == place


def test_only_the_first_answer_of_a_conversation_is_gone_on_from(engine: LocalEngine, chat: Chat) -> None:
    """The world is at its beginning again, and what it said and paid later is not there."""
    recorded = Recording(engine)
    groups = play(recorded, chat, Draw(count=SIZE, go_on=" Wait, "), env=lambda task: Announced(task, 3), tokens=40)
    turns = 0
    for group in groups:
        for earlier, answer in zip(own(group), further(group), strict=True):
            turns = max(turns, len(earlier.turns))
            first = earlier.turns[0]
            n = first.end + 1 - (earlier.samples[0].tokens[first.end] == chat.end)
            assert answer.samples[0].tokens[:n] == earlier.samples[0].tokens[:n]
            assert answer.samples[0].tokens[n : n + len(chat.encode(" Wait, "))] == chat.encode(" Wait, ")
            assert sum(answer.samples[0].rewards) == 0.5 * len(answer.turns)
    assert turns > 1


def test_a_beginning_without_room_is_left_out(engine: LocalEngine, chat: Chat) -> None:
    narrow = replace(player(engine, chat), context=len(chat.prompt(TASKS[0].messages)) + 14)
    draws = [Draw(go_on=" Wait, again and again and again: "), Draw(temperature=0.0)]
    groups = asyncio.run(rollout(narrow, digits, TASKS, SIZE, 1, draws))[0]
    assert [len(further(group)) for group in groups] == [0, 0, 0]
    assert [len(further(group, 2)) for group in groups] == [1, 1, 1]


# --- which tasks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measure", "below", "scores", "called"),
    [
        ("best", 1.0, [0.0, 1.0], False),
        ("best", 1.0, [0.0, 0.9], True),
        ("mean", 0.5, [0.0, 1.0], False),
        ("mean", 0.6, [0.0, 1.0], True),
        ("best", 0.8, [0.0, math.fsum([0.1, 0.7])], False),  # 0.7999999999999999
        ("mean", 0.4, [0.0, math.fsum([0.1, 0.7])], False),
        ("mean", 0.6, [None, 1.0], False),
        ("best", 1.0, [None, 0.0], True),
        ("best", 1.0, [None, None], False),
    ],
)
def test_only_tasks_below(
    engine: LocalEngine, chat: Chat, measure: Any, below: float, scores: list[float | None], called: bool
) -> None:
    judged: list[int] = []

    async def verdicts(group: Group) -> list[float | None]:
        judged.append(len(group))
        return scores if len(group) == SIZE else [0.25] * len(group)

    draws = [Draw(recorded="solution", below=below, measure=measure), Draw(count=2, go_on="!", below=below)]
    (group,) = asyncio.run(rollout(player(engine, chat), verdicts, TASKS[:1], SIZE, 1, draws[:1]))[0]
    assert len(further(group)) == called
    assert judged == [SIZE] + [1] * called, "scored apart, after the group's own"
    if measure == "best":
        judged.clear()
        (group,) = asyncio.run(rollout(player(engine, chat), verdicts, TASKS[:1], SIZE, 1, draws[1:]))[0]
        assert len(further(group)) == 2 * called


def test_trap_32_a_member_without_a_score_is_not_a_zero(engine: LocalEngine, chat: Chat) -> None:
    async def unsure(group: Group) -> list[float | None]:
        return [None if t.drawn else 1.0 for t in group]

    groups = play(engine, chat, Draw(temperature=0.0), reward=unsure)
    assert Batch.of(groups).drawn.tolist() == [0] * SIZE * 3


def test_a_reward_that_fails_on_a_draw_ends_the_step(engine: LocalEngine, chat: Chat) -> None:
    async def broken(group: Group) -> list[float | None]:
        if any(t.drawn for t in group):
            raise OSError("no grader today")
        return [0.0] * len(group)

    with pytest.raises(OSError, match="no grader today"):
        play(engine, chat, Draw(go_on="!", below=1.0), reward=broken)


# --- the source -----------------------------------------------------------------------------------------------------


def test_refilled_groups_wait_with_their_draws(engine: LocalEngine, chat: Chat) -> None:
    """And come back from a checkpoint as they were."""

    def made() -> Refilled:
        tasks = [replace(TASKS[0], id=f"r{i}") for i in range(4)]
        inner = Rollouts(tasks, player(engine, chat), digits, 4, SIZE, 7, EVERY)
        return Refilled(inner, select.informative, 2, 5)

    whole = made()
    asyncio.run(whole.next())
    state = json.loads(json.dumps(whole.state_dict()))
    assert state["waiting"], "otherwise this proves little"
    other = made()
    other.load_state_dict(state)
    for _ in range(2):
        first, second = asyncio.run(whole.next()), asyncio.run(other.next())
        assert [[t.drawn for t in group] for group in first] == [[t.drawn for t in group] for group in second]
        assert [tokens(group) for group in first] == [tokens(group) for group in second]
    assert whole.selected is not None
    assert {t.drawn for group in whole.selected for t in group} == {0, 1, 2, 3, 4}


def test_sampled_tokens_are_counted_once_and_without_what_was_written_down(engine: LocalEngine, chat: Chat) -> None:
    served = Recording(engine)
    draws = [Draw(recorded="solution"), Draw(hint="{prompt}!"), Draw(go_on=" Wait, ", learned=True)]
    source = Rollouts(TASKS, player(served, chat), digits, 3, SIZE, 7, draws)
    engine.version = 0
    try:
        asyncio.run(source.next())
    finally:
        engine.version = -1
    assert source.metrics["tokens/generated"] == sum(len(c.tokens) for _, _, c in served.calls)


# --- before a model is loaded ---------------------------------------------------------------------------------------


def draws_of(**options: Any) -> Algorithm:
    """What `type: custom` builds here."""
    return Algorithm(
        select.everything, credit.uniform, weigh.by_token, losses.likelihood, draws=(Draw(**options),),
        needs=("ref_logprobs",),
    )  # fmt: skip


def settings(tiny_model: Path, tmp_path: Path, **changes: Any) -> Any:
    rows = tmp_path / "tasks.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"Say {i}", "answer": i, "note": "hm" if i else None}) + "\n"
                            for i in range(3)))  # fmt: skip
    options = changes.pop("options")
    given = {
        "name": "draws",
        "steps": 1,
        "model": {"path": str(tiny_model), "device": "cpu"},
        "adapter": LORA,
        "data": {"train": str(rows)},
        "reward": {"type": "number"},
        "rollout": {"engine": {"type": "local"}, "sampling": {"max_tokens": 8}},
        "algorithm": {"type": "custom", "path": "tests.test_draws:draws_of", "options": options},
    }
    return validate(given | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": {"hint": "{prompt} {solution}"}}, ["train:1", "{solution}", "it has answer, prompt"]),
        ({"options": {"hint": "{prompt} {note}"}}, ["train:1", "{note}", "nothing under that name"]),
        ({"options": {"recorded": "solution"}}, ["train:1", "solution", "data.columns.solution="]),
        ({"options": {"go_on": "Wait", "at": "(Wait"}}, ["'(Wait'", "regular expression"]),
        ({"options": {"reference": True}}, ["rollout.engine.type", "Choose vllm"]),
        ({"options": {"reference": True}, "rollout": {"engine": {"type": "vllm"}}, "sync": {"type": "merged"}},
         ["sync.type", "adapter or auto"]),
        ({"options": {"reference": True}, "rollout": {"engine": {"type": "vllm"}}, "adapter": None},
         ["adapter.type", "Choose lora"]),
        ({"options": {"reference": True}, "rollout": {"engine": {"type": "vllm"}}, "reference": {"every": 3}},
         ["reference.every", "Set reference.every=0"]),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(InputError) as refused:
        material(settings(tiny_model, tmp_path, **changes))
    for word in words:
        assert word in str(refused.value)


LABELS = [True, False, None, 0]


def labelled(tiny_model: Path, tmp_path: Path, column: str, algorithm: dict[str, Any], **changes: Any) -> Any:
    """A config on rows with an answer in `column` and a label, of which the second and the fourth are wrong."""
    rows = tmp_path / f"labelled-{column}.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "Say", "answer": 1, column: "no", "label": label}) + "\n"
                            for label in LABELS))  # fmt: skip
    config = settings(tiny_model, tmp_path, options={})
    return validate({**config.model_dump(exclude_unset=True), "data": {"train": str(rows), **changes},
                     "algorithm": algorithm})  # fmt: skip


def test_an_answer_that_is_labelled_wrong_is_not_imitated(tiny_model: Path, tmp_path: Path) -> None:
    def hpt(column: str, name: str, **changes: Any) -> Any:
        return labelled(tiny_model, tmp_path, column, {"type": "hpt", "demonstration": name}, **changes)

    said = r"2 row\(s\) whose label is false, and the completion would be imitated; leave.*Rows: train:2, train:4"
    with pytest.raises(InputError, match=said):
        material(hpt("completion", "completion"))
    with pytest.raises(InputError, match=said):
        material(hpt("solution", "completion", columns={"completion": "solution"}))
    assert len(material(hpt("solution", "solution")).tasks) == 4, "the label is about something else"
    assert len(material(hpt("completion", "completion", columns={"topic": "label"})).tasks) == 4


def test_draws_beside_recorded_answers_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """Nothing is sampled there, so they would silently be left out."""
    custom = {"type": "custom", "path": "tests.test_draws:draws_of", "options": {"recorded": "recorded"}}
    with pytest.raises(InputError, match=r"data\.columns\.completion: .*'text' has.*data\.columns\.recorded=text"):
        material(labelled(tiny_model, tmp_path, "text", custom, columns={"completion": "text"}))
    with pytest.raises(InputError, match=r"data\.columns\.completion: .*data\.columns\.recorded=completion"):
        material(labelled(tiny_model, tmp_path, "completion", custom))
    kept = material(labelled(tiny_model, tmp_path, "completion", custom, columns={"recorded": "completion"}))
    assert len(kept.tasks) == 4


def test_the_context_has_room_for_what_is_drawn(tiny_model: Path, tmp_path: Path) -> None:
    chat = Chat(tiny_model)
    plain = material(settings(tiny_model, tmp_path, options={"temperature": 0.0})).context
    hint = "{prompt} and then again"
    assert material(settings(tiny_model, tmp_path, options={"hint": hint})).context >= plain + 5
    longer = material(settings(tiny_model, tmp_path, options={"go_on": " Wait, again"})).context
    assert longer == plain + 8 + len(chat.encode(" Wait, again"))


def test_a_recorded_answer_beyond_the_models_positions_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = settings(tiny_model, tmp_path, options={"recorded": "solution"})
    (tmp_path / "tasks.jsonl").write_text(
        json.dumps({"prompt": "Say", "answer": 1, "solution": "one two " * 400}) + "\n"
    )
    with pytest.raises(InputError, match="longer than 512 tokens"):
        material(config)


def test_the_kind_of_sync_that_keeps_the_reference(tiny_model: Path, tmp_path: Path) -> None:
    config = settings(tiny_model, tmp_path, options={"reference": True}, rollout={"engine": {"type": "vllm"}})
    policy = Policy(tiny_model, LORA, device="cpu", dtype="float32")
    assert sync_kind(config, policy, reference=True) == "adapter"
    assert sync_kind(config, policy) == "merged"
    changed = Policy(tiny_model, {**LORA, "init_lora_weights": "pissa"}, device="cpu", dtype="float32")
    with pytest.raises(InputError, match="changed the base"):
        sync_kind(config, changed, reference=True)


# --- the policy before training -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trap_19_reference_samples_are_the_first_policys(tiny_model: Path, chat: Chat, tmp_path: Path) -> None:
    """Real vLLM and adapters far from zero, two versions: each row's log-probs are those of the policy that drew it.

    vLLM for a CPU serves a request without an adapter with the last adapter that it has.
    """
    policy = Policy(tiny_model, LORA, device="cpu", dtype="float32")
    learner = Learner(policy, Schedule(lr=1e-3, steps=1))
    log = tmp_path / "engine.log"
    served = VllmEngine(tiny_model, torch.float32, 128, 24, 0.05, lora_rank=4, reference=True, log=log)
    sync = Sync(policy, served, learner, "adapter", [chat.prompt(TASKS[0].messages)], Sampling())

    async def drawn(version: int) -> tuple[list[Group], Recording]:
        await sync(policy, version)
        recorded = Recording(served)
        draws = [Draw(count=4, reference=True)]
        return (await rollout(player(recorded, chat), digits, TASKS, 4, version, draws))[0], recorded

    async def both() -> None:
        try:
            for version in (4, 5):
                _move(policy, version)
                _told_apart(learner, *await drawn(version))
        finally:
            await served.close()
            sync.close()

    asyncio.run(both())


def _move(policy: Policy, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in policy.trainable():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


def _told_apart(learner: Learner, groups: list[Group], recorded: Recording) -> None:
    batch = Batch.of(groups)
    now, before = learner.logprobs(batch), learner.logprobs(batch, reference=True)
    mine, theirs = batch.mask & (batch.drawn == 0)[:, None], batch.mask & (batch.drawn == 1)[:, None]
    assert (now - batch.logprobs)[mine].abs().max() < 1e-4
    assert torch.isnan(batch.logprobs[theirs]).all()
    assert set(batch.version[batch.drawn == 1].tolist()) == {0}, "of the policy before training"
    assert batch.version[batch.drawn == 0].min() > 0
    told = {tuple(p + c.tokens): c.logprobs for p, s, c in recorded.calls if s.reference}
    assert len(told) > 6
    for row in (batch.drawn == 1).nonzero().flatten().tolist():
        said = told[tuple(batch.tokens[row][batch.valid[row]].tolist())]
        assert before[row][batch.mask[row]].tolist() == pytest.approx(said, abs=1e-4)
        assert now[row][batch.mask[row]].tolist() != pytest.approx(said, abs=0.1)


def test_an_engine_that_keeps_no_reference_says_so(tiny_model: Path, tmp_path: Path) -> None:
    served = VllmEngine(tiny_model, torch.float32, 64, 8, 0.02, log=tmp_path / "engine.log")

    async def asked() -> None:
        try:
            await served.generate([7, 8], Sampling(reference=True))
        finally:
            await served.close()

    with pytest.raises(RunError, match="not started to keep the policy before training"):
        asyncio.run(asked())
