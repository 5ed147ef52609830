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
    """Return what became of the requests for ``model``; times are sums, of whole batches too."""
    total = metrics.totals()

    def duration(name: str) -> dict[str, int]:
        count, seconds = total[f"{name}_count"], total[f"{name}_sum"]
        return {"count": int(count), "ns": round(1e9 * seconds)}

    return {
        "name": model.name,
        "version": model.version,
        "last_inference": round(1e3 * metrics.last_s),
        "inference_count": int(total["batch_images_sum"]),
        "execution_count": int(total["batch_images_count"]),
        "inference_stats": {
            "success": duration("success"),
            "fail": duration("fail"),
            "queue": duration("wait"),
            "compute_input": duration("read"),
            "compute_infer": duration("batch_seconds"),
            "compute_output": duration("write"),
        },
        "batch_stats": [],
    }
