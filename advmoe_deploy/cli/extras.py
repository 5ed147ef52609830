"""Optional packages, and the extra that brings each."""

from advmoe_deploy.errors import BackendUnavailableError, missing_extra

# Name in imports -> name in pip, extra.
OPTIONAL = {
    "onnxruntime": ("onnxruntime", "cpu"),
    "openvino": ("openvino", "openvino"),
    "tensorrt": ("tensorrt", "gpu"),
    "tensorrt_rtx_bindings": ("tensorrt-rtx-cu13-bindings", "rtx"),
    "cuda": ("cuda-bindings", "gpu"),
    "torch": ("torch", "train"),
    "lightning_fabric": ("lightning-fabric", "train"),
    "pyautoattack": ("pyautoattack", "train"),
    "scipy": ("scipy", "train"),
    "sklearn": ("scikit-learn", "train"),
    "tensorboard": ("tensorboard", "train"),
    "pyarrow": ("pyarrow", "serve"),
    "fastapi": ("fastapi", "serve"),
    "uvicorn": ("uvicorn", "serve"),
    "httptools": ("httptools", "serve"),
    "grpc": ("grpcio", "serve"),
    "tritonclient": ("tritonclient", "serve"),
    "prometheus_client": ("prometheus-client", "serve"),
    "huggingface_hub": ("huggingface_hub", "hub"),
    "jinja2": ("jinja2", "report"),
    "matplotlib": ("matplotlib", "report"),
    "model_signing": ("model-signing", "sign"),
    "opentelemetry": ("opentelemetry-sdk", "otel"),
    "ray": ("ray", "ray"),
}
REQUIRED = ("numpy", "onnx", "pillow", "pydantic", "rich", "safetensors", "typer")


def missing_package(error: ImportError) -> BackendUnavailableError | None:
    """Return the error that names the extra, if ``error`` is about one of our optional packages."""
    found = OPTIONAL.get((error.name or "").partition(".")[0])
    return missing_extra(*found) if found else None
