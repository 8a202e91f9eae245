"""Further members of a group: greedy or reference samples, answers with a hint, recorded answers (see `Draw`)."""

from __future__ import annotations

import re
import string
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

from rlft.chat import Chat, Tool
from rlft.episode import Episode, WorldFailed, append, opened
from rlft.fork import branch
from rlft.player import Opening, Player, derive_seed
from rlft.together import together
from rlft.types import NAN, Draw, InputError, Message, Sample, Task, Trajectory, least

NEAR = 16  # tokens; a character has at most 4 bytes


def waits(draw: Draw) -> bool:
    """The group's own samples have to be there, and scored, before."""
    return draw.below is not None or bool(draw.go_on or draw.branch)


def wanted(draw: Draw, own: Sequence[Trajectory]) -> bool:
    """Whether the task calls for this draw, by the scores of the group's own samples; nothing does without a score."""
    scores = [t.total for t in own if t.total is not None]
    if draw.below is None or not scores:
        return draw.below is None and bool(own)
    return (max(scores) if draw.measure == "best" else sum(scores) / len(scores)) < least(draw.below)


async def further(
    player: Player, draw: Draw, number: int, task: Task, seed: int, own: Sequence[Trajectory]
) -> list[Trajectory]:
    """The members that `draw`, the algorithm's `number`-th, adds to the task's own samples.

    One that would begin without room for a token is left out. Where the environment fails as it opens, one member says
    so, and there is no other.
    """
    try:
        return await _further(player, draw, number, task, seed, own)
    except WorldFailed as error:
        return [replace(player.failed(Episode(task), error.__cause__ or error), drawn=number)]


async def _further(
    player: Player, draw: Draw, number: int, task: Task, seed: int, own: Sequence[Trajectory]
) -> list[Trajectory]:
    if draw.recorded:
        return [replace(await _recorded(player, draw, task), drawn=number) for _ in range(draw.count)]
    temperature = player.sampling.temperature if draw.temperature is None else draw.temperature
    sampling = replace(player.sampling, temperature=temperature, reference=draw.reference)
    other = replace(player, sampling=sampling)
    if draw.branch:
        return [replace(t, drawn=number) for t in await _branched(other, draw, own, seed)]
    openings = [await _opening(player, draw, task, own, i) for i in range(draw.count)]
    fitting = [
        (i, o) for i, o in enumerate(openings) if o is None or max(len(o.shown), len(o.kept.tokens)) < player.context
    ]
    played = await together(other.play(task, derive_seed(seed, i), opening) for i, opening in fitting)
    comparable = sampling == player.sampling and not (draw.hint or draw.go_on)
    return [replace(t if comparable else _unknown(t), drawn=number) for t in played]


