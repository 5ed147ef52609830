"""Result of a demo, as one value."""

from advmoe_deploy.cli.demo.photographs import Photographs
from advmoe_deploy.cli.verdicts.said import percent
from advmoe_deploy.reports import LatencyReport, LatencyRow, Macs
from advmoe_deploy.settings import epsilon_text
from advmoe_deploy.specs import Frozen
from advmoe_deploy.train.run.loop import TrainReport
from advmoe_deploy.verify.curve import CurvePoint
from advmoe_deploy.verify.report import RobustReport

MOE, DENSE = "digits-advmoe-agreeing", "digits-dense"


class DemoResult(Frozen):
    """Every figure of a demo; ``load_by_class`` is [classes][experts] test images."""

    out: str
    quick: bool
    photographs: Photographs | None
    train: dict[str, TrainReport]
    verify: RobustReport
    profile: LatencyReport
    macs: Macs
    curves: dict[str, tuple[CurvePoint, ...]]
    load_by_class: tuple[tuple[int, ...], ...]
    class_names: tuple[str, ...]
    classified: int
    unreadable: int
    report: str
    seconds: float

    def comparison(self) -> list[tuple[str, str, str]]:
        """Return rows of (what, AdvMoE, dense), ready to print."""
        moe, dense = self.train[MOE], self.train[DENSE]
        rows = [
            ("clean accuracy (test)", percent(moe.clean_accuracy), percent(dense.clean_accuracy)),
            (
                f"robust accuracy, PGD-50, epsilon {epsilon_text(self.verify.threat.epsilon)}",
                percent(moe.pgd_accuracy),
                percent(dense.pgd_accuracy),
            ),
            (
                f"  under {len(self.verify.attacks)} attacks, on routes too",
                percent(self.verify.robust_accuracy.engine),
                "not run",
            ),
            ("effective routes", f"{moe.effective_routes or 1:.2f}", "-"),
            (
                "MACs per image, router included",
                f"{self.macs.executed / 1e6:.2f} M",
                f"{self.macs.dense / 1e6:.2f} M",
            ),
        ]
        for batch in sorted({row.batch for row in self.profile.rows}):
            ours, theirs = self.row("moe", batch), self.row("dense", batch)
            rows.append(
                (
                    f"median latency, batch {batch}",
                    f"{ours.p50_ms:.3g} ms",
                    f"{theirs.p50_ms:.3g} ms",
                )
            )
        return rows

    def warnings(self) -> list[str]:
        """Return what speaks against the AdvMoE: of its times, and of all columns at once."""
        moe, dense = self.train[MOE], self.train[DENSE]
        batches = {row.batch for row in self.profile.rows}
        better = (
            dense.clean_accuracy >= moe.clean_accuracy
            and dense.pgd_accuracy >= moe.pgd_accuracy
            and all(self.row("dense", n).p50_ms < self.row("moe", n).p50_ms for n in batches)
        )
        lines = [*self.profile.warnings]
        if better:
            lines.append(
                "the dense network is at least as accurate, clean and attacked, and faster at "
                "every batch size: on these data nothing speaks for a mixture of experts"
            )
        return lines

    def row(self, model: str, batch: int) -> LatencyRow:
        """Return the latency row of ``model`` at ``batch``."""
        return next(r for r in self.profile.rows if r.model == model and r.batch == batch)
