"""Model repository for NVIDIA's Triton Inference Server, written of a bundle.

Two ways to the same answers: ``NAME``, the whole model as one graph, with the library of our
operators where there is a compiler, and ``NAME-pathways``, which routes in Triton's Python backend
and asks one model for each segment (``NAME.SEGMENT``), so that experts batch, scale and are placed
each on their own. ``SHA256SUMS`` at the top is for ``sha256sum --check``, as Triton hashes nothing.
"""

import json
import shutil
from pathlib import Path, PurePosixPath

from advmoe_deploy.bundle import MODEL, Bundle
from advmoe_deploy.errors import UsageError
from advmoe_deploy.export.triton.config import ModelConfig, TritonDevice
from advmoe_deploy.files import SUMS, refuse_existing, staged_directory, write_sums
from advmoe_deploy.plan import Plan, Segment, TensorInfo
from advmoe_deploy.runtime.onnxruntime.custom_ops import find_custom_ops, uses_custom_ops

PLAN = "plan.json"
VERSION = "1"
# The program that the Python backend runs; the package has to be installed there.
_MODEL_PY = '''"""Routes, and asks one model of this repository for each segment."""

from advmoe_deploy.serving.triton.pathways import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def write_repository(
    bundle: Bundle,
    out: Path,
    *,
    mount: str = "/models",
    device: TritonDevice = "cpu",
    max_batch: int = 64,
    overwrite: bool = False,
) -> list[str]:
    """Write the repository of ``bundle`` to ``out`` and return the names of its models.

    Args:
        bundle: an opened, so verified, bundle; what is copied is what its hashes cover.
        out: the repository to be.
        mount: where ``out`` will lie in the server's file system, an absolute path.
        device: what models run on; on a GPU our operators run as their bodies.
        max_batch: the most images of a batch.
        overwrite: replace an ``out`` that is a repository already.

    Raises:
        UsageError: ``out`` is in the way, or ``mount`` is no absolute path.
        BundleError: the bundle changed meanwhile.
    """
    if not PurePosixPath(mount).is_absolute():
        raise UsageError(f"--mount {mount} is no absolute path; say where Triton will see {out}")
    refuse_existing(out, overwrite=overwrite, marker=SUMS)
    with staged_directory(out, overwrite=overwrite) as staged:
        models = _Models(bundle, staged, PurePosixPath(mount), device, max_batch)
        names = [models.write_whole(), models.write_pathways()]
        names += [models.write_segment(each) for each in models.plan.segments]
        write_sums(staged)
    return names


class _Models:
    """Writes models of one bundle into one folder."""

    def __init__(
        self, bundle: Bundle, root: Path, mount: PurePosixPath, device: TritonDevice, max_batch: int
    ) -> None:
        self.bundle, self.root, self.mount, self.device = bundle, root, mount, device
        self.max_batch = max_batch
        self.plan: Plan = bundle.manifest.plan
        self.name = bundle.manifest.model.family
        tensors = self.plan.tensors()
        self.inputs = [tensors[name] for name in self.plan.inputs]
        self.outputs = [tensors[name] for name in self.plan.outputs]

    def write_whole(self) -> str:
        """Write the model as one graph."""
        graph = self.bundle.graph(MODEL).read()
        folder = self._folder(self.name)
        (folder / "model.onnx").write_bytes(graph)
        library = find_custom_ops().library if uses_custom_ops(graph) else None
        path = None
        if library is not None and self.device == "cpu":
            shutil.copyfile(library, folder / library.name)
            path = str(self.mount / self.name / VERSION / library.name)
        return self._config(self.name, "onnxruntime", self.max_batch, custom_ops=path)

    def write_pathways(self) -> str:
        """Write what routes and asks segments."""
        name = f"{self.name}-pathways"
        folder = self._folder(name)
        (folder / "model.py").write_text(_MODEL_PY, encoding="utf-8")
        segments = {each.name: self._name_of(each) for each in self.plan.segments}
        content = {"plan": self.plan.model_dump(mode="json"), "models": segments}
        (folder / PLAN).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return self._config(name, "python", self.max_batch)

    def write_segment(self, segment: Segment) -> str:
        """Write a segment as a model; an expert's batches are of rows of any images."""
        name = self._name_of(segment)
        (self._folder(name) / "model.onnx").write_bytes(self.bundle.graph(segment.file).read())
        first = {tensor.shape[0] for tensor in (*segment.inputs, *segment.outputs)}
        rows = self.max_batch if first == {"N"} else self._most_rows() if first == {"R"} else 0
        return self._config(name, "onnxruntime", rows, (segment.inputs, segment.outputs))

    def _most_rows(self) -> int:
        return self.max_batch * max(route.tokens or 1 for route in self.plan.routes)

    def _name_of(self, segment: Segment) -> str:
        return f"{self.name}.{segment.name}"

    def _folder(self, name: str) -> Path:
        (folder := self.root / name / VERSION).mkdir(parents=True)
        return folder

    def _config(
        self,
        name: str,
        backend: str,
        max_batch: int,
        ends: tuple[tuple[TensorInfo, ...], tuple[TensorInfo, ...]] | None = None,
        custom_ops: str | None = None,
    ) -> str:
        inputs, outputs = ends or (self.inputs, self.outputs)
        device: TritonDevice = "cpu" if backend == "python" else self.device
        config = ModelConfig(name, backend, inputs, outputs, device, max_batch, custom_ops)
        (self.root / name / "config.pbtxt").write_text(config.text(), encoding="utf-8")
        return name
