"""What a command says."""

import io
import json
from pathlib import Path

from advmoe_deploy.cli.session import (
    command_that_goes_on,
    forget_shown,
    print_json,
    session,
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
    forget_shown()
    line = ["predict", "b", "--input", "my photos", "--overwrite"]
    assert command_that_goes_on(line) is None
    with session(as_json=False) as ui:
        state = tmp_path / "state"
        ui.resumable("--resume", without=("--overwrite",), has_state=state.is_file)
        assert command_that_goes_on(line) is None  # nothing was kept yet
        state.touch()
        assert command_that_goes_on(line) == "advmoe predict b --input 'my photos' --resume"
        again = ["predict", "b", "--resume"]
        assert command_that_goes_on(again) == "advmoe predict b --resume"
    forget_shown()
    assert command_that_goes_on(line) is None
