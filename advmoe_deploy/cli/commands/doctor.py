"""The command ``doctor``."""

import platform
from dataclasses import asdict

from advmoe_deploy import __version__
from advmoe_deploy.cli.extras import OPTIONAL, REQUIRED
from advmoe_deploy.cli.options import Json
from advmoe_deploy.cli.session import session
from advmoe_deploy.errors import AdvMoEError, missing_extra
from advmoe_deploy.process import usable_cpus
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.reports.versions import version_of
from advmoe_deploy.runtime.onnxruntime.custom_ops import find_custom_ops
from advmoe_deploy.runtime.onnxruntime.kernels.build import find_compiler


def doctor(as_json: Json = False) -> None:
    """Say what runs on this machine, and what brings the rest.

    Ends with 4 if no engine is installed, and with 3 if the library of our operators is not the one
    that was compiled.
    """
    with session(as_json) as ui:
        from advmoe_deploy.cli.tables import bundle as tables
        from advmoe_deploy.runtime.tensorrt.doctor import gpu_path

        engines = {name: version_of(name) for name in ("onnxruntime", "openvino")}
        custom_ops, problem = _custom_ops()
        value = {
            "advmoe": __version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "cpu": processor_name(),
            "cpus": usable_cpus(),
            "engines": engines,
            "gpu": {name: asdict(part) for name, part in gpu_path().items()},
            "compiler": find_compiler(),
            "custom_ops": custom_ops,
            "packages": {
                **{name: {"version": version_of(name), "extra": None} for name in REQUIRED},
                **{
                    name: {"version": version_of(name), "extra": e} for name, e in OPTIONAL.values()
                },
            },
        }
        ui.show(value, lambda: tables.doctor_report(value))
    if not any(engines.values()):
        problem = problem or missing_extra("onnxruntime", "cpu")
    if problem:
        raise problem


def _custom_ops() -> tuple[dict[str, str | None], AdvMoEError | None]:
    """Return which form of our operators runs here, and what is wrong with it, if anything."""
    try:
        return find_custom_ops().as_json(), None
    except AdvMoEError as error:
        return {"form": None, "reason": str(error), "library": None}, error
