"""Entry point of ``advmoe``: its commands, and the exit code for each way of ending."""

import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from advmoe_deploy import __version__
from advmoe_deploy.cli import INTERRUPTED
from advmoe_deploy.cli.commands.analyze import analyze
from advmoe_deploy.cli.commands.demo import demo
from advmoe_deploy.cli.commands.doctor import doctor
from advmoe_deploy.cli.commands.export import export
from advmoe_deploy.cli.commands.gate import gate
from advmoe_deploy.cli.commands.import_ import import_checkpoint
from advmoe_deploy.cli.commands.inspect import inspect
from advmoe_deploy.cli.commands.list_names import list_names
from advmoe_deploy.cli.commands.measure.benchmark import benchmark
from advmoe_deploy.cli.commands.measure.eval import evaluate
from advmoe_deploy.cli.commands.measure.profile import profile
from advmoe_deploy.cli.commands.models.add import add
from advmoe_deploy.cli.commands.models.push import push
from advmoe_deploy.cli.commands.models.sign import sign
from advmoe_deploy.cli.commands.predict import predict
from advmoe_deploy.cli.commands.report import report
from advmoe_deploy.cli.commands.serve import serve
from advmoe_deploy.cli.commands.training.show import show
from advmoe_deploy.cli.commands.training.sweep import sweep
from advmoe_deploy.cli.commands.training.train import train
from advmoe_deploy.cli.commands.verify import verify
from advmoe_deploy.cli.completion import join_words
from advmoe_deploy.cli.examples import epilog
from advmoe_deploy.cli.failures import (
    BROKEN_PIPE,
    Command,
    describe,
    one_line,
    watched_interrupts,
)
from advmoe_deploy.cli.session import (
    begin,
    command_that_goes_on,
    print_error,
    print_json_error,
    was_stopped,
)
from advmoe_deploy.errors import printable

app = typer.Typer(
    name="advmoe",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "\b\nExit codes: 0 done, 1 the check it made failed, 2 usage, 3 bad input file,\n"
        "4 backend missing, 5 the machine (disk, memory, permission), 6 undecided: too few\n"
        "images, 70 an error of the program itself, 130 Ctrl-C."
    ),
)

_COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "show": show,
    "sweep": sweep,
    "import": import_checkpoint,
    "export": export,
    "eval": evaluate,
    "verify": verify,
    "report": report,
    "gate": gate,
    "profile": profile,
    "benchmark": benchmark,
    "analyze": analyze,
    "serve": serve,
    "predict": predict,
    "sign": sign,
    "inspect": inspect,
    "list": list_names,
    "add": add,
    "push": push,
    "demo": demo,
    "doctor": doctor,
}
# Who says what to do with more arguments than one takes.
_TAKES_MORE = {name: {"allow_extra_args": True} for name in ("train", "predict")}
for _name, _command in _COMMANDS.items():
    app.command(_name, cls=Command, epilog=epilog(_name), context_settings=_TAKES_MORE.get(_name))(
        _command
    )


def main() -> None:
    """Run the command line of this process and exit."""
    join_words()
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # once more, while the first was being told
        code = INTERRUPTED
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left that could be interrupted
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; an error is one line on stderr."""
    arguments = list(arguments)
    debug, as_json = "--debug" in arguments, "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    begin(arguments)
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
    if arguments[:1] in ([], ["help"]):  # alone, it explains itself
        arguments = [*_topic(arguments[1:]), "--help"]
    result = command.main(arguments, prog_name="advmoe", standalone_mode=False)
    return result if isinstance(result, int) else 0


def _topic(arguments: list[str]) -> list[str]:
    """Return the command that help is asked for, in a list that is empty where it is for all."""
    words = [each for each in arguments if not each.startswith("-")]
    return [] if words[:1] == ["help"] else words[:1]


def _complain(error: BaseException, *, as_json: bool) -> int:
    code, message = describe(error)
    if code == INTERRUPTED and (command := command_that_goes_on()):
        message = f"{message}; to go on: {command}"
    message = printable(one_line(message))
    try:
        if not (code == INTERRUPTED and was_stopped()):
            print_error(message)
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
