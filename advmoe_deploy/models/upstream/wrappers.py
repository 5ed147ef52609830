"""Wrappers around a network in a file: keys and prefixes to take off.

A file is read as one list of dotted names: the keys of its dictionaries, then the tensors' own
names, as in ``state_dict.model.module.conv1.weight``. A network is found by tensors that its source
always writes, so that every wrapper, known or not, is a prefix. That prefix is the *root*, here
``state_dict.model.module.``
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from advmoe_deploy.errors import CheckpointError, UsageError

StateDict = Mapping[str, Tensor]
Names = Mapping[str, str]

# Parts of names that stand for no module of the network, at any depth: DataParallel,
# torch.compile, FSDP, activation checkpoints, Fabric.
_WRAPPERS = frozenset(
    {
        "module",
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
    }
)
_TOP = "."  # how the root of a file without wrappers is written
_DEEPEST = 6


@dataclass(frozen=True)
class Signature:
    """Names of tensors that tell where a source's network is.

    Each of ``alternatives`` is a set of names that are there together. ``parts`` are modules of the
    network that hold such names themselves. ``beside`` is a module that the source also keeps next
    to the network.
    """

    alternatives: tuple[tuple[str, ...], ...]
    parts: frozenset[str] = frozenset()
    beside: str = ""


@dataclass(frozen=True)
class Found:
    """One network in a file: its root, and its tensors' names there by their names below it.

    ``others`` are the roots of networks beside it.
    """

    root: str
    names: Mapping[str, str]
    others: tuple[str, ...] = ()

    def may_hold(self, name: str) -> bool:
        """Return whether ``name`` lies in this network or in none."""
        around = [root for root in (self.root, *self.others) if name.startswith(root)]
        return not around or max(around, key=len) == self.root

    def unwrapped(self) -> tuple[str, ...]:
        """Return the keys and prefixes that were taken off the tensors' names."""
        inside = (
            part
            for name in self.names.values()
            if name.startswith(self.root)
            for part in _parts(name.removeprefix(self.root))
            if part in _WRAPPERS
        )
        return tuple(dict.fromkeys([*_parts(self.root), *inside]))

    def left_out(self, tensors: StateDict, used: Iterable[str]) -> tuple[str, ...]:
        """Return where the tensors lie that are neither the network's nor ``used``."""
        taken = {*self.names.values(), *used}
        places = (_fork(name, self.root) for name in tensors if name not in taken)
        return tuple(dict.fromkeys(places))


