"""TLS: a certificate and its key, for both ports."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from advmoe_deploy.errors import InputError, reading


@dataclass(frozen=True)
class Tls:
    """A certificate chain and its key in PEM, and the context of servers that show it."""

    chain: bytes
    key: bytes
    context: ssl.SSLContext


def read_tls(certificate: Path, key: Path) -> Tls:
    """Return the certificate chain and key of these files, in PEM.

    Raises:
        InputError: they are no certificate and its key, or the key is encrypted.
        OSError: one cannot be read.
    """

    def password() -> str:
        raise InputError(f"{key}: it is encrypted; name a key without a pass phrase")

    with reading(certificate):
        chain_pem = certificate.read_bytes()
    with reading(key):
        key_pem = key.read_bytes()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password)
    except ssl.SSLError as error:
        reason = (error.reason or "no PEM").lower().replace("_", " ")
        raise InputError(
            f"{certificate} and {key} are no certificate and its key in PEM ({reason}); "
            "check both files"
        ) from None
    return Tls(chain_pem, key_pem, context)
