"""The public Python API: what the commands do, as functions.

``import advmoe_deploy`` offers these names without loading anything; a name's first use imports it.
"""

from importlib import import_module

from advmoe_deploy.api.making import (
    export,
    import_checkpoint,
    load_model,
    open_bundle,
    open_runner,
    train,
)
from advmoe_deploy.api.measuring import benchmark, evaluate, profile, verify
from advmoe_deploy.bundle import Bundle
from advmoe_deploy.runtime.tensorrt.build import BuildOptions

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

# Where ``import advmoe_deploy.train.config as config`` looks for a module of a sub-package is what
# bears the name of that: these functions, which therefore have its attributes.
for _function in (export, train, verify):
    _part = import_module(f"advmoe_deploy.{_function.__name__}")
    _part.__dict__.update(_function.__dict__)
    _function.__dict__ = _part.__dict__
