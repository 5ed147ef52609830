"""Start of a replica: a bundle, checked, and engines that answered its golden images."""

from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from advmoe_deploy.bundle import Bundle, open_bundle
from advmoe_deploy.errors import BundleError
from advmoe_deploy.runtime.engine import Engine, Source
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.plan_runner import PlanRunner
from advmoe_deploy.sealing.signature import require_signature
from advmoe_deploy.serving.online.golden import golden_of


@dataclass(frozen=True)
class BundleOrigin:
    """Folder of the bundle, and the ``identity`` by which replicas know that it is the same."""

    folder: Path
    identity: str
    signed_by: Path | None = None

    @classmethod
    def of(cls, bundle: Bundle, signed_by: Path | None = None) -> "BundleOrigin":
        """Return the origin of an opened ``bundle``."""
        return cls(bundle.path, bundle.identity, signed_by)

    def open(self) -> Bundle:
        """Return the bundle after checking every hash of it.

        Raises:
            InputError: it is missing, damaged, not signed as required, or another one.
        """
        bundle = open_signed(self.folder, self.signed_by)
        if bundle.identity != self.identity:
            raise BundleError(
                f"{self.folder} is another bundle than the application was built of; copy the same "
                "one to every machine, or deploy again"
            )
        return bundle


def open_signed(folder: Path, signed_by: Path | None) -> Bundle:
    """Return the bundle in ``folder``, signed with the key of ``signed_by`` if there is one.

    Raises:
        InputError: it is missing, damaged, or not signed as required.
    """
    bundle = open_bundle(folder)
    return bundle if signed_by is None else require_signature(bundle, signed_by)


def checked_engines(bundle: Bundle, names: Collection[str], threads: int) -> dict[str, Engine]:
    """Return the engines of some segments, once all segments have answered the golden images.

    For one expert alone no answer is known, so the whole model is loaded for the check. The engines
    that were checked are the ones that stay.

    Raises:
        CheckFailedError: the answers are not those of the model that was exported.
        BackendUnavailableError: ONNX Runtime is not installed.
        BundleError: it cannot read a graph.
    """
    engines: dict[str, Engine] = {}

    def opened(name: str, graph: Source) -> Engine:
        engines[name] = OrtEngine(graph, threads=threads)
        return engines[name]

    plan = bundle.manifest.plan
    graphs = {segment.name: bundle.graph(segment.file) for segment in plan.segments}
    shape = bundle.manifest.model.image_shape
    with ExitStack() as stack:
        runner = stack.enter_context(PlanRunner(plan, graphs, shape, open_engine=opened))
        golden = golden_of(bundle)
        golden.require(runner.infer(golden.images), runner)
        stack.pop_all()  # some stay open
    for name in engines.keys() - {*names}:
        engines.pop(name).close()
    return engines
