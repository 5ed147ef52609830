"""The command ``sign``."""

from pathlib import Path
from typing import Annotated

import typer

from advmoe_deploy.cli.options import BundlePath, Json
from advmoe_deploy.cli.session import session


def sign(
    bundle: BundlePath,
    key: Annotated[
        Path,
        typer.Option(
            "--key",
            readable=False,
            metavar="KEY.pem",
            help="A private elliptic-curve key in PEM: openssl ecparam -name prime256v1 -genkey.",
        ),
    ],
    as_json: Json = False,
) -> None:
    """Sign a bundle, to tell it from what others made of it.

    Commands that open a bundle ask for the signature by --require-signature.
    """
    with session(as_json) as ui:
        from advmoe_deploy.api import open_bundle
        from advmoe_deploy.cli.tables.escape import escape
        from advmoe_deploy.sealing.signature import sign_bundle

        signature = str(sign_bundle(open_bundle(bundle), key))
        value = {"bundle": str(bundle), "signature": signature}
        ui.show(value, lambda: escape(f"signed: {signature}"))
