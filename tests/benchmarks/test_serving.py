"""What the benchmark of the server asks, and how its figures are told."""

import asyncio
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import UsageError
from advmoe_deploy.serving.online.grpc.messages import asked_of
from advmoe_deploy.serving.online.protocol import RefusedError
from benchmarks.program import write
from benchmarks.serving import client, speed
from benchmarks.serving.main import PARTS, staying_parts, wanted_of
from benchmarks.serving.rpc import costly_messages, longest_of
from benchmarks.serving.speed import batches_between

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"python -m benchmarks\.serving\.main ([^`\n]+)")


def test_the_commands_of_the_docs_are_taken() -> None:
    found = COMMAND.findall((ROOT / "docs" / "serving.md").read_text(encoding="utf-8"))
    assert len(found) == 2
    for arguments in found:
        assert wanted_of(shlex.split(arguments)).apart
    with pytest.raises(SystemExit):
        wanted_of(["BUNDLE"])


def test_parts_of_something_else_are_neither_mixed_nor_lost(tmp_path: Path) -> None:
    out, facts = tmp_path / "served.json", {"engine": "onnxruntime", "threads": 1}
    assert staying_parts(out, ["speed"], facts) == {}
    write(out, {**facts, "load_before": [0.1], "speed": {"p50_ms": 1}, "grpc": {"p50_ms": 2}})
    assert staying_parts(out, ["speed"], facts) == {"grpc": {"p50_ms": 2}}
    with pytest.raises(UsageError, match="holds grpc with other values of threads; name another"):
        staying_parts(out, ["speed"], {**facts, "threads": 2})
    assert staying_parts(out, PARTS, {**facts, "threads": 2}) == {}


def test_what_the_server_counted_by_hand() -> None:
    before = {"images": 10, "batches": 10, "requests": 10, "compute_ns": 10_000_000}
    after = {"images": 22, "batches": 16, "requests": 18, "compute_ns": 34_000_000}
    assert batches_between(before, after) == {"mean_batch": 2.0, "mean_compute_ms": 3.0}


def test_costly_messages_are_read_by_our_own_code(tiny_bundle: Bundle) -> None:
    longest = longest_of(tiny_bundle)
    for name, message in costly_messages(longest).items():
        assert longest - 64 < len(message) <= longest, name
        with pytest.raises(RefusedError):
            asked_of(message)


def test_a_client_that_has_no_connection_left_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that never answers, and a client that has two connections."""
    monkeypatch.setattr(client.resource, "getrlimit", lambda _: (client._OWN_DESCRIPTORS + 2, 0))
    asked = 0

    async def never(self: client.Client, _: bytes) -> tuple[int, bytes]:
        nonlocal asked
        asked += 1
        await asyncio.sleep(1.0)
        return 503, b""

    monkeypatch.setattr(client.Client, "ask", never)
    sample = client.open_loop(1, b"", client.randomly(50.0, 0.2))
    assert (asked, sample.not_asked) == (2, 8)
    assert sample.answers == {503: 2}


def test_a_queue_before_a_runner_waits_for_those_ahead() -> None:
    """Of three requests at once, 4 ms each, the last has its answer after 12; one alone after 4."""
    assert speed.queued_p99_ms(np.array([0.0, 0.0, 0.0]), 4.0) == pytest.approx(12, abs=0.2)
    assert speed.queued_p99_ms(client.evenly(100.0, 1.0), 4.0) == 4.0
