"""The command ``demo``."""

from pathlib import Path
from typing import Annotated

import typer

from advmoe_deploy.cli.options import Json
from advmoe_deploy.cli.session import session
from advmoe_deploy.errors import CheckFailedError


def demo(
    out: Annotated[
        Path, typer.Option("--out", readable=False, help="Where everything goes.")
    ] = Path("demo-out"),
    quick: Annotated[
        bool,
        typer.Option("--quick", help="One epoch, few images: see every stage, not robustness."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Time a trained model, then go the whole road on digits.

    It takes minutes and leaves a report as a page.
    """
    with session(as_json, loads=True) as ui:
        from advmoe_deploy.cli.demo.run import run_demo
        from advmoe_deploy.cli.demo.screen import screen

        result = run_demo(out, quick=quick, progress=ui.progress)
        ui.show(result.model_dump(mode="json"), lambda: screen(result))
    if not result.verify.passed:
        raise CheckFailedError(f"robustness did not survive the export; see {result.report}")
