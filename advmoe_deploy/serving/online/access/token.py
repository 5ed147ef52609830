"""Token that clients show: ``Authorization: Bearer TOKEN``, RFC 6750."""

import hmac
import os
import re
import stat
import sys
from pathlib import Path

from advmoe_deploy.errors import InputError, reading

HOW_TO_ENTER = "show the token of this server: 'Authorization: Bearer TOKEN'"
_LONGEST = 1024
_TOKEN = re.compile(rb"[A-Za-z0-9._~+/-]{16,}=*")
_OPEN_TO_OTHERS = stat.S_IRWXO | stat.S_IWGRP | stat.S_IXGRP


class Token:
    """A secret that servers and their clients share."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def admits(self, authorization: bytes | None) -> bool:
        """Return whether the header ``Authorization`` shows the token.

        How long that takes does not tell how much of a wrong token is right.
        """
        scheme, _, shown = (authorization or b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(shown.strip(b" "), self._secret)


def read_token(path: Path) -> Token:
    """Return the token that is alone in the file ``path``.

    Raises:
        InputError: others may read or change the file, or it holds no token.
        OSError: it cannot be read.
    """
    with reading(path), path.open("rb") as file:
        mode = os.fstat(file.fileno()).st_mode
        text = file.read(_LONGEST + 1).strip()
    if sys.platform != "win32" and mode & _OPEN_TO_OTHERS:
        raise InputError(f"{path}: others may read or change it; run: chmod 600 {path}")
    if not text:
        raise InputError(f"{path}: it is empty; write a token into it: openssl rand -hex 32")
    if len(text) > _LONGEST or not _TOKEN.fullmatch(text):
        raise InputError(
            f"{path}: a token is 16 to {_LONGEST} letters, digits and any of -._~+/ on one line; "
            "make one: openssl rand -hex 32"
        )
    return Token(text)
