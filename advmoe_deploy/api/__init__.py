"""The public Python API: what the commands do, as functions.

``import advmoe_deploy`` offers these names without loading anything; a name's first use imports it.
"""

from advmoe_deploy.api.making import export, import_checkpoint, load_model, open_runner, train
from advmoe_deploy.api.measuring import benchmark, evaluate, profile, verify
from advmoe_deploy.bundle import Bundle
from advmoe_deploy.runtime.tensorrt.build import BuildOptions
from advmoe_deploy.zoo.resolve import open_bundle

__all__ = [
    "BuildOptions",
    "Bundle",
    "benchmark",
    "evaluate",
    "export",
    "import_checkpoint",
    "load_model",
    "open_bundle",
    "open_runner",
    "profile",
    "train",
    "verify",
]
