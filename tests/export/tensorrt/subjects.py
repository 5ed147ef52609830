"""What TensorRT's graphs are made of in tests, small."""

import numpy as np
import torch

from advmoe_deploy.errors import BackendUnavailableError
from advmoe_deploy.export.partition.cut import partition
from advmoe_deploy.export.passes.apply import apply_passes
from advmoe_deploy.export.precision.gate import AnsweredImages
from advmoe_deploy.export.subject import Subject, subject_of
from advmoe_deploy.export.targets import Target, require_supported
from advmoe_deploy.models.untrained import untrained_model
from advmoe_deploy.parity.reference import reference_answers
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile
from advmoe_deploy.specs import ModelSpec

IMAGES = np.random.default_rng(3).random((48, 1, 8, 8), dtype=np.float32)
SMALL = BuildOptions(batch=BatchProfile(min=1, opt=8, max=32))


def subject_for(spec: ModelSpec) -> Subject:
    model = untrained_model(spec, torch.from_numpy(IMAGES))
    parts, _ = apply_passes(partition(model), IMAGES, model.rules)
    examples = AnsweredImages(IMAGES, reference_answers(model, IMAGES))
    return subject_of(model, parts, examples, data="noise", labelled=None, threat=None)


def has_gpu() -> bool:
    try:
        require_supported(Target("tensorrt", "fp32"))
    except BackendUnavailableError:
        return False
    return True
