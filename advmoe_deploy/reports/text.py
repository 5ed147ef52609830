"""Text that is shown: counts, and names that others chose, such as those of classes."""

import re

from advmoe_deploy.errors import printable

_MARKDOWN = re.compile(r"([\\`*_\[\]<>|#!$&~])")


def in_markdown(name: str) -> str:
    """Return ``name`` so that Markdown, and what makes HTML of it, shows it as it is."""
    return _MARKDOWN.sub(r"\\\1", printable(name).replace("\n", " "))


def count_of(count: int, noun: str) -> str:
    """Return ``1 image`` or ``1,000 images``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def in_plot(name: str) -> str:
    """Return ``name`` so that matplotlib takes no part of it for a formula."""
    return printable(name).replace("$", r"\$")
