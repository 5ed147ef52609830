"""A verification that was killed goes on where it was, and ends as it would have."""

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import DataError, UsageError
from advmoe_deploy.specs import AttackSpec
from advmoe_deploy.verify import verify as module
from advmoe_deploy.verify.report import AttackOutcome, FoundOn, RobustReport
from advmoe_deploy.verify.trial import Trial
from advmoe_deploy.verify.verify import verify_bundle


def figures(report: RobustReport) -> dict[str, object]:
    return report.model_dump(exclude={"seconds": True, "consistency": True, "attacks": True}) | {
        "attacks": [a.model_dump(exclude={"seconds"}) for a in report.attacks]
    }


class KilledError(BaseException):
    """As nothing catches it."""


def test_what_was_killed_ends_the_same(
    trained_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, once, twice = (tmp_path / name for name in ("state.npz", "once.npz", "twice.npz"))
    whole = verify_bundle(trained_bundle, images=40, threads=1, examples=once)
    attacked, ran = Trial.run, list[AttackSpec]()
    monkeypatch.setattr(Trial, "run", _dying_after(attacked, 2))
    with pytest.raises(KilledError):
        verify_bundle(trained_bundle, images=40, threads=1, resume=state)
    monkeypatch.setattr(Trial, "run", _counting(attacked, ran))
    resumed = verify_bundle(trained_bundle, images=40, threads=1, resume=state, examples=twice)
    assert len(ran) == len(whole.attacks) - 2
    assert figures(resumed) == figures(whole)
    assert resumed.seconds > sum(attack.seconds for attack in resumed.attacks)
    with np.load(once) as expected, np.load(twice) as found:
        for name in set(expected.files) - {"header"}:
            assert np.array_equal(expected[name], found[name])
    ran.clear()
    link = tmp_path / "link.npz"
    link.symlink_to(state)
    assert figures(verify_bundle(trained_bundle, images=40, threads=1, resume=link)) == figures(
        whole
    )
    assert ran == []
    assert link.is_symlink()
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(UsageError, match="no file that a state can be read from again"):
        verify_bundle(trained_bundle, images=40, threads=1, resume=tmp_path / "pipe.npz")


def _dying_after(run_attack: object, count: int) -> object:
    def attack(self: Trial, spec: AttackSpec, found_on: FoundOn) -> AttackOutcome:
        if len(self.outcomes) == count:
            raise KilledError
        return run_attack(self, spec, found_on)  # type: ignore[operator, no-any-return]

    return attack


def _counting(run_attack: object, ran: list[AttackSpec]) -> object:
    def attack(self: Trial, spec: AttackSpec, found_on: FoundOn) -> AttackOutcome:
        ran.append(spec)
        return run_attack(self, spec, found_on)  # type: ignore[operator, no-any-return]

    return attack


def test_the_state_of_another_verification_is_refused(
    trained_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state.npz"
    one = (AttackSpec(name="pgd", steps=2),)
    monkeypatch.setattr(module, "attack_suite", lambda *_: one)
    verify_bundle(trained_bundle, images=10, threads=1, resume=state)
    for options, other in (
        ({"images": 9}, "other images"),
        ({"images": 10, "epsilon": 0.01}, "threat"),
        ({"images": 10, "engine": "onnxruntime-plan"}, "engine"),
    ):
        with pytest.raises(DataError, match=other):
            verify_bundle(trained_bundle, threads=1, resume=state, **options)  # type: ignore[arg-type]
    whole = state.read_bytes()
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    with zipfile.ZipFile(state) as packed:
        largest = max(packed.infolist(), key=lambda entry: entry.compress_size)
    middle = largest.header_offset + largest.compress_size // 2  # a byte of what is compressed
    flipped = bytes([*whole[:middle], whole[middle] ^ 255, *whole[middle + 1 :]])
    for damaged in (whole[:-40], flipped, array.getvalue(), b""):
        state.write_bytes(damaged)
        with pytest.raises(DataError, match="delete it to begin anew"):
            verify_bundle(trained_bundle, images=10, threads=1, resume=state)


def test_a_budget_is_spent_on_restarts(
    trained_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = (AttackSpec(name="pgd", steps=2),)
    monkeypatch.setattr(module, "attack_suite", lambda *_: one)
    report = verify_bundle(trained_bundle, images=10, threads=1, budget=0.5)
    seeds = [outcome.attack.seed for outcome in report.attacks]
    assert seeds[0] == 0
    assert seeds[1:] == sorted(seeds[1:])
    assert len(seeds) > 1
    assert sum(outcome.seconds for outcome in report.attacks[:-1]) < 0.5
    assert len(verify_bundle(trained_bundle, images=10, threads=1).attacks) == 1


def test_what_a_budget_leaves_out_is_said_and_a_larger_one_goes_on(
    trained_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = tuple(AttackSpec(name="pgd", steps=steps) for steps in (1, 2, 3))
    monkeypatch.setattr(module, "attack_suite", lambda *_: suite)
    state = tmp_path / "state.npz"
    how = {"images": 10, "threads": 1, "resume": state}
    report = verify_bundle(trained_bundle, budget=1e-9, **how)  # type: ignore[arg-type]
    assert [outcome.attack.steps for outcome in report.attacks] == [1]
    assert report.warnings[0].startswith(
        "the budget of 1e-09 s was over before the suite: 2 of 3 attacks were left out"
    )
    whole = verify_bundle(trained_bundle, **how)  # type: ignore[arg-type]
    assert [outcome.attack.steps for outcome in whole.attacks] == [1, 2, 3]
    assert not [line for line in whole.warnings if "budget" in line]


def test_a_budget_that_is_no_time_is_refused(
    tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(tiny_bundle.path), "--budget", "soon"]) == 2
    assert "use 90s, 10m or 1h" in capsys.readouterr().err
