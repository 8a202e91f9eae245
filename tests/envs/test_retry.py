"""Trying again: what is asked, what is kept of it, and when it ends."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlft.chat import Chat
from rlft.engine.local import LocalEngine
from rlft.envs.base import Action
from rlft.envs.retry import RetryConfig
from rlft.episode import opened
from rlft.player import Opening, Player
from rlft.settings import validate
from rlft.source import Recorded, Refilled
from rlft.types import InputError, Message, Sampling, Task

QUESTION: Message = {"role": "user", "content": "What is {12} + 34?"}
TASK = Task("task-1", ({"role": "system", "content": "Be short."}, QUESTION), {"answer": "46"})
AGAIN = "The answer is incorrect. Please try again. Here's the question: What is {12} + 34?"
Play = Callable[..., Any]


def finished(play: Play, turns: int, **knobs: Any) -> Any:
    """An episode of which no answer was cut off."""
    for seed in range(200):
        played = play(RetryConfig(turns=turns, **knobs).build(), TASK, seed)
        if all(c.finish == "stop" for c in played.engine.completions):
            return played
    raise AssertionError("no such episode")


def test_every_answer_but_the_last_is_asked_again(play: Play) -> None:
    played = finished(play, 3)
    messages = played.trajectory.messages
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant", "user", "assistant"]
    assert messages[3] == messages[5] == {"role": "user", "content": AGAIN}
    assert len(played.engine.completions) == 3
    assert played.trajectory.finish == "stop"


def test_what_was_said_is_known_turn_by_turn(play: Play) -> None:
    trajectory = finished(play, 3).trajectory
    (sample,) = trajectory.samples
    ends = [i for i, mine in enumerate(sample.mask) if mine and not (sample.mask[i + 1 :] or [False])[0]]
    assert [(turn.sample, turn.end) for turn in trajectory.turns] == [(0, end) for end in ends]
    assert [turn.text for turn in trajectory.turns] == [trajectory.messages[i]["content"] for i in (2, 4, 6)]
    assert [turn.messages for turn in trajectory.turns] == [trajectory.messages[: i + 1] for i in (2, 4, 6)]


def test_trap_1_no_sampled_token_is_encoded_again(play: Play, chat: Chat) -> None:
    """Whatever the text would be as tokens, the ids of the trajectory are those that the engine gave."""
    drifted = 0
    for seed in range(20):
        played = play(RetryConfig(turns=3).build(), TASK, seed)
        (sample,) = played.trajectory.samples
        place = len(played.engine.prompts[0])
        for i, completion in enumerate(played.engine.completions):
            assert played.engine.prompts[i] == sample.tokens[:place]
            end = place + len(completion.tokens)
            assert sample.tokens[place:end] == completion.tokens
            assert sample.logprobs[place:end] == completion.logprobs
            drifted += chat.encode(chat.decode(completion.tokens)) != [t for t in completion.tokens if t > 2]
            place = len(played.engine.prompts[i + 1]) if i + 1 < len(played.engine.prompts) else end
    assert drifted > 5, "encoding again would have changed the tokens, so this test means something"


def test_trap_3_the_request_is_nobodys_choice(play: Play) -> None:
    played = finished(play, 2)
    (sample,) = played.trajectory.samples
    first, second = played.engine.completions
    between = slice(len(played.engine.prompts[0]) + len(first.tokens), len(played.engine.prompts[1]))
    assert between.stop > between.start
    assert not any(sample.mask[between])
    assert all(math.isnan(x) for x in sample.logprobs[between])
    assert sum(sample.mask) == len(first.tokens) + len(second.tokens)


def test_trap_5_a_request_that_does_not_fit_is_left_out_whole(play: Play) -> None:
    whole = finished(play, 2)
    seed = next(s for s in range(200) if play(RetryConfig().build(), TASK, s).trajectory.samples[0].tokens
                == whole.trajectory.samples[0].tokens)  # fmt: skip
    short = play(RetryConfig().build(), TASK, seed, context=len(whole.engine.prompts[1]))
    assert short.trajectory.finish == "length"
    assert short.trajectory.samples[0].tokens == whole.trajectory.samples[0].tokens[: whole.trajectory.turns[0].end + 1]
    assert short.trajectory.messages == whole.trajectory.messages[:3]
    assert short.trajectory.turns == whole.trajectory.turns[:1]


def test_turns_lie_where_they_are_kept(play: Play, chat: Chat, engine: LocalEngine) -> None:
    """Also where the policy was shown another beginning than the one that is kept, and after a round through JSON."""
    hint: Message = {"role": "user", "content": "A much longer question, in which the answer is told: 46."}
    shown, kept = chat.prompt((hint,)), opened(chat.prompt(TASK.messages))
    sampling = Sampling(max_tokens=60, stop=("e", "a", "s"))
    player = Player(engine, chat, RetryConfig(turns=3).build(), sampling, 600)
    lengths = set()
    for seed in range(20):
        trajectory = asyncio.run(player.play(TASK, seed, Opening(list(shown), kept)))
        mask = trajectory.samples[0].mask
        ends = [i for i, mine in enumerate(mask) if mine and not (mask[i + 1 :] or [False])[0]]
        assert [turn.end for turn in trajectory.turns] == ends
        again = Refilled(Recorded([(trajectory,)], 1, 0), lambda groups: list(groups), 1, 1)
        again._waiting = [(trajectory,)]
        state = json.loads(json.dumps(again.state_dict()))
        again.load_state_dict(state)
        assert again._waiting[0][0].turns == trajectory.turns
        lengths.add(len(ends))
    assert len(shown) != len(kept.tokens)
    assert max(lengths) > 1


def test_a_right_answer_ends_it(play: Play, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_checks.py").write_text("def right(text, task):\n    return task.info['answer'] in text\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    env = RetryConfig(turns=5, check="my_checks:right").build()(TASK)

    async def episode() -> list[bool]:
        await env.reset()
        return [(await env.step(Action(text, "stop"))).done for text in ("45", "It is 46.")]

    assert asyncio.run(episode()) == [False, True]


def test_an_async_check_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called, it gives a coroutine, which is never false."""
    (tmp_path / "my_async_checks.py").write_text(
        "async def right(text, task):\n    return False\n\n\n"
        "class Judge:\n    async def __call__(self, text, task):\n        return False\n\n\njudge = Judge()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("right", "judge"):
        with pytest.raises(InputError, match=rf"env\.check: my_async_checks:{name} is an async function.*plain"):
            RetryConfig(check=f"my_async_checks:{name}").build()


def test_a_check_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"env\.check: no_such:thing cannot be had: ModuleNotFoundError"):
        RetryConfig(check="no_such:thing").build()


