"""The command ``inspect``."""

from advmoe_deploy.cli.options import BundlePath, Json
from advmoe_deploy.cli.session import session


def inspect(bundle: BundlePath, as_json: Json = False) -> None:
    """Show what a bundle holds, after checking every file's hash."""
    with session(as_json) as ui:
        from advmoe_deploy.bundle import open_bundle
        from advmoe_deploy.cli.tables import bundle as tables

        opened = open_bundle(bundle)
        value = {"bundle": str(opened.path), **opened.manifest.model_dump(mode="json")}
        ui.show(value, lambda: tables.bundle_contents(opened))
