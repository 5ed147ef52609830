"""What a command says."""

import io
import json

from advmoe_deploy.cli.session import print_json


def test_json_has_null_for_what_json_cannot_say() -> None:
    stream = io.StringIO()
    value = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (1, "x", None, True)}}
    print_json(value, stream)
    assert json.loads(stream.getvalue()) == {
        "a": None,
        "b": [1.5, None],
        "c": {"d": [1, "x", None, True]},
    }