async def _branched(player: Player, draw: Draw, own: Sequence[Trajectory], seed: int) -> list[Trajectory]:
    """Episodes that branch off from the group's own, which take turns, each at its least expected places first.

    One whose world replied otherwise than before is left out, as it is no branch.
    """
    planned = [(i, branch(own[i % len(own)], draw.branch, i // len(own))) for i in range(draw.count)]
    found = [(i, fork) for i, fork in planned if fork is not None]
    plays = (player.play(fork.earlier.task, derive_seed(seed, i), None, fork.rehearsed) for i, fork in found)
    played = await together(plays)
    return [one for one, (_, fork) in zip(played, found, strict=True) if one.failed or fork.begins(one)]


def hinted(draw: Draw, task: Task, messages: Sequence[Message] = ()) -> tuple[Message, ...]:
    """The prompt, which is `messages` or else the task's, with the hint in place of its last message.

    Raises InputError where the task lacks a column that the hint names, or has nothing in it.
    """
    *before, last = messages or task.messages
    columns = {**task.info, "prompt": last["content"]}
    for name in placeholders(draw.hint):
        if columns.get(name) is None:
            have = ", ".join(key for key, value in columns.items() if value is not None)
            raise InputError(
                f"task {task.id}: the hint {draw.hint!r} names {{{name}}}, and the task has nothing under that "
                f"name; it has {have}"
            )
    return (*before, {**last, "content": string.Formatter().vformat(draw.hint, (), columns)})


def placeholders(hint: str) -> set[str]:
    """The columns that a hint names. Raises InputError for braces that name none."""
    literal = "braces that stand for themselves are written twice, {{ and }}"
    try:
        parts = list(string.Formatter().parse(hint))
    except ValueError as error:
        raise InputError(f"the hint {hint!r} does not read: {error}; {literal}") from error
    named = [(name, shape or conversion) for _, name, shape, conversion in parts if name is not None]
    for name, more in named:
        if more or not re.fullmatch(r"[^\W\d][^.\[\]]*", name):
            raise InputError(f"the hint {hint!r}: braces hold the name of a column and nothing else; {literal}")
    return {name for name, _ in named}


def written(draw: Draw, task: Task) -> str:
    """The recorded answer of a task. Raises InputError where there is none."""
    text = task.info.get(draw.recorded)
    if not isinstance(text, str) or not text.strip():
        raise InputError(
            f"task {task.id}: column {draw.recorded!r} holds no written answer, and the algorithm learns from one; "
            f"name the column with data.columns.{draw.recorded}=..."
        )
    return text


def demonstrated(
    chat: Chat, draw: Draw, task: Task, messages: Sequence[Message] = (), tools: Sequence[Tool] = ()
) -> Trajectory:
    """The recorded answer after the task's prompt, or another opening, as a trajectory without a score."""
    spoken = (*(messages or task.messages), {"role": "assistant", "content": written(draw, task)})
    prompt, said = chat.demonstration(spoken, tools)
    sample = opened(prompt)
    append(sample, said, [NAN] * len(said))
    return Trajectory(task, spoken, [sample])


async def _recorded(player: Player, draw: Draw, task: Task) -> Trajectory:
    return demonstrated(player.chat, draw, task, *await player.opening(task))


async def _opening(player: Player, draw: Draw, task: Task, own: Sequence[Trajectory], i: int) -> Opening | None:
    """Where the i-th play of a draw begins; None: where every play does."""
    if draw.hint:
        messages, tools = await player.opening(task)
        shown = player.chat.prompt(hinted(draw, task, messages), tools)
        return Opening(shown, opened(player.chat.prompt(messages, tools)))
    if not draw.go_on:
        return None
    begun, start = _cut(player.chat, draw, own[i % len(own)].samples[0])
    hint = player.chat.encode(draw.go_on)
    append(begun, hint, [NAN] * len(hint) if draw.learned else None)
    return Opening(list(begun.tokens), begun, tuple(begun.tokens[start:]))


def _cut(chat: Chat, draw: Draw, earlier: Sample) -> tuple[Sample, int]:
    """A first answer up to the place where the hint goes, which is where `at` first matches, else its end; its start.

    Nothing that an environment paid for it is kept: what counts is how the new answer ends.
    """
    start = earlier.mask.index(True)
    stop = next((i for i in range(start, len(earlier.mask)) if not earlier.mask[i]), len(earlier.mask))
    if not chat.decode(earlier.tokens[stop - 1 : stop]):  # the token that ended the turn
        stop -= 1
    said = earlier.tokens[start:stop]
    text = chat.decode(said)
    found = re.search(draw.at, text) if draw.at else None
    if found:
        stop = start + _fitting(chat, said, text[: found.start()])
    kept = Sample(earlier.tokens[:stop], earlier.mask[:stop], [NAN] * stop, [0.0] * stop, -1)
    return kept, start


def _fitting(chat: Chat, tokens: list[int], text: str) -> int:
    """How many of the tokens say the beginning of `text` and nothing else: never half of a character."""

    def length(count: int) -> int:
        return len(chat.decode(tokens[:count]))

    count = bisect_right(range(len(tokens) + 1), len(text), key=length) - 1
    count = min(max(count, 0) + NEAR, len(tokens))  # where bytes decode one by one, lengths do not only grow
    while count and not text.startswith(chat.decode(tokens[:count])):
        count -= 1
    return count


def _unknown(played: Trajectory) -> Trajectory:
    """Without log-probs: those of another policy, or after another prompt, must not pass for the learner's."""
    samples = [replace(sample, logprobs=[NAN] * len(sample.tokens)) for sample in played.samples]
    return replace(played, samples=samples)
