"""Specs of models that experts are left out of."""

import numpy as np

from advmoe_deploy.specs import ExpertLayers, ModelSpec
from tests.conftest import TINY
from tests.families import DIGITS

IMAGES = np.random.default_rng(3).random((24, 1, 8, 8), dtype=np.float32)
ADVMOE = TINY.model_copy(update={"num_experts": 3})
RENORMALISED = ModelSpec.model_validate(
    {
        **DIGITS,
        "family": "robust-experts",
        "num_experts": 4,
        "top_k": 2,
        "weighting": "renormalised",
        "expert_layers": ExpertLayers(kind="conv", layers=("layer4.0",)),
    }
)
