"""Versions of the packages that figures depend on."""

from importlib.metadata import PackageNotFoundError, version

_PACKAGES = (
    "advmoe-deploy",
    "torch",
    "numpy",
    "onnxruntime",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13-bindings",
)


def installed_versions() -> dict[str, str]:
    """Return the versions of what attacks, engines and numbers depend on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
