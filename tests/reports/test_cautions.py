"""What went without an error and is hardly wanted is said wherever it shows."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from advmoe_deploy.bundle import CARD, Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.cli.demo.result import DENSE, MOE, DemoResult
from advmoe_deploy.cli.tables import bundle as tables
from advmoe_deploy.cli.tables.render import draw_on
from advmoe_deploy.cli.tables.training import train_report
from advmoe_deploy.reports import LatencyRatio, Macs, cautions
from advmoe_deploy.reports.cautions import of_costs, of_export, of_latency, of_routes
from advmoe_deploy.specs import AttackSpec, ThreatModel
from advmoe_deploy.train.recipes import apply_overrides, recipe
from advmoe_deploy.train.run.report import TrainReport
from advmoe_deploy.train.run.trouble import costly
from advmoe_deploy.verify import verify as verify_module
from tests.cli.command_line import Capture

COSTLY, UNUSED = "the router takes", "only one expert is in use in router"


def macs(router: int, selected: int, dense: int, s_dense: int = 1) -> Macs:
    both = router + selected
    return Macs(
        selected=selected, router=router, executed=both, unfused=both, dense=dense, s_dense=s_dense
    )


@pytest.mark.parametrize(
    ("counted", "said"),
    [
        (macs(4, 5, 20), ""),
        (macs(6, 5, 20), COSTLY),
        (macs(6, 5, 11), "; the dense network takes"),
        (macs(5, 5, 10), "routing saves nothing"),
        (macs(1, 10, 10, s_dense=10), ""),  # experts as wide as the dense network
        (macs(0, 10, 10), ""),
    ],
)
def test_costs_by_hand(counted: Macs, said: str) -> None:
    lines = of_costs(counted)
    assert len(lines) == bool(said)
    assert said in "".join(lines)


def test_routes_by_hand() -> None:
    assert of_routes({"router": (15, 0)}) == ()  # may be chance
    assert of_routes({"router": (90, 10)}) == ()
    assert of_routes({"router": (100,)}) == ()
    (line,) = of_routes({"a": (100, 1), "b": (50, 50), "c": (0, 0, 100)})
    assert "in use in a, c (1.00 effective routes)" in line
    assert "train with even_loads=true (AdvMoE) or a balance_loss" in line


@pytest.mark.parametrize("remedies", [(), ("even_loads=true",)])
def test_the_summary_of_a_training_names_what_trains_it_otherwise(
    remedies: tuple[str, ...], capsys: Capture
) -> None:
    report = TrainReport(
        run="r", recipe="r", method="advmoe", loss="trades", data="photos", epochs=1,
        selected_epoch=1, images=40, clean_accuracy=0.9, pgd_accuracy=0.8, robust_accuracy=0.7,
        threat=ThreatModel(epsilon=0.05), epsilon=0.05, attack=AttackSpec(name="pgd", steps=50),
        effective_routes=1.0, expert_load={"router": (40, 0)}, device="cpu", devices=1, seed=0,
        versions={}, seconds=1.0, warnings=of_routes({"router": (40, 0)}), remedies=remedies,
    )  # fmt: skip
    draw_on(sys.stdout, train_report(report, "advmoe train AGAIN"))
    out = capsys.readouterr().out
    assert "warning: only one expert is in use" in out
    assert ("next: advmoe train AGAIN" in out) == bool(remedies)
    assert "advmoe export r --format onnx" in out


def ratio(batch: int, value: float, high: float, engine: str = "onnxruntime") -> LatencyRatio:
    return LatencyRatio(
        a="dense",
        a_engine="onnxruntime",
        b="moe",
        batch=batch,
        engine=engine,
        ratio=value,
        ci_low=value,
        ci_high=high,
    )


def test_a_dense_network_that_is_faster_at_every_size_is_said() -> None:
    elsewhere = ratio(1, 0.2, 0.3, engine="openvino")  # which may be for the engine's sake
    (line,) = of_latency([ratio(1, 0.5, 0.6), ratio(64, 0.7, 0.8), elsewhere])
    assert "faster than onnxruntime fp32" in line
    assert "0.50 at 1, 0.70 at 64" in line
    assert of_latency([ratio(1, 0.5, 0.6), ratio(64, 0.99, 1.01)]) == ()
    assert of_latency([]) == ()


def test_a_narrow_network_under_a_full_router_is_said_before_it_trains() -> None:
    whole = recipe("digits-advmoe")
    assert costly(whole) == ()
    assert costly(recipe("digits-dense")) == ()
    before = torch.get_rng_state()
    (line,) = costly(apply_overrides(whole, ["model.width=16"]))
    assert line.startswith(COSTLY)
    assert "lower model.router_width" in line
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def collapsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let any use of two experts count as that of one."""
    monkeypatch.setattr(cautions, "COLLAPSED", 3.0)


@pytest.mark.usefixtures("collapsed")
def test_a_bundle_says_both(tiny_bundle: Bundle, capsys: Capture) -> None:
    first, second = tiny_bundle.warnings
    assert first.startswith(COSTLY)
    assert second.startswith(UNUSED)
    assert first in tiny_bundle.file(CARD).read_text().partition("## Warnings")[2]
    assert run(["inspect", str(tiny_bundle.path)]) == 0
    assert " ".join(capsys.readouterr().out.split()).count("warning: ") == 2
    draw_on(sys.stdout, tables.export_report(tiny_bundle))
    assert " ".join(capsys.readouterr().out.split()).count("warning: ") == 2
    parity = tiny_bundle.manifest.parity.model_copy(update={"data": "random:64"})
    assert of_export(tiny_bundle.manifest.macs, parity) == (first,)  # noise tells nothing of routes


@pytest.mark.usefixtures("collapsed")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["eval", "--images", "40"], UNUSED),
        (["verify", "--images", "40", "--allow-fragile"], UNUSED),
        (["profile", "--batch", "1", "--against", "dense"], COSTLY),
    ],
)
def test_measurements_say_it(
    options: list[str],
    said: str,
    tiny_bundle: Bundle,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cut = (AttackSpec(name="pgd", steps=2),)
    monkeypatch.setattr(verify_module, "attack_suite", lambda *_: cut)
    command, *rest = options
    assert run([command, str(tiny_bundle.path), *rest, "--json"]) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert any(line.startswith(said) for line in warnings)


@pytest.mark.parametrize(
    ("clean", "pgd", "ms", "said"),
    [(0.9, 0.5, 1.0, 1), (0.8, 0.5, 1.0, 0), (0.9, 0.4, 1.0, 0), (0.9, 0.5, 3.0, 0)],
)
def test_the_demo_says_where_dense_is_better_in_every_column(
    clean: float, pgd: float, ms: float, said: int
) -> None:
    def trained(clean: float, pgd: float) -> object:
        return SimpleNamespace(clean_accuracy=clean, pgd_accuracy=pgd)

    rows = [
        SimpleNamespace(model="moe", batch=1, p50_ms=2.0),
        SimpleNamespace(model="dense", batch=1, p50_ms=ms),
    ]
    result = DemoResult.model_construct(
        train={MOE: trained(0.9, 0.5), DENSE: trained(clean, pgd)},
        profile=SimpleNamespace(rows=rows, warnings=()),
    )
    assert len(result.warnings()) == said
