"""Requests as JSON: what is read in pieces is what json.loads would have read, and nothing else."""

import json
import random
import tracemalloc
from typing import Any

import numpy as np
import pytest

from advmoe_deploy.decoding import Decoding
from advmoe_deploy.reports import ParityReport
from advmoe_deploy.serving.online.http import json_data
from advmoe_deploy.serving.online.http.body import read_request
from advmoe_deploy.serving.online.http.json_data import (
    MAX_ENVELOPE,
    JsonError,
    json_array,
    split_data,
)
from advmoe_deploy.serving.online.limits import Limits
from advmoe_deploy.serving.online.protocol import RefusedError, ServedModel, Wanted

MODEL = ServedModel(
    "m",
    (1, 1, 2),
    {"logits": ("FP32", (2,))},
    identity="",
    decoding=Decoding.of(2, 1),
    recorded=ParityReport.model_construct(),
    limits=Limits(max_images=64),
)


def request(tensor: dict[str, Any] | None = None, **fields: Any) -> bytes:
    """Return a valid request of one image whose fields are replaced or, if "absent", left out."""
    whole = {"name": "images", "shape": [1, 1, 1, 2], "datatype": "FP32", "data": [0.5, 1]}
    inputs = [{k: v for k, v in (whole | (tensor or {})).items() if v != "absent"}]
    return json.dumps({"inputs": inputs, **fields}).encode()


def refusal(body: bytes) -> str:
    with pytest.raises(RefusedError) as caught:
        read_request(body, None, MODEL)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_short_text_makes_no_room_for_the_shape_that_it_claims() -> None:
    tracemalloc.start()
    with pytest.raises(JsonError, match="does not fit"):
        numbers("[1, 2]", [1024, 3, 224, 224])
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_bytes_behind_json_data_are_refused() -> None:
    body = request()
    with pytest.raises(RefusedError, match="2 bytes follow"):
        read_request(body + b"xx", len(body), MODEL)


def numbers(text: str, shape: list[int]) -> list[float]:
    _, data = split_data(f'{{"data": {text}}}'.encode())
    assert data is not None
    return data.read(shape).ravel().tolist()


@pytest.mark.parametrize("piece", [1, 4, 1 << 15])
def test_numbers_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(json_data, "_PIECE", piece)
    assert numbers("[1,2 , -3.5e0,\n4]", [4]) == [1, 2, -3.5, 4]
    assert numbers("[[1, 2],\n [3, 4]]", [2, 2]) == [1, 2, 3, 4]
    assert numbers("[ [ [1] , [2] ] ]", [1, 2, 1]) == [1, 2]
    assert numbers("[1, 2, 3, 4]", [2, 2]) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2, 3]",
        "[1, 2, 3, 4, 5]",
        "[[1, 2], [3], [4]]",
        "[[1, 2, 3, 4]]",
        "[1, 2, [3, 4]]",
        "[[1, 2], 3, 4]",
        "[1 2, 3, 4]",
        "[1, 2, 3, ]",
        "[, 1, 2, 3]",
        "[1,, 2, 3]",
        "[[1, 2][3, 4]]",
        "[[1[, 2], [3, 4]]]",
        "[1[, 2], [3, 4]]",
        "[[1, ]2, [3, 4]]",
        "[[1, 2], ][3, 4]",
        "[1, 2, 3, 4]]",
        "[1, 2, 3, 04]",
        "[1, 2, 3, +4]",
        "[1, 2, 3, .4]",
        "[1, 2, 3, 4.]",
        "[1, 2, 3, 0x4]",
        "[1, 2, 3, true]",
        "[1, 2, 3, null]",
        "[1, 2, 3, nan]",
        "[1, 2, 3, \v4]",
        "[1, 2, 3, é]",
        "[true, false, 1, 2]",
        "[]",
        "[[]]",
    ],
)
def test_what_is_no_array_of_that_shape_is_refused(text: str) -> None:
    with pytest.raises(JsonError):
        numbers(text, [2, 2])


def test_random_changes_are_judged_as_json_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_data, "_PIECE", 5)
    random.seed(0)
    read = 0
    for _ in range(5000):
        text = list(random.choice(["[[1,-2.5],[3,4e1]]", "[1 , -2.5,3, 4e1]", "[ [1,0], [0,1] ]"]))
        for _ in range(random.randint(0, 2)):
            at = random.randrange(len(text))
            text[at : at + random.randint(0, 1)] = random.choice(["", *'[],. -1e{"n'])
        try:
            plain = json.loads("".join(text))
            assert isinstance(plain, list)
            expected = np.asarray(plain, dtype=np.float32)
            assert expected.shape in ((4,), (2, 2))
        except (ValueError, TypeError, AssertionError):
            with pytest.raises(JsonError):
                numbers("".join(text), [2, 2])
        else:
            read += 1
            assert numbers("".join(text), [2, 2]) == expected.ravel().tolist()
    assert read > 1000


