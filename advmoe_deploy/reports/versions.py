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


def version_of(package: str) -> str | None:
    """Return the version of an installed package, ``None`` if it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """Return the versions of what attacks, engines and numbers depend on."""
    return {package: found for package in _PACKAGES if (found := version_of(package))}
