"""Ship the kernels of the custom operators in the wheel, where there is a C compiler.

Everything else is in pyproject.toml. Without a compiler, and in an editable installation, nothing
is compiled here: the package then compiles the kernels itself when they are first needed, or runs
the bodies of the operators.
"""

import importlib.util
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = Path("advmoe_deploy/runtime/onnxruntime/kernels")

_spec = importlib.util.spec_from_file_location("kernels_build", KERNELS / "build.py")
assert _spec is not None
assert _spec.loader is not None
build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(build)

COMPILER = build.find_compiler()


class WithKernels(build_py):
    """Copies the package and compiles the kernels beside their source."""

    def run(self) -> None:
        """Copy, then compile; a compiler that fails is no reason to fail."""
        super().run()
        if COMPILER and not self.editable_mode:
            try:
                build.compile_kernels(COMPILER, Path(self.build_lib) / KERNELS)
            except OSError as error:
                self.warn(f"no kernels in this wheel: {error}")


class OfThisPlatform(bdist_wheel):
    """Names the platform, but no Python: the kernels know nothing of it."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tag ``py3-none-<platform>``."""
        *_, platform = super().get_tag()  # "any" without kernels
        return ("py3", "none", platform)


class WithOrWithoutKernels(Distribution):
    """Belongs to a platform where kernels are compiled."""

    def has_ext_modules(self) -> bool:
        """Return whether something is compiled."""
        return COMPILER is not None


setup(
    distclass=WithOrWithoutKernels,
    cmdclass={"build_py": WithKernels, "bdist_wheel": OfThisPlatform},
)
