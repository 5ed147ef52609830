"""Search for files through folders and links: each real file once, and nothing lost silently."""

import fnmatch
import itertools
import os
import stat
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from advmoe_deploy.decoding import IMAGE_SUFFIXES
from advmoe_deploy.errors import reason_of
from advmoe_deploy.specs import Frozen

_EXAMPLES = 5

# Files that hold images, by suffix.
SHARDS = (".tar", ".parquet")

HIDDEN = "hidden"
NO_IMAGE = "not an image by its suffix"
_BESIDE_IMAGES = "a shard beside images, to be named if it is an input"
_KNOWN_FILE = "a link to a file that is read already"
_KNOWN_FOLDER = "a link to a folder that is read already"
_MATCHED_FOLDER = "a folder that the pattern matches"

# What file_error() says of a folder.
IS_FOLDER = "a folder, not an image"

# A path, and whether a link leads to it.
_Place = tuple[Path, bool]


class Skipped(Frozen):
    """Files or folders that are no inputs for one ``reason``: their number, and some names.

    Of what lies in shards, ``examples`` are the first few of each shard.
    """

    reason: str
    count: int
    examples: tuple[str, ...]

    def __str__(self) -> str:
        more = ", ..." if self.count > _EXAMPLES else ""
        named = ", ".join(
            map(repr, self.examples[:_EXAMPLES])
        )  # which escapes what a terminal would obey
        return f"{self.count} skipped, {self.reason}: {named}{more}"

    @staticmethod
    def exemplify(examples: list[str], name: str) -> None:
        """Add ``name`` to ``examples`` if it is one of the first few."""
        if len(examples) < _EXAMPLES:
            examples.append(name)


def merged(skipped: Iterable[Skipped]) -> tuple[Skipped, ...]:
    """Return ``skipped`` with each reason once."""
    by_reason: dict[str, list[Skipped]] = {}
    for one in skipped:
        by_reason.setdefault(one.reason, []).append(one)
    return tuple(
        Skipped(
            reason=reason,
            count=sum(one.count for one in found),
            examples=tuple(itertools.chain(*(one.examples for one in found))),
        )
        for reason, found in sorted(by_reason.items())
    )


