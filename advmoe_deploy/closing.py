"""Base class of resources that close when their ``with`` block ends."""

from typing_extensions import Self


class Closing:
    """A context manager whose end is its own ``close``."""

    def close(self) -> None:
        """Release what this holds."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
