"""A trained reward model, loaded when it is first asked: what its head says at tokens of a conversation.

It comes from a checkpoint that `rlft train` wrote: the base model, the adapter, and the head, which stands in the
trained parameters as `own.head`. The run's config names the head's outputs: objectives, or users.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlft.types import InputError, Trajectory

if TYPE_CHECKING:
    from rlft.chat import Chat

HEAD, USERS = "own.head.", "own.users"
Output = Sequence[float]  # what the head says at one token


def checkpoint(path: Path) -> Path:
    """The checkpoint in a folder: itself, or the newest of a run. Raises InputError."""
    found = sorted((path / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    folder = found[-1] if found else path
    if not (folder / "trained.safetensors").is_file():
        raise InputError(f"the reward `model`: {path} is neither a run with checkpoints nor a checkpoint of one")
    return folder


@dataclass(frozen=True)
class Loaded:
    """Trunk, head, and tokenizer with the run's chat template.

    users: the learned mixture of each user, the generic one first; empty without.
    """

    trunk: Any
    head: Any
    chat: Chat
    users: Sequence[Sequence[float]] = ()


class Judge:
    """A reward model that loads itself when first asked.

    folder: a checkpoint. base: the folder of the model below it; None: as the checkpoint or its run says.
    device: auto, cpu or cuda. batch: rows per forward pass.
    """

    def __init__(self, folder: Path, base: str | None, device: str, batch: int) -> None:
        self._folder = folder
        self._base = base
        self._device = device
        self._batch = batch
        self._loaded: Loaded | None = None
        self._lock = threading.Lock()
        self._algorithm = _algorithm(folder)
        self._users = {str(name): i + 1 for i, name in enumerate(self._algorithm.get("users") or ())}

    @property
    def objectives(self) -> list[str]:
        """Names of the head's outputs, where it was trained on objectives and its run is at hand."""
        return list(self._algorithm.get("objectives") or ())

    def score(self, said: Output, user: Any, output: int) -> float:
        """One output; or, of a model that knows users, what it says for this one, and for others in general.

        As in `rlft.algorithms.losses.value.of_users`.
        """
        parts = self._parts()
        if not self._users:
            return said[output]
        number = self._users.get(str(user), 0)
        if not parts.users:
            return said[0] + (said[number] if number else 0.0)
        shares = [math.exp(x) for x in parts.users[number]]
        return sum(x * y for x, y in zip(said, shares, strict=True)) / sum(shares)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._parts().chat.decode(tokens)

    def tokens(self, trajectory: Trajectory) -> list[int]:
        """The conversation as the reward model was trained on such: prompt and answer, up to the end of the turn.

        One that ends with somebody else's turn is read as the prompt of the next answer. Raises InputError where the
        template refuses it.
        """
        chat = self._parts().chat
        if trajectory.messages[-1]["role"] != "assistant":
            return chat.prompt(trajectory.messages)
        prompt, said = chat.demonstration(trajectory.messages)
        return prompt + said

    def outputs(self, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> list[list[Output]]:
        """What the head says of each row, having read the tokens at its places. Raises InputError for unknown ids."""
        import torch

        parts = self._parts()
        trunk, head = parts.trunk, parts.head
        vocabulary, found = trunk.get_input_embeddings().num_embeddings, []
        if any(token >= vocabulary for row in rows for token in row):
            raise InputError("the reward `model`: the policy has another tokenizer; set read: messages")
        for start in range(0, len(rows), self._batch):
            part = rows[start : start + self._batch]
            tokens = torch.zeros(len(part), max(map(len, part)), dtype=torch.long)
            valid = torch.zeros_like(tokens)
            for i, row in enumerate(part):
                tokens[i, : len(row)], valid[i, : len(row)] = torch.tensor(row), 1
            with torch.no_grad():
                given = {"input_ids": tokens.to(trunk.device), "attention_mask": valid.to(trunk.device)}
                hidden = trunk(**given, use_cache=False)[0]
                for states, wanted in zip(hidden, places[start : start + self._batch], strict=True):
                    found.append(head(states[list(wanted)].to(head.weight.dtype)).double().tolist())
        return found

    def check(self, outputs: int) -> None:
        """Raises InputError where the head has fewer than `outputs`, or not as many as its run's users ask for."""
        parts = self._parts()
        have = parts.head.out_features
        if outputs > have:
            raise InputError(f"the reward `model`: output {outputs - 1} of a head with {have}")
        whole = len(parts.users) if parts.users else have
        if self._users and whole != len(self._users) + 1:
            raise InputError(
                f"the reward `model`: {self._folder} has {whole - 1} users and its run's config {len(self._users)}; "
                "give the run that it comes from"
            )

    def _parts(self) -> Loaded:
        with self._lock:
            if self._loaded is None:
                self._loaded = _load(self._folder, self._base, self._device)
            return self._loaded


def _load(folder: Path, base: str | None, device: str) -> Loaded:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    trained = load_file(folder / "trained.safetensors")
    if f"{HEAD}weight" not in trained:
        raise InputError(f"the reward `model`: {folder} has no head: it is no reward model's checkpoint")
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else torch.device(device)
    name = base or base_of(folder)
    try:
        kind = torch.bfloat16 if where.type == "cuda" else torch.float32
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=kind, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise InputError(f"the reward `model`: its base {name} does not load ({error}); set base") from error
    chat = _chat(folder, name)
    if (folder / "adapter").is_dir():
        model = PeftModel.from_pretrained(model, str(folder / "adapter")).get_base_model()
    else:
        own = {key: value for key, value in trained.items() if not key.startswith("own.")}
        model.load_state_dict(own, strict=False)
    weight = trained[f"{HEAD}weight"]
    head = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    head.load_state_dict({"weight": weight, "bias": trained[f"{HEAD}bias"]})
    model.to(where).eval()
    users = trained[USERS].double().tolist() if USERS in trained else ()
    return Loaded(getattr(model, model.base_model_prefix), head.to(where), chat, users)


def _chat(folder: Path, base: str) -> Chat:
    """The base's tokenizer with the chat template of the checkpoint's run; its own where the run is not at hand."""
    from rlft.chat import Chat

    template = (_config(folder).get("model") or {}).get("chat_template", "auto")
    try:
        return Chat(Path(base), template)
    except InputError as error:
        raise InputError(f"the reward `model`: conversations cannot be read as in {folder}: {error}") from error


def base_of(folder: Path) -> str:
    """The model that the checkpoint was trained on: as its adapter says, or its run's config."""
    adapter = folder / "adapter" / "adapter_config.json"
    if adapter.is_file():
        return str(json.loads(adapter.read_text())["base_model_name_or_path"])
    run = _config(folder)
    if "model" in run:
        return str(run["model"]["path"])
    raise InputError(f"the reward `model`: {folder} does not say on which model it was trained; set base")


def _algorithm(folder: Path) -> Mapping[str, Any]:
    """The algorithm's block in the config of the checkpoint's run; empty where the run is not at hand."""
    return _config(folder).get("algorithm") or {}


def _config(folder: Path) -> Mapping[str, Any]:
    run = folder.parent.parent / "config.yaml"
    if not run.is_file():
        return {}
    import yaml

    return yaml.safe_load(run.read_text()) or {}