def test_the_context_has_room_for_every_turn(play: Play, chat: Chat) -> None:
    """What a run reserves is enough for the longest episode."""
    from rlft.material import SLACK

    knobs = RetryConfig(turns=3)
    asked, answer = len(chat.prompt(TASK.messages)), 7
    reserved = asked + answer + 2 * (answer + SLACK) + knobs.room(asked, lambda text: len(chat.encode(text))) + SLACK
    longest = max(len(play(knobs.build(), TASK, s, tokens=answer).trajectory.samples[0].tokens) for s in range(60))
    assert longest > asked + answer, "some episode went on"
    assert longest <= reserved


@pytest.mark.parametrize(("change", "message"), [
    ({"env": {"type": "retry", "turns": 1}}, r"env\.turns: .*greater than or equal to 2"),
    ({"env": {"type": "retry", "turn": 3}}, r"env\.turn: there is no such key; did you mean 'turns'"),
    ({"env": {"type": "retri"}}, r"env\.type: there is no env 'retri'; did you mean 'retry'"),
    ({"env": {"turns": 3}}, r"env\.type: say which env it is"),
    ({"env": {"type": "single_turn"}}, r"env\.type: rise learns from turn to turn, and single_turn has one; set env="),
    ({"reward": {"type": "number"}}, r"reward\.type: rise needs a verdict on every turn.* wrap it: reward: "),
    ({"reward": {"type": "per_turn", "of": {"type": "number", "kye": "x"}}}, r"no such key; did you mean .key."),
])  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    run: dict[str, Any] = {
        "name": "again", "steps": 1, "model": {"path": "tiny-random"}, "data": {"train": {"type": "generated"}},
        "env": {"type": "retry"}, "reward": {"type": "per_turn", "of": {"type": "number"}},
        "algorithm": {"type": "rise"},
    }  # fmt: skip
    assert validate(run).env.type == "retry"
    with pytest.raises(InputError, match=message):
        validate(run | change)
