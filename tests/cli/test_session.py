"""What a command says."""

import io
import json
from functools import partial
from pathlib import Path

import pytest

from advmoe_deploy.cli.session import (
    begin,
    command_that_goes_on,
    print_json,
    print_json_error,
    session,
    this_command,
)


def test_json_has_null_for_what_json_cannot_say() -> None:
    stream = io.StringIO()
    value = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (1, "x", None, True)}}
    print_json(value, stream)
    assert json.loads(stream.getvalue()) == {
        "a": None,
        "b": [1.5, None],
        "c": {"d": [1, "x", None, True]},
    }


def test_an_interrupt_names_the_command_that_goes_on(tmp_path: Path) -> None:
    begin(["predict", "b", "--input", "my photos", "--overwrite"])
    assert command_that_goes_on() is None
    with session(as_json=False) as ui:
        state = tmp_path / "state"
        go_on = partial(ui.resumable, "--resume", without=("--overwrite",), has_state=state.is_file)
        go_on()
        assert command_that_goes_on() is None  # nothing was kept yet
        state.touch()
        assert command_that_goes_on() == "advmoe predict b --input 'my photos' --resume"
        begin(["predict", "b", "--resume"])
        go_on()
        assert command_that_goes_on() == "advmoe predict b --resume"
    begin([])
    assert command_that_goes_on() is None


def test_the_command_of_this_run_with_more() -> None:
    begin(["train", "advmoe", "--data", "my photos", "--resume"])
    again = this_command("--set=even_loads=true", "--overwrite", without=("--resume",))
    assert again == "advmoe train advmoe --data 'my photos' --set=even_loads=true --overwrite"


def test_what_could_not_be_printed_is_followed_by_its_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    begin(["show"])
    with session(True) as ui, pytest.raises(TypeError):
        ui.show({"odd": object()}, str)
    print_json_error("odd", 70)
    assert json.loads(capsys.readouterr().out) == {"error": "odd", "exit_code": 70}
