"""The ``ttc`` command: registers the commands and turns errors into one line and an exit code.

Exit codes: 0 done; 2 bad input; 3 stopped by the user or a signal, everything so far saved; 1 anything else, such as a run of which
every problem failed. Nothing here imports torch, vLLM, ray or transformers, and each command imports what it needs when it runs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from ttc.cli import costs, info, measure, report, simulate, solve, train
from ttc.errors import InputError, TTCError

EXIT_BAD_INPUT, EXIT_STOPPED = 2, 3


class _Commands(TyperGroup):
    """Typer ends in silence, with 130, on a Ctrl-C that no command took care of: one while an engine starts, say."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise SystemExit(_say("stopped", EXIT_STOPPED)) from None


app = typer.Typer(
    name="ttc",
    cls=_Commands,
    help="Spend a hard budget of tokens, eFLOPs, seconds or dollars where it buys the most correct answers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for title, commands in {
    "Answer": (solve.solve, solve.demo, report.report),
    "Decide before paying": (costs.plan, costs.cost, costs.frontier, simulate.simulate),
    "Know what is here": (info.models, info.policies, info.doctor),
}.items():
    for command in commands:
        app.command(rich_help_panel=title)(command)
app.command(rich_help_panel="Measure and make")(costs.calibrate)
app.add_typer(measure.app, name="bench", rich_help_panel="Measure and make")
app.add_typer(train.app, name="train", rich_help_panel="Measure and make")


@app.callback(invoke_without_command=True)
def _root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
    if version:
        from ttc import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """The console script."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # whatever imports it first: no words of its own
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # ends as a Ctrl-C does: children are ended, too
    try:
        sys.exit(app(prog_name="ttc", standalone_mode=False))
    except InputError as error:
        sys.exit(_say(error, EXIT_BAD_INPUT))
    except TTCError as error:
        sys.exit(_say(error, 1))
    except BrokenPipeError:  # the reader of our output went away, as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            sys.exit(EXIT_BAD_INPUT)
        sys.exit(_say(_refusal(error, sys.argv[1:]), EXIT_BAD_INPUT))


def _refusal(error: Any, given: list[str]) -> str:
    """What the parser has against a command line, in one line: the option, its value, and where to look. ``error`` is typer's."""
    path = error.ctx.command_path if error.ctx else "ttc"
    look = f"'{path} --help' lists what it takes"
    kind, words = type(error).__name__, " ".join(str(error.message).split())
    param: Any = getattr(error, "param", None)
    name = next((o for o in param.opts if o.startswith("--")), param.name) if param is not None else ""
    if kind == "NoSuchOption":
        near = f"did you mean {' or '.join(sorted(error.possibilities))}? " if error.possibilities else ""
        return f"{error.option_name}: no such option of '{path}'; {near}{look}"
    if kind == "MissingParameter":
        return f"{name}: not given, and '{path}' needs it; {look}"
    if kind == "BadParameter" and name:
        value = _value(given, param.opts)
        said = (
            words.removeprefix("Input ")
            .removeprefix(f"{value!r} ")
            .partition(", unable to parse")[0]
            .rstrip(".")
        )
        return f"{name}: {value!r} {said}; {look}" if value is not None else f"{name}: {said}; {look}"
    for part, mend in {
        "unexpected extra argument": "put quotes round a text of several words",
        "requires an argument": "write its value behind it",
        "does not take a value": "leave the value out",
    }.items():
        look = mend if part in words else look
    return f"{words[:1].lower()}{words[1:].rstrip('.?')}; {look}".replace(". Did you mean", "; did you mean")


def _value(given: list[str], names: Sequence[str]) -> str | None:
    """What the command line gives an option, as it was written: the last, if it is there more than once."""
    for at in reversed(range(len(given))):
        name, equals, value = given[at].partition("=")
        if name in names:
            return value if equals else next(iter(given[at + 1 : at + 2]), None)
    return None


def _say(error: object, code: int) -> int:
    from ttc.cli.render import note

    note(error)
    return code


if __name__ == "__main__":
    main()
