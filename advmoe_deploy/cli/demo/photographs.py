"""First part of the demo: a model of photographs that is at hand by name, timed and served here."""

import json
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from advmoe_deploy.bundle import open_bundle
from advmoe_deploy.errors import CheckFailedError
from advmoe_deploy.export.from_run import export_run
from advmoe_deploy.profiling.profile import profile_bundle
from advmoe_deploy.progress import Progress
from advmoe_deploy.reports import LatencyRatio, LatencyReport, LatencyRow, Macs
from advmoe_deploy.specs import Frozen
from advmoe_deploy.zoo.places import find
from advmoe_deploy.zoo.record import Evaluation, read_record

ZOO_MODEL = "cifar10-advmoe"
_REQUESTS = 20
_PATIENCE = 60  # seconds until a server that has not answered is given up


class Photographs(Frozen):
    """The model: what it reaches by its record, and its speed on this machine.

    ``served_ms`` is the median time of one request with one image.
    """

    bundle: str
    macs: Macs
    evaluation: Evaluation
    profile: LatencyReport
    served_ms: float
    seconds: float

    @property
    def batches(self) -> list[int]:
        """Batch sizes that were timed, ascending."""
        return sorted({row.batch for row in self.profile.rows})

    def slower(self, model: str, batch: int) -> LatencyRatio:
        """Return how many times slower than the MoE ``model`` is."""
        of = (model, "moe", batch)
        return next(r for r in self.profile.ratios if (r.a, r.b, r.batch) == of)

    def row(self, batch: int) -> LatencyRow:
        """Return the MoE's own latency."""
        return next(r for r in self.profile.rows if (r.model, r.batch) == ("moe", batch))


def show_photographs(out: Path, *, quick: bool, progress: Progress) -> Photographs | None:
    """Export the model into ``out``, time it against dense networks, and serve it.

    ``quick`` times single images only. ``None`` without a model of that name, or without a record
    of what it reaches: there is nothing to show of it.
    """
    began = time.perf_counter()
    run = find(ZOO_MODEL)
    record = read_record(run) if run else None
    if run is None or record is None or not record.evaluations:
        progress.note(
            f"photographs: no {ZOO_MODEL} with results on test images is at hand; left out"
        )
        return None
    progress.note(f"photographs: export {ZOO_MODEL}, which comes trained, and compare with torch")
    export_run(run, out, data="random:64", overwrite=True, progress=progress)
    bundle = open_bundle(out)
    progress.note("photographs: profile, interleaved with the dense networks")
    latency = profile_bundle(
        bundle,
        batches=(1,) if quick else (1, 64),
        against=("dense", "s-dense"),
        budget_s=timing_budget(quick),
        progress=progress,
    )
    progress.note("photographs: serve, and ask once an image")
    return Photographs(
        bundle=str(out),
        macs=bundle.manifest.macs,
        evaluation=record.evaluations[0],
        profile=latency,
        served_ms=1000 * _median_request(out, bundle.manifest.model.image_shape),
        seconds=time.perf_counter() - began,
    )


def timing_budget(quick: bool) -> float:
    """Return the seconds of measuring per batch size."""
    return 2.0 if quick else 10.0


def _median_request(bundle: Path, shape: tuple[int, int, int]) -> float:
    """Return the median seconds of a request with one grey image to a server of its own."""
    channels, height, width = shape
    image = {"name": "images", "datatype": "FP32", "shape": [1, *shape]}
    body = {"inputs": [image | {"data": [0.5] * (channels * height * width)}]}
    data = json.dumps(body).encode()
    with _server(bundle) as url:
        seconds = []
        for _ in range(_REQUESTS):
            began = time.perf_counter()
            # S310: the address is what the server just started says of itself.
            request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310
            with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:  # noqa: S310
                json.load(answer)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


@contextmanager
def _server(bundle: Path) -> Iterator[str]:
    """Yield where ``advmoe serve`` answers requests, once it listens, and stop it in the end."""
    command = [sys.executable, "-m", "advmoe_deploy.cli.app", "serve", str(bundle), "--port", "0"]
    with subprocess.Popen(  # noqa: S603 (this package's own command)
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            method, url, *_ = *process.stdout.readline().split(), "", ""
            if method != "POST":
                raise CheckFailedError(f"the server ended at once; try: advmoe serve {bundle}")
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