def flattened(content: Mapping[str, object], file: str) -> dict[str, Tensor]:
    """Return the tensors of nested dictionaries by their dotted names.

    Raises:
        CheckpointError: there are none, or two of one name.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in _walk(content, ()):
        if name in tensors:
            raise CheckpointError(f"{file} holds {name} twice; which one is meant?")
        tensors[name] = tensor.detach()
    if not tensors:
        found = ", ".join([*map(str, content)][:5]) or "nothing"
        raise CheckpointError(f"{file} holds no tensors by name, but {found}; name a checkpoint")
    return tensors


def _walk(content: Mapping[str, object], path: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items():
        if not isinstance(key, str):
            continue
        if isinstance(value, Tensor):
            yield ".".join((*path, key)), value
        elif isinstance(value, Mapping) and len(path) < _DEEPEST:  # one may lie in itself
            yield from _walk(value, (*path, key))


def roots_of(names: Iterable[str], signature: Signature) -> list[str]:
    """Return the prefixes below which a network of this source lies, shortest first."""
    wanted = {name for names in signature.alternatives for name in names}
    there: dict[str, set[str]] = defaultdict(set)
    for name in names:
        for ending in wanted:
            root = _root(name, ending)
            if root is not None and not signature.parts & {*_plain(root).split(".")[-1:]}:
                there[root].add(ending)
    complete = (
        r for r, found in there.items() if any(found >= {*a} for a in signature.alternatives)
    )
    return sorted(complete, key=len)


def network_in(tensors: StateDict, signature: Signature, key: str, file: str) -> Found:
    """Return the network of a file, by ``key`` where there are several.

    Without any the whole file comes back, for the converter to say what is missing.

    Raises:
        CheckpointError: there are several that differ and no ``key``, or two tensors of one name.
        UsageError: nothing lies at ``key``.
    """
    roots = roots_of(tensors, signature)
    chosen = _at_key(key, roots, tensors, file) if key else roots
    if not chosen:
        return Found("", {name: name for name in tensors})
    names = {root: _below(root, roots, tensors, file) for root in chosen}
    first = chosen[0]
    differing = [root for root in chosen if not _equal(names[root], names[first], tensors)]
    if differing:
        raise CheckpointError(
            f"{file} holds several networks, at {_listed([first, *differing])}; choose one, such "
            f"as --key {_shown(differing[-1])}"
        )
    others = tuple(root for root in roots if root != first)
    beside = _beside(first, signature.beside, names[first], others, tensors)
    return Found(first, names[first] | beside, others)


def _at_key(key: str, roots: list[str], tensors: StateDict, file: str) -> list[str]:
    """Return the roots that ``key`` names: one exactly, else those it is part of, else itself."""
    root = "" if key == _TOP else f"{key.strip('.')}."
    plain = _plain(root)
    matches = (
        [other for other in roots if other == root],
        [other for other in roots if _plain(other) == plain],
        [other for other in roots if plain and f".{plain}." in f".{_plain(other)}."],
        [root] if any(name.startswith(root) for name in tensors) else [],
    )
    for found in matches:
        if found:
            return found
    there = _listed(roots) if roots else ", ".join({name.split(".")[0]: "" for name in tensors})
    raise UsageError(f"--key '{key}' names nothing in {file}; it holds weights at {there}")


def _below(root: str, roots: list[str], tensors: StateDict, file: str) -> dict[str, str]:
    """Return the names below ``root``, but not below a root in it, by their plain names."""
    inner = tuple(other for other in roots if other != root and other.startswith(root))
    names: dict[str, str] = {}
    for name in tensors:
        if name.startswith(root) and not name.startswith(inner):
            plain = _plain(name.removeprefix(root))
            if plain in names:
                raise CheckpointError(f"{file} holds {plain} twice; which one is meant?")
            names[plain] = name
    return names


def _beside(
    root: str, module: str, own: Names, others: tuple[str, ...], tensors: StateDict
) -> dict[str, str]:
    """Return the names of ``module`` where it lies next to ``root`` or to what contains it.

    Where there are several networks it may belong to another, so it only fills a gap.
    """
    if not module or (others and any(f".{module}." in f".{name}" for name in own)):
        return {}
    parts = _parts(root)
    for depth in reversed(range(len(parts))):
        place = "".join(f"{part}." for part in (*parts[:depth], module))
        found = [name for name in tensors if name.startswith(place)]
        if found:
            return {f"beside.{module}.{_plain(n.removeprefix(place))}": n for n in found}
    return {}


def _equal(one: Names, other: Names, tensors: StateDict) -> bool:
    return one is other or (
        one.keys() == other.keys()
        and all(torch.equal(tensors[one[name]], tensors[other[name]]) for name in one)
    )


def _root(name: str, ending: str) -> str | None:
    """Return what precedes ``ending`` in ``name``, wherever wrappers are; ``None`` without it."""
    parts = name.split(".")
    for part in reversed(ending.split(".")):
        while parts and parts[-1] in _WRAPPERS:
            parts.pop()
        if not parts or parts.pop() != part:
            return None
    return "".join(f"{part}." for part in parts)


def _parts(path: str) -> list[str]:
    return [part for part in path.split(".") if part]


def _plain(path: str) -> str:
    return ".".join(part for part in _parts(path) if part not in _WRAPPERS)


def _fork(name: str, root: str) -> str:
    """Return ``name`` up to the part at which it leaves ``root``."""
    parts = name.split(".")
    shared = 0
    for part, other in zip(parts, _parts(root), strict=False):
        if part != other:
            break
        shared += 1
    return ".".join(parts[: shared + 1])


def _shown(root: str) -> str:
    return root.rstrip(".") or _TOP


def _listed(roots: Iterable[str]) -> str:
    return ", ".join(map(_shown, roots))
