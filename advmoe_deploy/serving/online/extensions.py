"""The protocol's extensions ``model_configuration`` and ``statistics``, in Triton's words."""

from typing import Any

from advmoe_deploy.serving.online.metrics import Metrics
from advmoe_deploy.serving.online.protocol import INPUT, ServedModel


def model_config(model: ServedModel) -> dict[str, Any]:
    """Return the model configuration; its ``max_batch_size`` is of one request."""
    outputs = [
        {"name": name, "data_type": f"TYPE_{dtype}", "dims": list(shape)}
        for name, (dtype, shape) in model.outputs.items()
    ]
    return {
        "name": model.name,
        "platform": "advmoe-deploy",
        "backend": "advmoe-deploy",
        "max_batch_size": model.limits.max_images,
        "input": [{"name": INPUT, "data_type": "TYPE_FP32", "dims": list(model.image_shape)}],
        "output": outputs,
        "dynamic_batching": {"max_queue_delay_microseconds": round(1e6 * model.limits.delay_s)},
    }


def model_statistics(model: ServedModel, metrics: Metrics) -> dict[str, Any]:
    """Return what became of the requests for ``model``; times are sums, of whole batches too.

    Of the requests that succeeded, each counts once in every part of their time: Triton's own
    clients hold these counts against one another.
    """
    total = metrics.totals()

    def duration(part: str, of: str = "success") -> dict[str, int]:
        return {"count": int(total[f"{of}_count"]), "ns": round(1e9 * total[part])}

    return {
        "name": model.name,
        "version": model.version,
        "last_inference": round(1e3 * metrics.last_s),
        "inference_count": int(total["images"]),
        "execution_count": int(total["batches"]),
        "inference_stats": {
            "success": duration("success"),
            "fail": duration("fail", "fail"),
            "queue": duration("wait"),
            "compute_input": duration("read"),
            "compute_infer": duration("compute"),
            "compute_output": duration("write"),
        },
        "batch_stats": [],
    }
