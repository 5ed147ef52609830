"""Last screen of the demo."""

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table

from advmoe_deploy.cli.demo.photographs import ZOO_MODEL, Photographs
from advmoe_deploy.cli.demo.result import MOE, DemoResult
from advmoe_deploy.cli.tables.bundle import robust_verdict
from advmoe_deploy.cli.tables.escape import escape
from advmoe_deploy.settings import epsilon_text
from advmoe_deploy.train.recipes import RECIPES

_ONE_SCHEDULE = {
    "AdvMoE": "cifar10-advmoe-cpu",
    "dense": "cifar10-dense-cpu",
    "S-Dense": "cifar10-s-dense-cpu",
}


def screen(result: DemoResult) -> RenderableType:
    """Return the last screen: what happened and what to try next."""
    table = Table(show_header=True, box=None, pad_edge=False)
    table.add_column("")
    table.add_column("AdvMoE", justify="right", style="bold green")
    table.add_column("dense", justify="right")
    for name, moe, dense in result.comparison():
        table.add_row(name, moe, dense)
    survived = result.verify.robust_accuracy
    lines = [
        f"On ONNX Runtime, under {len(result.verify.attacks)} attacks: "
        f"{100 * survived.engine:.1f} % robust, torch {100 * survived.reference:.1f} %: "
        + robust_verdict(result.verify),
        f"{result.classified} PNG files classified, {result.unreadable} unreadable and said so.",
    ]
    lines += [f"warning: {line}" for line in result.warnings()]
    if result.quick:
        lines.append("This was the quick form: one epoch is too little to be robust.")
    out, served = result.out, "photographs" if result.photographs else "bundle"
    following = [
        f"open {result.report}",
        f"advmoe serve {out}/{served}        # then: curl http://127.0.0.1:8000/v2",
        f"advmoe inspect {out}/bundle",
        f"advmoe profile {out}/bundle --batch 1,8,64,256",
        f"advmoe predict {out}/bundle --input {out}/digits --output answers.parquet",
        f"advmoe train {MOE} --set model.num_experts=4 --out runs/four-experts",
    ]
    body = Group(
        *_photographs(result.photographs),
        "[bold]Handwritten digits, trained just now[/bold]",
        table,
        "",
        *lines,
        "",
        "[bold]Try next[/bold]",
        *(escape(f"  {line}") for line in following),
    )
    return Panel(body, title=f"advmoe demo: {result.seconds:.0f} s", expand=False, padding=(1, 2))


def _photographs(found: Photographs | None) -> list[RenderableType]:
    """Return what the packaged model gains, in a table, and what that takes."""
    if found is None:
        return []
    measured = found.evaluation
    table = Table(show_header=True, box=None, pad_edge=False)
    table.add_column("")
    for name, style in (("AdvMoE", "bold green"), ("dense", ""), ("S-Dense", "")):
        table.add_column(name, justify="right", style=style)
    for batch in found.batches:
        slower = (f"{found.slower(m, batch).ratio:.2f}x as long" for m in ("dense", "s-dense"))
        table.add_row(f"median time, batch {batch}", f"{found.row(batch).p50_ms:.3g} ms", *slower)
    macs = (found.macs.executed, found.macs.dense, found.macs.s_dense)
    table.add_row("MACs per image, router included", *(f"{m / 1e9:.3f} G" for m in macs))
    return [
        f"[bold]{ZOO_MODEL}, a model that comes trained on {measured.data}[/bold]",
        f"{100 * measured.clean.value:.1f} % clean, {100 * measured.robust.value:.1f} % "
        f"(n = {measured.robust.n}) under {measured.attack_words}, l-inf "
        f"{epsilon_text(measured.threat.epsilon)}",
        table,
        _beside(found),
        f"A request to its server takes {found.served_ms:.2g} ms.",
        "",
    ]


def _beside(found: Photographs) -> str:
    """Return what the table does not compare, and who is faster than the MoE."""
    said = "Dense and S-Dense, one pathway without a router, are timed with random weights."
    if all(found.slower("s-dense", batch).ratio < 1 for batch in found.batches):
        said += " S-Dense is smaller and faster than both."
    reached = (f"{title}: {RECIPES[name].measured}" for title, name in _ONE_SCHEDULE.items())
    return "\n".join([said, "Trained by one schedule, on the test images:", *reached])
