"""The command line. Exit codes: 0 done, 2 bad input, 1 failure, 130 stopped by Ctrl-C with everything kept."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from rlft.secrets import hidden
from rlft.types import InputError, RunError

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

app = typer.Typer(
    help="Reinforcement and preference fine-tuning of language models that proves its own steps.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ConfigFile = Annotated[Path, typer.Argument(help="a YAML file", metavar="CONFIG")]
RunFolder = Annotated[Path, typer.Argument(help="the folder of a run", metavar="RUN_DIR")]
Overrides = Annotated[list[str] | None, typer.Argument(help="such as learner.lr=1e-5", metavar="[KEY=VALUE]...")]
Host = Annotated[str, typer.Option(help="0.0.0.0 for other machines too")]
KeyEnv = Annotated[str | None, typer.Option(help="environment variable with the key that is asked for")]
Agent = Annotated[int, typer.Option(help="of a run with several agents: whose policy", min=0)]


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train from the start."""
    from rlft.settings import load

    with _interruptible():
        loaded = load(config, overrides or [])  # before what takes seconds to import: a mistake is answered sooner
        from rlft.session import begin
        from rlft.terminal import Terminal

        raise typer.Exit(begin(loaded, Terminal()))


@app.command()
def resume(run: RunFolder, overrides: Overrides = None) -> None:
    """Go on from a run's newest checkpoint."""
    from rlft.session import resume
    from rlft.terminal import Terminal

    with _interruptible():
        raise typer.Exit(resume(run, overrides or [], Terminal()))


@app.command()
def plan(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check a config and say in words what it would do; no weight is loaded."""
    from rlft.settings import load

    loaded = load(config, overrides or [])
    from rlft.plan import describe

    typer.echo(describe(loaded))


@app.command(name="eval")
def evaluate(
    run: Annotated[Path, typer.Argument(help="a YAML file or the folder of a run", metavar="CONFIG|RUN_DIR")],
    overrides: Overrides = None,
    step: Annotated[int | None, typer.Option(help="of the run's checkpoints; default: the newest")] = None,
    agent: Agent = 0,
) -> None:
    """Evaluate a config's model, or a run's policy, on the held-out tasks."""
    from rlft.after import evaluate

    typer.echo(evaluate(run, overrides or [], step, agent))


@app.command()
def sample(
    run: Annotated[str, typer.Argument(help="the folder of a run, or a model", metavar="RUN_DIR|MODEL")],
    prompt: Annotated[str | None, typer.Option(help="answer this and end; default: ask for prompts")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    max_tokens: Annotated[int, typer.Option(help="of each answer")] = 128,
    agent: Agent = 0,
) -> None:
    """Talk to a policy; of a run, base and tuned answer side by side."""
    from rlft.after import sample

    sample(run, prompt, temperature, max_tokens, agent)


@app.command()
def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option(help="a new folder")],
    merged: Annotated[bool, typer.Option("--merged", help="the whole model, the adapter merged in")] = False,
    step: Annotated[int | None, typer.Option(help="of the run's checkpoints; default: the newest")] = None,
    agent: Agent = 0,
) -> None:
    """Write a run's adapter or merged model for transformers, PEFT and vLLM."""
    from rlft.after import export

    typer.echo(export(run, to, merged, step, agent))


@app.command()
def pairs(
    run: Annotated[Path, typer.Argument(help="a YAML file or the folder of a run", metavar="CONFIG|RUN_DIR")],
    to: Annotated[Path, typer.Option(help="a new .jsonl file")],
    overrides: Overrides = None,
    kind: Annotated[str, typer.Option(help="pairs, labels or scored")] = "pairs",
    margin: Annotated[float, typer.Option(help="how far apart two scores must be")] = 0.0,
    steps: Annotated[int, typer.Option(help="of a config: how many steps' tasks are sampled", min=1)] = 10,
) -> None:
    """Write preference data from scored samples: of a run, or of a config's model before training."""
    from rlft.pairs import write

    typer.echo(write(run, to, overrides or [], kind, margin, steps))


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs", metavar="RUN_DIR...")],
    to: Annotated[Path, typer.Option(help="a picture: .png, .svg or .pdf")] = Path("curves.png"),
) -> None:
    """Draw what runs learned: reward in training, and held-out accuracy with its interval."""
    from rlft.curves import draw

    typer.echo(draw(runs, to))


