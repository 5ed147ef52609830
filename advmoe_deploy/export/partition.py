"""Cut a model at its routing points: a plan, and one dense torch module per segment."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from advmoe_deploy.models.advmoe import AdvMoE, DenseClassifier
from advmoe_deploy.models.base import Classifier
from advmoe_deploy.plan import ExpertsStep, Plan, RouteStep, RunStep, Segment, TensorInfo

LAYER = "router"
_SCORES = f"{LAYER}.scores"


@dataclass(frozen=True)
class Partition:
    """A plan and the module of each of its segments."""

    plan: Plan
    modules: Mapping[str, nn.Module]


class _RouterSegment(nn.Module):
    """The router as a graph of its own: it normalises the images itself."""

    def __init__(self, model: AdvMoE) -> None:
        super().__init__()
        self.normalise = model.normalise
        self.router = model.router

    def forward(self, images: Tensor) -> Tensor:
        """Return scores [N, E]."""
        scores: Tensor = self.router(self.normalise(images))
        return scores


def partition(model: Classifier) -> Partition:
    """Return the segments of ``model``: router and pathways of an AdvMoE, or the dense network."""
    if isinstance(model, AdvMoE):
        return _partition_advmoe(model)
    return _partition_dense(model)


def _partition_advmoe(model: AdvMoE) -> Partition:
    spec = model.spec
    pathways = [f"pathway-{expert}" for expert in range(spec.num_experts)]
    route = RouteStep(layer=LAYER, scores=_SCORES, num_experts=spec.num_experts)
    image, logits = _image(model), _rows("logits", spec.num_classes)
    scores = _rows(_SCORES, spec.num_experts)
    plan = Plan(
        segments=(
            _segment("router", image, scores),
            *(_segment(name, image, logits) for name in pathways),
        ),
        steps=(
            RunStep(segment="router"),
            route,
            ExpertsStep(layer=LAYER, input="images", output="logits", segments=tuple(pathways)),
        ),
        outputs=("logits", route.expert_ids, route.weights),
    )
    modules: dict[str, nn.Module] = {"router": _RouterSegment(model)}
    modules |= {name: model.pathway(expert) for expert, name in enumerate(pathways)}
    return Partition(plan, modules)


def _partition_dense(model: Classifier) -> Partition:
    segment = _segment("network", _image(model), _rows("logits", model.spec.num_classes))
    plan = Plan(segments=(segment,), steps=(RunStep(segment=segment.name),))
    return Partition(plan, {segment.name: model})


def _segment(name: str, image: TensorInfo, output: TensorInfo) -> Segment:
    return Segment(name=name, file=f"segments/{name}.onnx", inputs=(image,), outputs=(output,))


def _image(model: Classifier) -> TensorInfo:
    return TensorInfo(name="images", dtype="float32", shape=("N", *model.spec.image_shape))


def _rows(name: str, columns: int) -> TensorInfo:
    return TensorInfo(name=name, dtype="float32", shape=("N", columns))
