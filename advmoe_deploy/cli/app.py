"""The command ``advmoe``: its commands, and how each way of ending becomes an exit code."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from advmoe_deploy import __version__
from advmoe_deploy.cli import build, check, import_, look, serve
from advmoe_deploy.cli.analyze import analyze
from advmoe_deploy.cli.examples import epilog
from advmoe_deploy.cli.failures import (
    BROKEN_PIPE,
    INTERRUPTED,
    describe,
    one_line,
    watched_interrupts,
)
from advmoe_deploy.cli.options import Json
from advmoe_deploy.cli.session import forget_shown, print_json_error, session
from advmoe_deploy.cli.sweep import sweep
from advmoe_deploy.errors import CheckFailedError

app = typer.Typer(
    name="advmoe",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "\b\nExit codes: 0 done, 1 the check it made failed, 2 usage, 3 bad input file,\n"
        "4 backend missing, 5 the machine (disk, memory, permission), 130 Ctrl-C."
    ),
)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Where everything goes.")] = Path("demo-out"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Two epochs: see every stage, not robustness.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Go the whole road on handwritten digits, in minutes, and leave an HTML report."""
    with session(as_json) as ui:
        from advmoe_deploy.cli.demo import run_demo, screen

        result = run_demo(out, quick=quick, progress=ui.progress)
        ui.show(result.model_dump(mode="json"), lambda: screen(result))
    if not result.verify.passed:
        raise CheckFailedError(f"robustness did not survive the export; see {result.report}")


_COMMANDS: dict[str, Callable[..., None]] = {
    "train": build.train,
    "sweep": sweep,
    "import": import_.import_checkpoint,
    "export": build.export,
    "verify": check.verify,
    "profile": check.profile,
    "analyze": analyze,
    "serve": serve.serve,
    "predict": serve.predict,
    "inspect": look.inspect,
    "list": look.list_names,
    "demo": demo,
    "doctor": look.doctor,
}
for _name, _command in _COMMANDS.items():
    app.command(_name, epilog=epilog(_name))(_command)


def main() -> None:
    """Run the command line of this process and exit."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; an error is one line on stderr."""
    arguments = list(arguments)
    debug, as_json = "--debug" in arguments, "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    forget_shown()
    with watched_interrupts() as interrupts:
        try:
            code = _invoke(arguments)
            if code != INTERRUPTED:
                sys.stdout.flush()
                return code
            error: BaseException = KeyboardInterrupt()
        except SystemExit as exit_:
            # The parser's own way to end when stdout is closed; nothing else here exits.
            if not isinstance(exit_.__context__, BrokenPipeError):
                raise
            return _end_quietly()
        except BrokenPipeError:
            return _end_quietly()
        except (Exception, KeyboardInterrupt) as raised:  # noqa: BLE001, RUF100
            # Native code may have turned the interrupt into an error of its own.
            error = KeyboardInterrupt() if interrupts.came else raised
            if debug:
                traceback.print_exc()
    return _complain(error, as_json=as_json)


def _invoke(arguments: list[str]) -> int:
    command: Any = typer.main.get_command(app)
    result = command.main(arguments, prog_name="advmoe", standalone_mode=False)
    return result if isinstance(result, int) else 0


def _complain(error: BaseException, *, as_json: bool) -> int:
    code, message = describe(error)
    message = one_line(message)
    try:
        print(f"advmoe: error: {message}", file=sys.stderr, flush=True)  # noqa: T201
        if as_json:
            print_json_error(message, code)
    except BrokenPipeError:
        _end_quietly()
    return code


def _end_quietly() -> int:
    # Python flushes stdout once more at exit, which must not fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return BROKEN_PIPE


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=lambda on: _version(on), help="Show the version."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error; works anywhere.")
    ] = False,
) -> None:
    """Train, export, verify, profile and serve robust mixture-of-experts image classifiers."""


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"advmoe {__version__}")
        raise typer.Exit


if __name__ == "__main__":
    main()
