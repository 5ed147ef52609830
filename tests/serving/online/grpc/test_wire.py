"""What lies beside the numbers of a message is what protobuf would have read there."""

import random
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from advmoe_deploy.serving.online.grpc.wire import MAX_ENVELOPE, WireError, cut

NUMBERS = np.arange(6, dtype=np.float32)


def request(**changes: Any) -> Any:
    message = service_pb2.ModelInferRequest(model_name="cats", model_version="2", id="7", **changes)
    message.parameters["timeout"].int64_param = 5
    message.outputs.add(name="logits")
    return message


def by_raw() -> Any:
    message = request(raw_input_contents=[NUMBERS.tobytes()])
    message.inputs.add(name="images", datatype="FP32", shape=[1, 1, 2, 3])
    return message


def by_contents() -> Any:
    message = request()
    tensor = message.inputs.add(name="images", datatype="FP32", shape=[1, 1, 2, 3])
    tensor.contents.fp32_contents.extend(NUMBERS)
    return message


def without_numbers(message: Any) -> Any:
    result = service_pb2.ModelInferRequest()
    result.CopyFrom(message)
    del result.raw_input_contents[:]
    for tensor in result.inputs:
        tensor.ClearField("contents")
    return result


def envelope_of(serialised: bytes) -> Any:
    return service_pb2.ModelInferRequest.FromString(bytes(cut(serialised).envelope))


@pytest.mark.parametrize("message", [by_raw(), by_contents()])
def test_numbers_are_views_and_the_rest_is_the_message(message: Any) -> None:
    serialised = message.SerializeToString()
    parts = cut(serialised)
    (found,) = parts.raw or parts.contents
    assert found is not None
    assert found.obj is serialised
    np.testing.assert_array_equal(np.frombuffer(found, "<f4"), NUMBERS)
    assert envelope_of(serialised) == without_numbers(message)


@pytest.mark.parametrize(
    ("serialised", "reason"),
    [
        (b"\x3a\xff", "cut off"),
        (b"\x3a\x05abc", "cut off"),
        (b"\x0a", "cut off"),
        (b"\xff" * 11, "cut off"),
        (b"\x00\x00", "no protobuf"),
        (b"\x3b\x3c", "groups"),
        (b"\x38\x01", "no ModelInferRequest"),
        (b"\x28\x01", "no ModelInferRequest"),
        (b"\x12\x00" * 2000, "1024 fields"),
        (b"\x0a\xff\xff\x0f" + bytes((1 << 18) - 1), f"longer than {MAX_ENVELOPE}"),
        (b"\x2a\x06\x2a\x04\x22\x02\x01\x02", "fp32_contents alone"),
    ],
)
def test_what_no_client_sends_is_refused(serialised: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        cut(serialised)


def test_numbers_one_by_one_are_refused() -> None:
    serialised = b"\x35" + NUMBERS[:1].tobytes()  # a field of fp32_contents that is not packed
    contents = b"\x2a" + bytes([len(serialised)]) + serialised
    with pytest.raises(WireError, match="packed"):
        cut(b"\x2a" + bytes([len(contents)]) + contents)


def test_whatever_the_bytes_protobuf_reads_the_same() -> None:
    """Twenty thousand damaged messages: refused, or read as protobuf reads the whole."""
    chance, read, refused = random.Random(0), 0, 0
    originals = [each.SerializeToString() for each in (by_raw(), by_contents())]
    for _ in range(20_000):
        damaged = bytearray(chance.choice(originals))
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(damaged))
            change = chance.randrange(3)
            if change == 0:
                damaged[place] = chance.randrange(256)
            elif change == 1:
                damaged.insert(place, chance.randrange(256))
            else:
                del damaged[place:]
                break
        try:
            envelope = envelope_of(bytes(damaged))
        except (WireError, DecodeError):
            refused += 1
            continue
        try:
            whole = service_pb2.ModelInferRequest.FromString(bytes(damaged))
        except DecodeError:
            continue  # numbers that are no whole ones, which their length will tell
        assert envelope == without_numbers(whole)
        read += 1
    assert min(read, refused) > 1000