def test_arrays_are_written_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_data, "_NUMBERS_AT_ONCE", 2)
    assert json.loads(json_array(np.float32([0.5, 1, -2]))) == [0.5, 1, -2]
    assert json.loads(json_array(np.int64([7]))) == [7]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.0000000001, None),
        (-1e-60, None),
        (1.0000001, "ranges over [0.5, 1.0000001]"),
        (-1e-9, "ranges over [-1e-09, 0.5]"),
        (1e300, "not finite"),
        (10**400, "not finite"),
        (-(2**64), "ranges over [-1.8446744e+19, 0.5]"),
        (float("nan"), "not finite"),
        (float("-inf"), "not finite"),
        (True, "numbers"),
        ("0.5", "numbers"),
        (None, "numbers"),
        ({}, "numbers"),
        ([0.5], "nested"),
    ],
)
def test_values_are_judged_as_the_float32_that_they_become(value: Any, message: str | None) -> None:
    body = request({"data": [0.5, 0]}).replace(b"0]", json.dumps(value).encode() + b"]")
    if message is None:
        assert read_request(body, None, MODEL).images[0, 0, 0, 0] == 0.5
    else:
        assert message in refusal(body)


@pytest.mark.parametrize(
    ("field", "tensor", "fields"),
    [
        ("outputs.0.parameters.binary_data: ", {}, {"outputs": [{"binary_data": "false"}]}),
        ("outputs.0.parameters.binary_data: ", {}, {"outputs": [{"binary_data": 0}]}),
        ("outputs.0.parameters.classification: ", {}, {"outputs": [{"classification": "2"}]}),
        ("outputs.0.parameters.mine: ", {}, {"outputs": [{"mine": [1]}]}),
        ("parameters.binary_data_output: ", {}, {"parameters": {"binary_data_output": "true"}}),
        ("parameters.binary_data_output: ", {}, {"parameters": {"binary_data_output": 1}}),
        ("parameters.timeout: ", {}, {"parameters": {"timeout": {"s": 1}}}),
        ("parameters: ", {}, {"parameters": []}),
        ("parameters: ", {}, {"parameters": "binary"}),
        ("outputs: ", {}, {"outputs": {"name": "logits"}}),
        ("outputs.0: ", {}, {"outputs": ["logits"]}),
        ("outputs.0.name: ", {}, {"outputs": [{"name": 1}]}),
        ("outputs.0.name: ", {}, {"outputs": [{"name": "\ud800"}]}),
        ("id: ", {}, {"id": 7}),
        ("id: ", {}, {"id": "\ud800"}),
        ("inputs: ", {}, {"inputs": None}),
        ("inputs: ", {}, {"inputs": {}}),
        ("inputs.0: ", {}, {"inputs": [None]}),
        ("inputs.0.name: ", {"name": 1}, {}),
        ("inputs.0.name: ", {"name": "\udfff"}, {}),
        ("inputs.0.name: ", {"name": "absent"}, {}),
        ("inputs.0.datatype: ", {"datatype": ["FP32"]}, {}),
        ("inputs.0.datatype: ", {"datatype": "absent"}, {}),
        ("inputs.0.shape: ", {"shape": "1112"}, {}),
        ("inputs.0.shape: ", {"shape": None}, {}),
        ("inputs.0.shape.0: ", {"shape": ["a", 1, 1, 2]}, {}),
        ("inputs.0.shape.0: ", {"shape": [True, 1, 1, 2]}, {}),
        ("inputs.0.shape.0: ", {"shape": [1.0, 1, 1, 2]}, {}),
        ("inputs.0.shape.0: ", {"shape": ["1", 1, 1, 2]}, {}),
        ("inputs.0.shape.3: ", {"shape": [1, 1, 1, [2]]}, {}),
        ("inputs.0.parameters: ", {"parameters": 1}, {}),
        ("inputs.0.parameters.binary_data_size: ", {"parameters": {"binary_data_size": True}}, {}),
        ("inputs.0.parameters.binary_data_size: ", {"parameters": {"binary_data_size": "8"}}, {}),
    ],
)
def test_every_field_has_one_type(
    field: str, tensor: dict[str, Any], fields: dict[str, Any]
) -> None:
    for output in fields.get("outputs", ()):
        if isinstance(output, dict) and "name" not in output:
            fields = {"outputs": [{"name": "logits", "parameters": output}]}
    assert refusal(request(tensor, **fields)).startswith(field)


