"""Stand-in for Triton's C++ backend ``onnxruntime``, in Triton's Python backend, over pip's wheel.

It reads the same configuration: the library of operators, and which ends a model has.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config: Any) -> Any:
        return config

    def initialize(self, args: Mapping[str, str]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        config = json.loads(args["model_config"])
        for library in config.get("model_operations", {}).get("op_library_filename", []):
            options.register_custom_ops_library(library)
        file = Path(args["model_repository"], args["model_version"], "model.onnx")
        providers = ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(str(file), options, providers=providers)
        self.inputs = [end["name"] for end in config["input"]]
        self.outputs = [end["name"] for end in config["output"]]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        return [self.answer(each) for each in requests]

    def answer(self, request: Any) -> Any:
        given = {n: triton.get_input_tensor_by_name(request, n).as_numpy() for n in self.inputs}
        made = self.session.run(self.outputs, given)
        return triton.InferenceResponse(
            [triton.Tensor(*e) for e in zip(self.outputs, made, strict=True)]
        )
