"""Text of others in tables: neither rich's markup nor a terminal's own commands."""

from rich import markup

from advmoe_deploy.errors import printable


def escape(text: str) -> str:
    """Return ``text`` so that a terminal shows it as it is."""
    return markup.escape(printable(text))
