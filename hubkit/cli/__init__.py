"""The command line: one thin file per verb, over calls that a Python user can make as well.

Each verb's file imports what it works with inside its function, so `hubkit --help` costs no more than typer.
"""

from __future__ import annotations

import atexit
import os
import sys
from importlib import import_module
from typing import Any, NoReturn

import typer

from hubkit.errors import INTERRUPTED, HubkitError, UsageError

CommandLineError: Any = typer.BadParameter.__mro__[1]  # of typer's own usage errors it exports only this one

VERBS = (
    "doctor",
    "pull",
    "push",
    "remote",
    "add",
    "list",
    "show",
    "search",
    "index",
    "rm",
    "tag",
    "verify",
    "sign",
    "gc",
    "train",
    "compose",
    "eval",
    "export",
)

app = typer.Typer(
    name="hubkit",
    help="A hub, a composer and a trainer for LoRA adapters.",
    epilog="Exit codes: 0 ok, 1 failure, 2 usage, 3 not found, 4 integrity, 5 policy, 130 interrupted. "
    "HUBKIT_HOME is the store's place (default ~/.cache/hubkit); HUBKIT_DEBUG=1 shows traces.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # plain help: it must not cost an import of rich
)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        from hubkit import __version__

        print(f"hubkit {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


for _verb in VERBS:
    import_module(f"hubkit.cli.{_verb}").register(app)


def main() -> None:
    """Run the command line; known failures become one message and their documented exit code."""
    # OpenMP threads spin while they wait, by default for long, which beside another busy process costs many times
    # over. Spinning briefly keeps nearly all of the speed on idle cores and most of it on busy ones (docs/log.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        code = app(prog_name="hubkit", standalone_mode=False)
        sys.stdout.flush()  # a full disk or a closed pipe shows here, while it can still be explained
    except CommandLineError as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # its message is the help
            print(error.format_message())
            raise SystemExit(0) from None
        _fail(*_explained(error), UsageError.exit_code)
    except HubkitError as error:
        _fail(error.cause, error.remedy, error.exit_code, getattr(error, "rule", ""))
    except BrokenPipeError:
        _drop_output()
        raise SystemExit(1) from None
    except OSError as error:
        from hubkit.faults import meaning

        _drop_output()
        said = f"{error.filename or 'The system'}: {error.strerror or error}."
        known = meaning(error) or HubkitError(said, "Check the path; HUBKIT_DEBUG=1 shows where it was needed.")
        _fail(known.cause, known.remedy, known.exit_code)
    except Exception as error:
        cause = f"Unexpected {type(error).__name__}: {error}"
        _fail(cause, "Run again with HUBKIT_DEBUG=1 for the trace, and report it.", 1)
    if code == INTERRUPTED:
        _leave_interrupted()
    raise SystemExit(code)


def _drop_output() -> None:
    """Let go of what can't be written; else Python would try again at its end, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explained(error: Any) -> tuple[str, str]:
    """What is wrong with a command line, and what to write instead or where to read that."""
    cause, _, near = error.format_message().replace("Value error, ", "").partition(" Did you mean ")
    if getattr(error, "possibilities", None):
        cause, near = error.message, " or ".join(sorted(error.possibilities))
    path = error.ctx.command_path if error.ctx else "hubkit"
    return cause.rstrip(".") + ".", f"Did you mean {near.rstrip('?')}?" if near else f"`{path} --help` shows how."


def _leave_interrupted() -> NoReturn:
    """Exit with 130 for certain.

    An interrupt that strikes in code which a C extension runs (some imports) leaves a mark in CPython, and an
    ordinary exit then ends in death by signal, even though the interrupt was handled.
    """
    print("Interrupted.", file=sys.stderr)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)


def _fail(cause: str, remedy: str, code: int, rule: str = "") -> None:
    if os.environ.get("HUBKIT_DEBUG") == "1":
        raise
    from hubkit.policy import escape

    print(f"error: {escape(cause)}", file=sys.stderr)
    if remedy:
        print(f"hint: {escape(remedy)}", file=sys.stderr)
    if rule:
        print(f"rule: {rule} (docs/policy.md)", file=sys.stderr)
    raise SystemExit(code)
