"""The command ``benchmark``."""

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from advmoe_deploy.cli.options import BundlePath, ClassMap, Data, Json, Suite, positive_numbers
from advmoe_deploy.cli.session import session
from advmoe_deploy.process import usable_cpus, use_threads

if TYPE_CHECKING:
    from advmoe_deploy.comparison.report import Contender


class Aim(str, Enum):
    """Aim that an engine can be best for."""

    latency = "latency"
    throughput = "throughput"
    size = "size"


def benchmark(
    bundle: BundlePath,
    data: Data = None,
    class_map: ClassMap = None,
    images: Annotated[
        int, typer.Option("--images", min=1, help="Test images for accuracy, at most.")
    ] = 500,
    aim: Annotated[
        Aim,
        typer.Option(
            "--aim",
            help="What to mark the best for: time at the smallest batch, images per second at any, "
            "or bytes.",
        ),
    ] = Aim.latency,
    attacks: Annotated[
        Suite | None,
        typer.Option(
            "--attacks",
            help="Attack every engine, for robust accuracy; without, it is what the export "
            "recorded.",
        ),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes to time.")] = "1,8,64",
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="CPU threads, of the engines and all else.")
    ] = min(2, usable_cpus()),
    as_json: Json = False,
) -> None:
    """Set the engines and precisions of a bundle side by side.

    It compares them by size, accuracy and time.
    """
    batches = positive_numbers(batch, "--batch")
    use_threads(threads)
    with session(as_json, loads=True) as ui:
        from advmoe_deploy.api import open_bundle
        from advmoe_deploy.cli.tables import benchmark as tables
        from advmoe_deploy.comparison.compare import benchmark_bundle
        from advmoe_deploy.data.matching import read_class_map

        opened = open_bundle(bundle)
        measured: list[Contender] = []
        with ui.keeping(measured, lambda: tables.unfinished(measured)):
            report = benchmark_bundle(
                opened,
                aim=aim.value,
                data=data,
                class_map=read_class_map(class_map),
                images=images,
                attacks=attacks.value if attacks else None,
                batches=batches,
                threads=threads,
                measured=measured,
                progress=ui.progress,
            )
        ui.show(report.model_dump(mode="json"), lambda: tables.benchmark_report(report))
