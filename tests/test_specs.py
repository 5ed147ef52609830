"""Nonsense is refused in one line that says the value, the limit and the way out."""

import errno

import pytest

from advmoe_deploy.errors import (
    AdvMoEError,
    BackendUnavailableError,
    BundleError,
    CheckFailedError,
    MachineError,
    UsageError,
    machine_error,
    missing_extra,
    unknown_name,
)
from advmoe_deploy.parity.intervals import (
    chance_of_more,
    paired_difference_interval,
    wilson_interval,
)
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile
from advmoe_deploy.settings import epsilon_of
from advmoe_deploy.specs import ModelSpec, ThreatModel, build_spec


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"family": "advmoe", "num_experts": 2, "top_k": 3}, "top_k=3 exceeds num_experts=2"),
        ({"family": "advmoe", "num_experts": 1}, "at least two experts"),
        ({"family": "dense", "num_experts": 2}, "num_experts=1"),
        ({"family": "dense", "width": 8, "ratio": 0.1}, "leaves no channel"),
        ({"family": "dense", "ratio": 0}, "ratio"),
        ({"family": "dense", "ratio": 1.5}, "ratio"),
        ({"family": "dense", "in_channels": 1}, "mean and std need in_channels=1"),
        ({"family": "dense", "std": (1.0, 0.0, 1.0)}, "std positive"),
        ({"family": "dense", "mean": (float("nan"), 0.0, 0.0)}, "finite"),
        ({"family": "sparse"}, "family"),
        ({"family": "dense", "depth": 3}, "depth"),
    ],
)
def test_nonsense_is_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_spec(**fields)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_spec_survives_json() -> None:
    spec = build_spec(family="advmoe", num_experts=3, ratio=0.25)
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec


def test_baselines_of_a_spec() -> None:
    spec = build_spec(family="advmoe", num_experts=3, ratio=0.25)
    assert (spec.dense().ratio, spec.dense().num_experts) == (1.0, 1)
    assert (spec.s_dense().ratio, spec.s_dense().num_experts) == (0.25, 1)


def test_batch_profile_must_grow() -> None:
    with pytest.raises(ValueError, match="must grow"):
        BatchProfile(min=8, opt=4, max=16)


def test_near_names_are_offered() -> None:
    error = unknown_name("recipe", "digit-advmo", ["digits-advmoe", "digits-dense", "cifar10"])
    assert "did you mean digits-advmoe" in str(error)
    assert "choose from" in str(unknown_name("recipe", "zzz", ["a"]))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (AdvMoEError("x"), 1),
        (CheckFailedError("x"), 1),
        (UsageError("x"), 2),
        (BundleError("x"), 3),
        (BackendUnavailableError("x"), 4),
        (MachineError("x"), 5),
    ],
)
def test_exit_codes(error: AdvMoEError, code: int) -> None:
    assert error.exit_code == code


def test_machine_errors_are_told_from_others() -> None:
    disk = machine_error(OSError(errno.ENOSPC, "No space left on device", "some/file"))
    assert "some/file: the disk is full" in str(disk)
    of_torch = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")
    for full in (MemoryError(), of_torch, type("OutOfMemoryError", (RuntimeError,), {})()):
        assert "out of memory" in str(machine_error(full))
    assert machine_error(RuntimeError("another")) is None
    assert machine_error(OSError(errno.ENOENT, "no such file")) is None
    assert "advmoe-deploy[serve]" in str(missing_extra("fastapi", "serve"))


def test_the_interval_of_a_paired_difference() -> None:
    low, high = paired_difference_interval(30, 10, 500)
    assert (low, high) == pytest.approx((0.01508, 0.06460), abs=1e-5)
    assert paired_difference_interval(10, 30, 500) == pytest.approx((-high, -low))
    assert paired_difference_interval(0, 0, 200)[0] < 0 < paired_difference_interval(0, 0, 200)[1]


def test_the_chance_of_more() -> None:
    assert chance_of_more(2, 2, 0.5) == pytest.approx(0.25)
    assert chance_of_more(1, 64, 0.001) == pytest.approx(1 - 0.999**64)
    assert [chance_of_more(n, 5, 0.3) for n in (0, 6)] == pytest.approx([1.0, 0.0])
    assert [chance_of_more(n, 5, 0.0) for n in (0, 1)] == [1.0, 0.0]
    assert chance_of_more(900, 100_000, 0.01) == pytest.approx(1.0, abs=1e-3)


def test_wilson_interval() -> None:
    low, high = wilson_interval(50, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    assert wilson_interval(0, 10)[0] == 0.0
    assert wilson_interval(10, 10)[1] == pytest.approx(1.0)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_a_radius_may_be_a_fraction() -> None:
    assert ThreatModel.model_validate({"epsilon": "8/255"}).epsilon == 8 / 255
    assert epsilon_of("0.03") == 0.03
    for text in ("256", "9/8", "0/255", "-1/255", "inf", "1/2/3", "", "/"):
        with pytest.raises(UsageError, match="write 8/255"):
            epsilon_of(text)
    with pytest.raises(UsageError, match="write 16/255"):
        epsilon_of("16")
