"""Model configurations as Triton reads them: ``config.pbtxt``, protobuf's text format."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from advmoe_deploy.plan import TensorInfo

TritonDevice = Literal["cpu", "gpu"]
_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}
# A batch is waited for so long, a request in the queue so long, and so many may wait.
_DELAY_US = 2_000
_TIMEOUT_US = 5_000_000
_QUEUE = 256


@dataclass(frozen=True)
class ModelConfig:
    """One model of a repository.

    Args:
        name: also its folder's.
        backend: ``onnxruntime`` or ``python``.
        inputs: with the batch as their first dimension.
        outputs: the same.
        device: what instances run on.
        max_batch: rows of a batch; 0 where first dimensions are not all of one kind, so that Triton
            cannot join or split requests.
        custom_ops: path, in the server's file system, of the library with our operators.
    """

    name: str
    backend: str
    inputs: Sequence[TensorInfo]
    outputs: Sequence[TensorInfo]
    device: TritonDevice = "cpu"
    max_batch: int = 0
    custom_ops: str | None = None

    def text(self) -> str:
        """Return the file's content."""
        blocks = [
            f"name: {json.dumps(self.name)}",
            f'backend: "{self.backend}"',
            f"max_batch_size: {self.max_batch}",
            f"input [{', '.join(map(self._end, self.inputs))}]",
            f"output [{', '.join(map(self._end, self.outputs))}]",
            f"instance_group [{{ kind: KIND_{self.device.upper()} count: 1 }}]",
        ]
        if self.max_batch:
            blocks.append(_BATCHING)
        if self.backend != "python":  # which asks others, that may not be ready by then
            blocks.append(f"model_warmup [{self._warmup(1)}, {self._warmup(self.max_batch or 8)}]")
        if self.custom_ops:
            path = json.dumps(self.custom_ops)
            blocks.append(f"model_operations {{ op_library_filename: {path} }}")
        return "\n".join(blocks) + "\n"

    def _end(self, tensor: TensorInfo) -> str:
        sizes = [*tensor.shape[1:]] if self.max_batch else [-1, *tensor.shape[1:]]
        return (
            f"{{ name: {json.dumps(tensor.name)} data_type: {_TYPES[tensor.dtype]} dims: {sizes} }}"
        )

    def _warmup(self, rows: int) -> str:
        """Return a sample of zeros, whose answer Triton throws away, before the model is ready."""
        first = [] if self.max_batch else [rows]
        inputs = " ".join(
            f"inputs {{ key: {json.dumps(tensor.name)} value: {{ data_type: {_TYPES[tensor.dtype]} "
            f"dims: {[*first, *tensor.shape[1:]]} zero_data: true }} }}"
            for tensor in self.inputs
        )
        return f'{{ name: "{rows} rows" batch_size: {rows if self.max_batch else 0} {inputs} }}'


_BATCHING = f"""dynamic_batching {{
  max_queue_delay_microseconds: {_DELAY_US}
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {_TIMEOUT_US}
    max_queue_size: {_QUEUE}
  }}
}}"""
