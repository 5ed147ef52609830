"""Build of a serialized TensorRT engine from an ONNX graph, by names that 8.6, 10 and 11 share.

Written against the documented interface; not run on a GPU yet. Precision is in the graph: float16
tensors, bfloat16 tensors, Q/DQ pairs. Releases from 10 on take it from there (strong typing);
before, flags allow it, and TensorRT may still choose float32 where that is faster; what the graph
has in float32, as what leads to scores alone, is held to it there.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator
from typing_extensions import Self

from advmoe_deploy.errors import (
    BackendUnavailableError,
    BundleError,
    CheckFailedError,
    MachineError,
    reason_of,
)
from advmoe_deploy.files import write_output
from advmoe_deploy.process import cache_folder
from advmoe_deploy.reports.devices import EngineDevice, GpuLibrary
from advmoe_deploy.runtime.shared_libraries import load_library
from advmoe_deploy.runtime.tensorrt.api import (
    STRONG_TYPES,
    TITLES,
    Heard,
    ILayer,
    INetworkDefinition,
    ITensor,
    listen,
    logger,
    probe,
    tensorrt,
    tensorrt_version,
    version_text,
)
from advmoe_deploy.runtime.tensorrt.rtx import targets
from advmoe_deploy.runtime.tensorrt.shapes import BatchProfile, Shapes, with_least
from advmoe_deploy.specs import Frozen, Precision

# The flag that allows each precision where a graph's own types do not rule.
_FLAGS: dict[Precision, tuple[str, ...]] = {
    "fp32": (),
    "fp16": ("FP16",),
    "bf16": ("BF16",),
    "int8": ("INT8",),
}
# By any release; 11 has the last two.
TacticSource = Literal["CUBLAS", "CUBLAS_LT", "CUDNN", "EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"]
TACTIC_SOURCES: tuple[TacticSource, ...] = get_args(TacticSource)
_OUT_OF_MEMORY = ("out of memory", "OutOfMemory", "insufficient memory", "bad_alloc")
_MIB = 1 << 20
_WAYS_OUT: dict[GpuLibrary, str] = {
    "tensorrt": "another --precision, or a newer release",
    "tensorrt-rtx": "another --precision, other compute_capabilities, a larger workspace_mib where "
    "one is set, or a newer release",
}
_TO_START: dict[GpuLibrary, str] = {
    "tensorrt": "it builds only where an NVIDIA GPU and its driver are; elsewhere export with "
    "--onnx-only",
    "tensorrt-rtx": "install tensorrt-rtx-cu13-bindings and tensorrt-rtx-cu13-libs of one release",
}


class BuildOptions(Frozen):
    """Options of the build of engines.

    Args:
        batch: the batch sizes.
        tf32: let fp32 be rounded to TF32, which keeps 10 bits of 23.
        unquantised_dtype: the dtype, around int8, of what is not quantised; fp16 needs release 10.
        workspace_mib: memory a kernel may use beside its inputs and outputs; by default TensorRT's.
        optimization_level: 0 to 5, how long to search; by default TensorRT's, which is 3.
        version_compatible: the engine also runs on later releases of this major version.
        refittable: weights can be changed later, at some cost in speed.
        tactic_sources: the libraries whose kernels may be tried, by TensorRT's names; by default
            all. Where cuBLAS and cuDNN are stand-ins, JIT_CONVOLUTIONS and EDGE_MASK_CONVOLUTIONS.
        batch_min_profile: kernels are chosen for exactly the least shapes as well.
        timing_cache: a file of timings that builds share.
        compute_capabilities: for RTX alone, such as 8.6 and 8.9: of the GPUs to compile for; by
            default those that it chooses: 8.0, 8.6, 8.9, 12.0 and newer.
        weight_streaming: for RTX alone: weights may stay in the host's memory, as far as the GPU's
            does not suffice.
    """

    batch: BatchProfile = Field(default_factory=BatchProfile)
    tf32: bool = False
    unquantised_dtype: Literal["fp32", "fp16"] = "fp32"
    workspace_mib: int | None = Field(None, ge=1)
    optimization_level: int | None = Field(None, ge=0, le=5)
    version_compatible: bool = False
    refittable: bool = False
    tactic_sources: tuple[TacticSource, ...] | None = None
    batch_min_profile: bool = True
    timing_cache: Path | None = None
    compute_capabilities: tuple[Annotated[str, Field(pattern=r"^\d+\.\d$")], ...] = ()
    weight_streaming: bool = False

    @field_validator("compute_capabilities")
    @classmethod
    def _each_once(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(dict.fromkeys(given), key=float))

    def profiles(self, shapes: Mapping[str, Shapes]) -> list[Mapping[str, Shapes]]:
        """Return the shapes of each optimization profile for inputs of ``shapes``."""
        return with_least(shapes) if self.batch_min_profile else [shapes]

    def with_timings(self, file: Path) -> Self:
        """Return the same with timings kept in ``file``, unless they are kept elsewhere already."""
        return self.model_copy(update={"timing_cache": self.timing_cache or file})


def timing_cache_file(device: EngineDevice) -> Path:
    """Return where timings of this GPU and this release are kept, in the user's cache."""
    return cache_folder() / "tensorrt" / f"{device.slug}.timings"


