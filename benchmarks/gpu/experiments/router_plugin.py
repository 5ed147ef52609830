"""The router's tail as a TensorRT plugin: a kernel compiled ahead of time, built into engines.

A quick deployable plugin, TensorRT 10.9 and newer; engines that hold it run without Python, Triton
or this package. Written against the documented interface; not run on a GPU yet. Engines are built
with TensorRT's own layers; ``benchmarks/gpu/main.py`` asks whether this is faster.
"""

from dataclasses import dataclass
from importlib import import_module
from types import GenericAlias
from typing import Any

from advmoe_deploy.errors import BackendUnavailableError
from advmoe_deploy.runtime.tensorrt.api import probe, tensorrt, version_text

NAMESPACE = "advmoe"


@dataclass(frozen=True)
class RouterKernel:
    """From scores [R, E] and R to ids int32 [R, K] and weights [R, K], for one kind of GPU.

    ``entry`` is its name in ``ptx``; a block of ``threads`` takes ``rows_per_block`` rows.
    """

    entry: str
    ptx: str
    top_k: int
    rows_per_block: int
    threads: int
    shared_bytes: int


def register_router(kernel: RouterKernel, operator: str, *, is_lazy: bool = False) -> None:
    """Let nodes of type ``operator``, plugin namespace :data:`NAMESPACE`, be ``kernel``.

    Once per operator and process. With ``is_lazy`` a graph's parser does not know it yet.

    Raises:
        BackendUnavailableError: this TensorRT has no such plugins.
    """
    trt, module = tensorrt(), plugins()

    def describe(scores: Any) -> Any:
        shape = (scores.shape_expr[0], kernel.top_k)
        ids = module.from_shape_expr(shape, trt.DataType.INT32)
        return ids, module.from_shape_expr(shape, trt.DataType.FLOAT)

    def launch(scores: Any, outputs: Any, tactic: Any) -> Any:
        rows = scores.shape_expr[0]
        how = module.KernelLaunchParams()
        how.grid_x = module.cdiv(rows, kernel.rows_per_block)
        how.block_x, how.shared_mem = kernel.threads, kernel.shared_bytes
        numbers = module.SymIntExprs(1)
        numbers[0] = module.SymInt32(rows)
        return kernel.entry, kernel.ptx, how, numbers

    # TensorRT reads what they take and return from the annotations.
    tensor = module.TensorDesc
    described = GenericAlias(tuple, (tensor, tensor))
    launched = GenericAlias(tuple, (str, str, module.KernelLaunchParams, module.SymIntExprs))
    describe.__annotations__ = {"scores": tensor, "return": described}
    launch.__annotations__ = {"return": launched}
    name = f"{NAMESPACE}::{operator}"
    module.register(name, lazy_register=is_lazy)(describe)
    module.aot_impl(name)(launch)


def plugins() -> Any:
    """Return TensorRT's module of plugins written in Python.

    Raises:
        BackendUnavailableError: TensorRT is missing, or older than 10.9, which compiled kernels
            need.
    """
    trt = tensorrt()
    if probe(trt, "QuickPluginCreationRequest") is None:
        raise BackendUnavailableError(
            f"TensorRT {version_text()} takes no compiled kernels as plugins; use 10.9 or newer"
        )
    return import_module("tensorrt.plugin")
