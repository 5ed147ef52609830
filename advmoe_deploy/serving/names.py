r"""Names of inputs in rows: UTF-8, and no two inputs of one name.

A name stands as it is, unless it is no UTF-8, or has in it what looks like an escape, or ends in
``#`` and digits, which is how rows and repetitions within a file are counted. Such a name is
escaped: ``\\`` is a backslash, ``\xHH`` a byte. So a name with ``\x`` and two digits is an escaped
one, and any other is the path itself.
"""

import os
import re

_ESCAPE = re.compile(r"\\x[0-9a-f]{2}")
_NUMBER = re.compile(r"#(?=[0-9]+\Z)")


def shown(path: str) -> str:
    """Return the name of ``path``, which has bytes that are no UTF-8 as Python's functions do."""
    raw = os.fsencode(path)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        pass
    else:
        if not _ESCAPE.search(text) and not _NUMBER.search(text):
            return text
    escaped = raw.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    return _NUMBER.sub(r"\\x23", escaped)


def readable(text: str) -> str:
    r"""Return ``text`` about a path as UTF-8; other bytes of the path become ``\xff`` and so on."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")
