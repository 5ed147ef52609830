"""Listeners to long work."""

from advmoe_deploy.progress import Silent


class Notes(Silent):
    """A listener that keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, message: str) -> None:
        self.notes.append(message)
