"""Notices about data: one line on stderr, each once per process."""

import logging
from functools import cache

_LOG = logging.getLogger("advmoe_deploy.data")


@cache
def say_once(message: str) -> None:
    """Log ``message`` as a warning, unless this process has said it before."""
    _LOG.warning(message)
