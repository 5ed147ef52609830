"""Answers to the papers' claims: by figures worked out by hand, and on toy runs."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.training import claims


def figures(first: list[int], last: list[int]) -> claims.Figures:
    return {"first": torch.tensor(first), "last": torch.tensor(last)}


def test_an_interval_is_students() -> None:
    low, high = claims.interval(torch.tensor([1.0, 2.0, 3.0]))
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5), abs=1e-3)


@pytest.mark.parametrize(
    ("lost", "sign", "said"),
    [(range(40), -1, "confirmed"), (range(40), +1, "refuted"), (range(1), -1, "undecided")],
)
def test_a_claim_is_answered_where_seeds_and_images_agree(
    lost: range, sign: int, said: str
) -> None:
    flags = [0 if image in lost else 1 for image in range(100)]
    row = claims.answer([figures(flags, [1] * 100)] * 3, sign)
    assert row["answer"] == said
    assert row["difference"] == pytest.approx(-len(lost) / 100)
    assert row["over_seeds"] == pytest.approx((row["difference"], row["difference"]))


def test_seeds_that_disagree_decide_nothing() -> None:
    some, none = [1] * 50 + [0] * 50, [0] * 100
    measured = [figures(some, none), figures(some, none), figures(none, some)]
    assert claims.answer(measured, +1)["answer"] == "undecided"


def test_one_number_of_all_images_has_an_interval_over_seeds_alone() -> None:
    row = claims.answer([figures([1], [2]), figures([1], [2])], -1)
    assert row["answer"] == "confirmed"
    assert "over_images" not in row


def test_what_cannot_be_answered_is_refused_before_anything_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in (["--only", "swich"], ["--seeds", "0"], ["--seeds", "0,1,1"]):
        monkeypatch.setattr(sys, "argv", ["claims", "--runs", str(tmp_path), *given])
        with pytest.raises(SystemExit):
            claims.main()
    assert not any(tmp_path.iterdir())


def test_rows_of_other_claims_stay(tmp_path: Path) -> None:
    out = tmp_path / "claims.json"
    for name, difference in (("b", 1), ("a", 2), ("b", 3)):
        claims.merge(out, name, {"difference": difference})
    assert json.loads(out.read_text())["claims"] == {"a": {"difference": 2}, "b": {"difference": 3}}
    assert [path.name for path in tmp_path.iterdir()] == ["claims.json"]


def test_every_claim_names_a_paper() -> None:
    assert {claim.sign for claim in claims.CLAIMS.values()} <= {-1, 1}
    assert all(claim.paper.startswith("arXiv ") for claim in claims.CLAIMS.values())
