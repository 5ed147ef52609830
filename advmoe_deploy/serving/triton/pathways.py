"""Model for Triton's Python backend: routes, and asks other models of the server for each segment.

Requests that Triton brings together are one batch: it is routed once, and the experts of a layer
are asked side by side, each for its own rows, which Triton may again join with those of others.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from advmoe_deploy.plan import Plan, Segment
from advmoe_deploy.runtime.plan_walk import walk
from advmoe_deploy.runtime.routing import Tensors


class TritonPythonModel:
    """The name and the methods that the backend looks for."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Read the plan, and which model runs each of its segments."""
        import triton_python_backend_utils as triton  # which is there inside of Triton alone

        self.triton = triton
        file = Path(args["model_repository"], args["model_version"], "plan.json")
        content = json.loads(file.read_text(encoding="utf-8"))
        self.plan = Plan.model_validate(content["plan"])
        self.models: Mapping[str, str] = content["models"]

    async def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer requests, in their order; if one cannot be answered, none of the batch is."""
        (name,) = self.plan.inputs
        given = [self.triton.get_input_tensor_by_name(each, name).as_numpy() for each in requests]
        try:
            tensors = await walk(self.plan, np.concatenate(given), self._ask)
        except self.triton.TritonModelException as error:
            failed = self.triton.TritonError(str(error))
            return [self.triton.InferenceResponse(error=failed) for _ in requests]
        ends = np.cumsum([len(images) for images in given])
        return [
            self.triton.InferenceResponse(
                [
                    self.triton.Tensor(n, tensors[n][end - len(images) : end])
                    for n in self.plan.outputs
                ]
            )
            for images, end in zip(given, ends, strict=True)
        ]

    async def _ask(self, segment: Segment, ends: Tensors) -> Tensors:
        """Return what the model of ``segment`` answers.

        Raises:
            TritonModelException: it answers with an error.
        """
        names = [tensor.name for tensor in segment.outputs]
        request = self.triton.InferenceRequest(
            model_name=self.models[segment.name],
            requested_output_names=names,
            inputs=[self.triton.Tensor(name, np.ascontiguousarray(x)) for name, x in ends.items()],
        )
        response = await request.async_exec()
        if response.has_error():
            raise self.triton.TritonModelException(f"{segment.name}: {response.error().message()}")
        return {n: self.triton.get_output_tensor_by_name(response, n).as_numpy() for n in names}
