"""Tables for the terminal, drawn with rich."""
