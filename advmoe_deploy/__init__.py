"""Adversarially robust mixture-of-experts image classifiers, from training to production."""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from advmoe_deploy.api import (
        BuildOptions,
        Bundle,
        benchmark,
        evaluate,
        export,
        import_checkpoint,
        load_model,
        open_bundle,
        open_runner,
        profile,
        train,
        verify,
    )

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


class _Package(ModuleType):
    """This package, whose public names are those of :mod:`advmoe_deploy.api`, imported when used.

    Three of them, ``train``, ``export`` and ``verify``, are also sub-packages, which the import
    system would put in their place; the modules of those are attributes of the functions.
    """

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from advmoe_deploy import api

        return getattr(api, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