@app.command()
def replay(
    run: RunFolder,
    overrides: Overrides = None,
    steps: Annotated[str | None, typer.Option(help="such as 3 or 3-7; default: all of them")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Say what other rewards or another objective would have changed on a run's trajectories."""
    from rlft.replay import replay
    from rlft.tables import show_replay, wide

    report = replay(run, overrides or [], steps)
    typer.echo(json.dumps(report, indent=1)) if as_json else show_replay(report, wide())


@app.command()
def explain(
    run: RunFolder,
    step: Annotated[int, typer.Argument(help="of the run", min=1)],
    row: Annotated[int, typer.Argument(help="of that step's rollouts, counted from 0", min=0)],
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Print one of a run's samples token by token: log-probs, rewards, advantage, its share of the loss."""
    from rlft.explain import explain
    from rlft.tables import show_explained, wide

    found = explain(run, step, row)
    typer.echo(json.dumps(found, indent=1)) if as_json else show_explained(found, wide())


@app.command()
def doctor(run: Annotated[Path | None, typer.Argument(help="also look at a run", metavar="[RUN_DIR]")] = None) -> None:
    """Say what this machine has, and how to mend what is missing."""
    from rlft.doctor import examine

    text, healthy = examine(run)
    typer.echo(text)
    raise typer.Exit(0 if healthy else 1)


@app.command()
def audit(
    config: Annotated[Path, typer.Argument(help="a YAML file with a `reward:` block", metavar="CONFIG")],
    cases: Annotated[Path, typer.Argument(help="completions with what is right", metavar="CASES")],
    overrides: Overrides = None,
    label: Annotated[str, typer.Option(help="column that says whether a case should pass")] = "good",
    threshold: Annotated[float, typer.Option(help="verdicts from here on pass")] = 0.5,
    most: Annotated[int, typer.Option(help="mistakes to show", min=0)] = 20,
    strict: Annotated[bool, typer.Option("--strict", help="exit with 1 where there is a mistake")] = False,
) -> None:
    """Hold a reward against cases whose answers are known."""
    from rlft.audit import audit as hold
    from rlft.audit import show
    from rlft.tables import wide

    done = hold(config, overrides or [], cases, label, threshold)
    show(done, wide(), most)
    raise typer.Exit(1 if strict and done.mistakes else 0)


@app.command(name="serve-reward")
def serve_reward(
    config: Annotated[Path, typer.Argument(help="a YAML file with a `reward:` block", metavar="CONFIG")],
    overrides: Overrides = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one", min=0, max=65535)] = 8080,
    key_env: KeyEnv = None,
) -> None:
    """Judge for runs elsewhere, whose reward is `type: remote`."""
    from rlft.serve_reward import serve

    serve(config, overrides or [], host, port, key_env, typer.echo)


@app.command(name="serve-env")
def serve_env(
    config: Annotated[Path, typer.Argument(help="a YAML file with an `env:` block", metavar="CONFIG")],
    overrides: Overrides = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one", min=0, max=65535)] = 8081,
    key_env: KeyEnv = None,
    idle: Annotated[float, typer.Option(help="seconds after which a silent episode is closed", min=1)] = 600.0,
    sessions: Annotated[int, typer.Option(help="episodes at once", min=1)] = 1024,
) -> None:
    """Play for runs elsewhere, whose environment is `type: remote`."""
    from rlft.serve_env import serve

    serve(config, overrides or [], host, port, key_env, idle, sessions, typer.echo)


@app.command(name="serve-policy")
def serve_policy(
    run: Annotated[Path, typer.Argument(help="a YAML file or the folder of a run", metavar="CONFIG|RUN_DIR")],
    overrides: Overrides = None,
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one", min=0, max=65535)] = 8082,
    key_env: KeyEnv = None,
    record: Annotated[Path | None, typer.Option(help="a folder; episodes are written there, a key is one")] = None,
    idle: Annotated[float, typer.Option(help="seconds after which a silent episode ends", min=1)] = 600.0,
    step: Annotated[int | None, typer.Option(help="of the run's checkpoints; default: the newest")] = None,
    agent: Agent = 0,
) -> None:
    """Serve a policy to OpenAI clients; with --record, so that what they do can be learned from."""
    from rlft.serve_policy import Service, serve

    serve(Service(run, overrides or [], step, agent, record, idle), host, port, key_env, typer.echo)


@app.command(name="serve-judge", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve_judge(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="a folder, a hub id, or a name that configs know", metavar="MODEL")],
    host: Host = "127.0.0.1",
    port: Annotated[int, typer.Option(help="of the server", min=1, max=65535)] = 8000,
    max_tokens: Annotated[int, typer.Option(help="of prompt and reply together", min=16)] = 4096,
) -> None:
    """Serve a local model by vLLM for the reward `judge`; further options go to vLLM as they are."""
    from rlft.serve_judge import block, serve

    typer.echo(f"once it says that startup is complete, a run asks it by\n{block(model, host, port, context.args)}")
    serve(model, host, port, max_tokens, context.args)


@app.command(name="list")
def list_(
    what: Annotated[str, typer.Argument(help="algorithms, rewards, envs or engines")],
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Say what there is to choose from."""
    from rlft.plan import catalog

    entries = catalog(what)
    if as_json:
        typer.echo(json.dumps([{"name": name, "about": about} for name, about in entries.items()], indent=1))
        return
    width = max(map(len, entries))
    typer.echo("\n".join(f"{name:{width}}  {about}" for name, about in entries.items()))


def main() -> None:
    """Run a command; every expected failure is one message and an exit code."""
    sys.path.append(os.getcwd())  # where a user's own rewards and algorithms stand
    try:
        app()
    except InputError as error:
        _fail(str(error), 2)
    except RunError as error:
        _fail(str(error), 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        again = "go on with `rlft resume`" if _command() in ("train", "resume") else "run the same command again"
        _fail(
            f"cannot write {error.filename or 'to the disk'}: {error.strerror}. Nothing was left half-written. Make "
            f"room or choose another place, then {again}.",
            1,
        )


@contextmanager
def _interruptible() -> Iterator[None]:
    """What a Ctrl-C that ends a run at once says. Here, since typer ends the program without a word."""
    try:
        yield
    except KeyboardInterrupt:
        from rlft.trainer import still_learning

        try:
            _fail("stopped at once. What was kept: `rlft resume` goes on from the run's newest checkpoint.", 130)
        finally:
            if still_learning():  # everything is closed already
                sys.stderr.flush()
                os._exit(130)


def _command() -> str:
    """The command that runs."""
    return next((word for word in sys.argv[1:] if not word.startswith("-")), "")


def _fail(message: str, code: int) -> None:
    typer.echo(f"rlft: {hidden(message)}", err=True)
    sys.stdout.flush()
    raise SystemExit(code)


if __name__ == "__main__":
    main()