def build_engine(
    onnx: bytes,
    shapes: Mapping[str, Shapes],
    options: BuildOptions,
    *,
    precision: Precision = "fp32",
    name: str = "the graph",
    with_plugins: bool = False,
    library: GpuLibrary = "tensorrt",
    inspect: Callable[[INetworkDefinition], None] | None = None,
) -> bytes:
    """Return the serialized engine of a graph.

    Args:
        onnx: the graph, of standard operators.
        shapes: of its inputs by name.
        options: how to build.
        precision: the lowest that the graph says.
        name: what to call it in messages.
        with_plugins: it has plugins of :mod:`~benchmarks.gpu.experiments.router_plugin`.
        library: what builds it; RTX needs no GPU.
        inspect: is given the network as it was read, before it is built.

    Raises:
        BackendUnavailableError: the library or a GPU is missing, or it lacks precision or option.
        BundleError: TensorRT cannot read the graph.
        CheckFailedError: it can, and finds no kernels for it.
        MachineError: memory is used up.
    """
    trt = tensorrt(library)
    require_buildable(precision, options, library)
    heard = listen()
    builder = _builder(library)
    network = builder.create_network(_network_flags(library, with_plugins=with_plugins))
    _parse(library, network, onnx, name)
    if inspect is not None:
        inspect(network)
    config = builder.create_builder_config()
    _configure(trt, config, options, precision, library)
    if precision == "fp16" and tensorrt_version(library) < STRONG_TYPES:
        _keep_float32(trt, config, network)
    for each in options.profiles(shapes):
        profile = builder.create_optimization_profile()
        for tensor, sizes in each.items():
            profile.set_shape(tensor, sizes.min, sizes.opt, sizes.max)
        config.add_optimization_profile(profile)
    _take_timings(config, options.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _not_built(name, heard, library)
    _keep_timings(config, options.timing_cache)
    return bytes(memoryview(plan))


def require_buildable(
    precision: Precision, options: BuildOptions, library: GpuLibrary = "tensorrt"
) -> None:
    """Raise :class:`BackendUnavailableError` if this library lacks the precision or an option."""
    trt = tensorrt(library)
    if options.tactic_sources is not None:
        _sources(trt, options.tactic_sources)
    if library == "tensorrt-rtx":
        targets.chosen(options.compute_capabilities)
    if options.version_compatible:
        _require_lean_runtime()
    if tensorrt_version(library) >= STRONG_TYPES:
        return
    for flag in _FLAGS[precision]:
        if probe(trt.BuilderFlag, flag) is None:
            raise BackendUnavailableError(
                f"TensorRT {version_text()} has no {precision}; use --precision fp16, or TensorRT "
                "10 or newer"
            )


def _require_lean_runtime() -> None:
    """Refuse before the first build: the runtime that goes into such engines may not be here."""
    name = f"libnvinfer_lean.so.{tensorrt_version()[0]}"
    if not any(load_library(name, package) for package in ("tensorrt_lean_libs", "tensorrt_libs")):
        raise BackendUnavailableError(
            f"version_compatible engines carry {name}, which is not here; run: pip install "
            f"tensorrt-lean=={version_text()}, or leave version_compatible out"
        )


def _builder(library: GpuLibrary) -> Any:
    trt, heard = tensorrt(library), listen()
    try:
        builder = trt.Builder(logger(library))
    except (TypeError, RuntimeError):  # without a GPU there is none to be had
        builder = None
    if builder is None:
        raise BackendUnavailableError(
            f"{TITLES[library]} cannot start: {heard.reason()}; {_TO_START[library]}"
        )
    return builder


def _network_flags(library: GpuLibrary, *, with_plugins: bool = False) -> int:
    """Return the flags of a network with dynamic batches that keeps to its graph's types."""
    trt, wanted = tensorrt(library), ["EXPLICIT_BATCH"]
    if tensorrt_version(library) >= STRONG_TYPES:
        wanted.append("STRONGLY_TYPED")
    if with_plugins:
        wanted.append("PREFER_AOT_PYTHON_PLUGINS")
    members = [probe(trt.NetworkDefinitionCreationFlag, name) for name in wanted]
    return sum(1 << int(member) for member in members if member is not None)


def _parse(library: GpuLibrary, network: Any, onnx: bytes, name: str) -> None:
    parser = tensorrt(library).OnnxParser(network, logger(library))
    if parser.parse(onnx):
        return
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    reasons = "; ".join(dict.fromkeys(" ".join(str(error.desc()).split()) for error in errors))
    raise BundleError(
        f"{TITLES[library]} {version_text(library)} cannot read {name}: "
        f"{reasons or 'it gives no reason'}; use another --precision, or a newer release"
    )


def _configure(
    trt: Any, config: Any, options: BuildOptions, precision: Precision, library: GpuLibrary
) -> None:
    if options.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    if library == "tensorrt-rtx":
        capabilities = options.compute_capabilities
        targets.configure(config, capabilities, weight_streaming=options.weight_streaming)
    if tensorrt_version(library) < STRONG_TYPES:
        for flag in _FLAGS[precision]:
            config.set_flag(probe(trt.BuilderFlag, flag))
    sharing = probe(trt.PreviewFeature, "PROFILE_SHARING_0806")
    if sharing is not None:  # else contexts of 8.6 cannot run side by side; later ones always can
        config.set_preview_feature(sharing, True)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.refittable:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.workspace_mib is not None:
        size = options.workspace_mib * _MIB
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.tactic_sources is not None:
        config.set_tactic_sources(_sources(trt, options.tactic_sources))


def _keep_float32(trt: Any, config: Any, network: Any) -> None:
    """Hold layers to float32 that the graph has in it, where flags would let them run in float16.

    They are what leads to scores alone: close ones would change places, and with them the route.
    """
    layers = float32_layers(network)
    if layers:
        config.set_flag(probe(trt.BuilderFlag, "OBEY_PRECISION_CONSTRAINTS"))
    for layer in layers:
        setattr(layer, "precision", trt.DataType.FLOAT)  # noqa: B010 (release 11 has no such name)
        for index in range(layer.num_outputs):
            if _is_float(layer.get_output(index)):  # not the ids that come with the best scores
                probe(layer, "set_output_type")(index, trt.DataType.FLOAT)


def float32_layers(network: INetworkDefinition) -> list[ILayer]:
    """Return the layers of a parsed graph that compute what it has in float32, casts aside.

    Types are followed from inputs and casts on: what tensors between them are said to be is not
    what the graph says, where types are not strong.
    """
    ends = [network.get_input(index) for index in range(network.num_inputs)]
    every = [network.get_layer(index) for index in range(network.num_layers)]
    exact, layers = {end.name for end in ends if _is_float(end, "FLOAT")}, []
    for layer in every:
        given = [layer.get_input(index) for index in range(layer.num_inputs)]
        made = [layer.get_output(index) for index in range(layer.num_outputs)]
        if layer.type.name == "CAST":
            exact.update(tensor.name for tensor in made if _is_float(tensor, "FLOAT"))
        elif any(tensor is not None and tensor.name in exact for tensor in given):
            floats = [tensor.name for tensor in made if _is_float(tensor)]
            exact.update(floats)
            layers += [layer] if floats else []
    return layers


def _is_float(tensor: ITensor, *kinds: str) -> bool:
    return tensor.dtype.name in (kinds or ("FLOAT", "HALF"))


def _sources(trt: Any, names: tuple[str, ...]) -> int:
    members = {name: probe(trt.TacticSource, name) for name in names}
    if missing := [name for name, member in members.items() if member is None]:
        raise BackendUnavailableError(
            f"TensorRT {version_text()} has no tactic source {', '.join(missing)}; leave it out of "
            "tactic_sources"
        )
    return sum(1 << int(member) for member in members.values())


def _take_timings(config: Any, file: Path | None) -> None:
    """Start from the timings in ``file``; those of another GPU or release are left aside."""
    if file is None:
        return
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _keep_timings(config: Any, file: Path | None) -> None:
    cache = config.get_timing_cache() if file is not None else None
    if file is not None and cache is not None:
        try:
            write_output(file, bytes(memoryview(cache.serialize())))
        except OSError as error:  # a convenience only: the engine that was built is worth more
            warnings.warn(f"TensorRT's timings could not be kept: {reason_of(error)}", stacklevel=2)


def _not_built(name: str, heard: Heard, library: GpuLibrary) -> Exception:
    if heard.mentions(*_OUT_OF_MEMORY):
        return MachineError(
            f"out of GPU memory while {name} was built: {heard.reason()}; lower batch.max or "
            "workspace_mib"
        )
    return CheckFailedError(
        f"{TITLES[library]} {version_text(library)} cannot build {name}: {heard.reason()}; use "
        f"{_WAYS_OUT[library]}"
    )