class FileSearch:
    """Files found so far, paths that could not be read, and what was passed over."""

    def __init__(self) -> None:
        self._found: dict[str, bool] = {}  # path -> whether a link leads to it
        self._errors: dict[str, str] = {}
        self._skipped: dict[str, str] = {}

    def images(self, root: Path) -> None:
        """Find the images below ``root``, or else shards; links are followed, hidden names not."""
        shards: dict[str, bool] = {}
        nowhere: dict[str, bool] = {}  # links, which are said whatever the others are
        for folder, linked in self._folders([(root, False)]):
            for entry in self._entries(folder):
                path = folder / entry.name
                if entry.name.startswith("."):
                    self._skipped[str(path)] = HIDDEN
                elif self._is_folder(entry, path):
                    continue
                elif path.suffix.lower() in IMAGE_SUFFIXES:
                    self._found[str(path)] = linked or entry.is_symlink()
                elif path.suffix.lower() in SHARDS:
                    shards[str(path)] = linked or entry.is_symlink()
                elif _leads_nowhere(path):
                    nowhere[str(path)] = True
                else:
                    self._skipped[str(path)] = NO_IMAGE
        if self._found:
            self._skipped.update(dict.fromkeys(shards, _BESIDE_IMAGES))
        else:
            self._found = shards
        self._found |= nowhere

    def match(self, folder: Path, parts: Sequence[str]) -> None:
        """Find what the ``parts`` of a pattern match below ``folder``, whatever its suffix.

        A part that is the name of something there stands for that, whatever characters it has. For
        each part a real folder is looked into once, however many links lead to it.
        """
        places: list[_Place] = [(folder, False)]
        if parts and parts[-1] == "**":
            parts = [*parts, "*"]
        for part, repeated in itertools.groupby(parts):
            if part == "**":
                places = list(self._folders([p for p in places if file_error(p[0]) == IS_FOLDER]))
            else:
                for _ in repeated:
                    below = (found for place in places for found in self._named(place, part))
                    places = self._once(below)
        for path, linked in places:
            self._found[str(path)] = linked

    def files(self) -> tuple[list[str], dict[str, str]]:
        """Return the files, and of other paths that were meant why they cannot be read.

        A file that is reached directly is preferred to links that lead to it.
        """
        paths, seen = [], set()
        for path in sorted(self._found, key=lambda path: (self._found[path], path)):
            known = _identity(Path(path))
            error = file_error(Path(path))
            if error == IS_FOLDER:
                self._skipped[path] = _MATCHED_FOLDER
            elif error is not None:
                self._errors[path] = error
            elif self._found[path] and known in seen:
                self._skipped[path] = _KNOWN_FILE
            else:
                seen.add(known)
                paths.append(path)
        return paths, self._errors

    def skipped(self) -> tuple[Skipped, ...]:
        """Return what was passed over, by reason."""
        by_reason: dict[str, list[str]] = {}
        for path in sorted(self._skipped):
            by_reason.setdefault(self._skipped[path], []).append(path)
        return tuple(
            Skipped(reason=reason, count=len(paths), examples=tuple(paths))
            for reason, paths in sorted(by_reason.items())
        )

    def _named(self, place: _Place, part: str) -> Iterator[_Place]:
        """Yield what has the name ``part`` in a folder, or else what matches it."""
        folder, linked = place
        if os.path.lexists(path := folder / part):
            yield path, linked or path.is_symlink()
            return
        for entry in self._entries(folder):
            path = folder / entry.name
            if not fnmatch.fnmatchcase(entry.name, part):
                continue
            if entry.name.startswith(".") and not part.startswith("."):
                self._skipped[str(path)] = HIDDEN
            else:
                yield path, linked or entry.is_symlink()

    def _once(self, places: Iterable[_Place]) -> list[_Place]:
        """Return ``places`` with each real folder once, by its own name where it has one there."""
        kept, seen = [], set()
        for path, linked in sorted(places, key=lambda place: place[1]):
            if file_error(path) == IS_FOLDER:
                known = _identity(path)
                if known in seen:
                    self._skipped[str(path)] = _KNOWN_FOLDER
                    continue
                seen.add(known)
            kept.append((path, linked))
        return kept

    def _folders(self, roots: Sequence[_Place]) -> Iterator[_Place]:
        """Yield each real folder from ``roots`` on once.

        Folders behind links come last, so that a folder goes by its own name where it has one.
        """
        waiting = deque(place for place in roots if not place[1])
        links = deque(place for place in roots if place[1])
        seen = set()
        while waiting or links:
            folder, by_link = (waiting or links).popleft()
            known = _identity(folder)
            if known in seen:
                self._skipped[str(folder)] = _KNOWN_FOLDER
                continue
            seen.add(known)
            yield folder, by_link
            for entry in self._entries(folder):
                path = folder / entry.name
                if not self._is_folder(entry, path):
                    continue
                if entry.name.startswith("."):
                    self._skipped[str(path)] = HIDDEN
                elif entry.is_symlink():
                    links.append((path, True))
                else:
                    waiting.append((path, by_link))

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except NotADirectoryError:
            return []
        except OSError as error:
            self._errors[str(folder)] = f"the folder cannot be read: {_reason(folder, error)}"
            return []

    def _is_folder(self, entry: os.DirEntry[str], path: Path) -> bool:
        try:
            return entry.is_dir()
        except OSError as error:
            self._errors[str(path)] = _reason(path, error)
            return False


def file_error(path: Path) -> str | None:
    """Return why there is no regular file at ``path``, or ``None`` if there is one."""
    try:
        mode = path.stat().st_mode
    except ValueError:
        return "a path cannot hold a NUL character"
    except OSError as error:
        return _reason(path, error)
    if stat.S_ISDIR(mode):
        return IS_FOLDER
    return None if stat.S_ISREG(mode) else "not a regular file"


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and file_error(path) is not None


def _reason(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return f"a link to {str(path.readlink())!r}, where nothing is"
    return reason_of(error, "read")


def _identity(path: Path) -> tuple[int, int] | Path:
    try:
        status = path.stat()
    except OSError:
        return path
    return status.st_dev, status.st_ino
