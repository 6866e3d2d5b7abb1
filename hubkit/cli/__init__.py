"""The command line: one thin file per verb, over calls that a Python user can make as well.

Each verb's file imports what it works with inside its function, so `hubkit --help` costs no more than typer.
"""

from __future__ import annotations

import atexit
import os
import sys
from importlib import import_module
from typing import NoReturn

import typer

from hubkit.errors import INTERRUPTED, HubkitError

VERBS = (
    "doctor",
    "pull",
    "add",
    "list",
    "show",
    "rm",
    "tag",
    "verify",
    "gc",
    "train",
    "compose",
    "eval",
    "export",
)

app = typer.Typer(
    name="hubkit",
    help="A hub, a composer, a trainer and a server for LoRA adapters.",
    epilog="Exit codes: 0 ok, 1 failure, 2 usage, 3 not found, 4 integrity, 5 policy, 130 interrupted. "
    "HUBKIT_HOME is the store's place (default ~/.cache/hubkit); HUBKIT_DEBUG=1 shows traces.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,  # plain help: it must not cost an import of rich
)


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from hubkit import __version__

        print(f"hubkit {__version__}")
        raise typer.Exit()


for _verb in VERBS:
    import_module(f"hubkit.cli.{_verb}").register(app)


def main() -> None:
    """Run the command line; known failures become one message and their documented exit code."""
    # OpenMP threads spin while they wait, by default for long, which beside another busy process costs many times
    # over. Spinning briefly keeps nearly all of the speed on idle cores and most of it on busy ones (docs/log.md).
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        app(prog_name="hubkit")
    except HubkitError as error:
        _fail(error.cause, error.remedy, error.exit_code)
    except SystemExit as leaving:
        if leaving.code == INTERRUPTED:
            _leave_interrupted()
        raise
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        cause = f"Unexpected {type(error).__name__}: {error}"
        _fail(cause, "Run again with HUBKIT_DEBUG=1 for the trace, and report it.", 1)


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


def _fail(cause: str, remedy: str, code: int) -> None:
    if os.environ.get("HUBKIT_DEBUG") == "1":
        raise
    from hubkit.policy import escape

    print(f"error: {escape(cause)}", file=sys.stderr)
    if remedy:
        print(f"hint: {escape(remedy)}", file=sys.stderr)
    raise SystemExit(code)