def test_an_object_has_few_members() -> None:
    for count, allowed in ((64, True), (65, False)):
        body = request(parameters={f"a{i}": i for i in range(count)})
        if allowed:
            assert read_request(body, None, MODEL).wanted == {"logits": Wanted(False)}
        else:
            assert refusal(body) == "parameters: Input should have at most 64 members"


@pytest.mark.parametrize(("given", "seconds"), [(None, None), (0, None), (1_500_000, 1.5)])
def test_the_timeout_is_in_microseconds(given: int | None, seconds: float | None) -> None:
    assert read_request(request(parameters={"timeout": given}), None, MODEL).timeout_s == seconds
    for wrong in (-1, 1.5, "1", True):
        assert refusal(request(parameters={"timeout": wrong})).startswith("parameters.timeout: ")


def test_null_is_absent() -> None:
    nulls = {"id": None, "parameters": None, "outputs": None}
    read = read_request(request({"parameters": None}, **nulls), None, MODEL)
    assert (read.id, read.wanted) == (None, {"logits": Wanted(False)})
    parameters = {"binary_data": None, "classification": None, "mine": None}
    outputs = [{"name": "logits", "parameters": parameters}]
    for binary in (True, None):
        body = request(outputs=outputs, parameters={"binary_data_output": binary})
        assert read_request(body, None, MODEL).wanted == {"logits": Wanted(bool(binary))}
    assert "neither data" in refusal(
        request({"parameters": {"binary_data_size": None}, "data": None})
    )


def test_an_output_overrules_the_request() -> None:
    outputs = [{"name": "logits", "parameters": {"binary_data": False}}]
    body = request(outputs=outputs, parameters={"binary_data_output": True, "priority": 1})
    assert read_request(body, None, MODEL).wanted == {"logits": Wanted(False)}


LONG = "x\n" * 50_000
BIG = {
    "a long name": request({"name": LONG}),
    "a long type": request({"datatype": LONG}),
    "a long shape": request({"shape": [2] * 30_000}),
    "a shape of words": request({"shape": ["a"] * 20_000}),
    "a huge size": request({"shape": [10**4000, 1, 1, 2]}),
    "a size beyond any": request().replace(b"[1,", b"[" + b"1" * 10_000 + b","),
    "many outputs": request(outputs=[1] * 30_000),
    "a long output": request(outputs=[{"name": LONG}]),
    "many parameters": request(parameters={str(i): [] for i in range(10_000)}),
    "a long parameter": request(parameters={LONG: []}),
    "more than an envelope": request(parameters={"mine": " " * MAX_ENVELOPE}),
    "nested lists": b"[" * 100_000,
    "nested data": request().replace(b"[0.5, 1]", b"[" * 90_000 + b"]" * 90_000),
    "an endless number": request().replace(b"0.5", b"0." + b"5" * 1_000_000),
    "words": request({"data": ["a"] * 100_000}),
    "empty lists": request({"data": [[]] * 1_000_000}),
}


@pytest.mark.parametrize("name", BIG)
def test_the_message_does_not_grow_with_the_request(name: str) -> None:
    refusal(BIG[name])


def test_data_is_found_where_it_belongs() -> None:
    plain = request()
    for body in (
        plain.replace(b'"data": ', b'"data"\n:\t'),
        plain.replace(b"[0.5, 1]", b"[[[[0.5, 1]]]]"),
        json.dumps(json.loads(plain), indent=9).encode(),
        request(id='"data": [', parameters={'x"data': '":[1]'}),
        json.dumps({"inputs": [dict(reversed(json.loads(plain)["inputs"][0].items()))]}).encode(),
    ):
        assert read_request(body, None, MODEL).images.ravel().tolist() == [0.5, 1.0]
    for body in (
        request({"data": "absent"}, parameters={"data": [0.5, 1]}),
        request({"data": []}, data=[0.5, 1]),
        request({"data": {}}),
        request({"data": 1}),
        plain.replace(b'"data": [0.5, 1]', b'"data": [0.5, 1], "data": [0.5, 1]'),
        plain.replace(b"1]", b"1]]"),
    ):
        refusal(body)
