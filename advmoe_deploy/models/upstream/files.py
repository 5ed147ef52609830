"""Reader of other people's checkpoint files that runs no code they hold.

``torch.load`` runs with ``weights_only=True``. Classes that training scripts keep beside the
weights (settings, paths, states of random number generators) are allowed by name, and what is made
of them is an empty stand-in of ours: their own code is neither imported nor called.
"""

import pickle
import re
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from advmoe_deploy.errors import CheckpointError


class _Unread:
    """Value that is no weight: whatever it is made of is dropped."""

    def __new__(cls, *_: object) -> "_Unread":
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        """Drop the arguments."""

    def __setstate__(self, _: object) -> None:
        """Drop the state."""


class _AsDict:
    """Mapping with code of its own, read as a plain one: the weights may lie in it."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


class _AsList:
    """Sequence with code of its own, read as a list."""

    def __new__(cls, *_: object) -> Any:
        return []


_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_NUMBERS = (
    *("bool", "bool_", "str_", "bytes_", "float16", "float32", "float64", "complex64"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
_UNREAD = (
    "argparse.Namespace",
    "types.SimpleNamespace",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *("decimal.Decimal", "fractions.Fraction", "uuid.UUID"),
    *(f"builtins.{name}" for name in ("bool", "dict", "float", "frozenset", "int", "list")),
    *(f"builtins.{name}" for name in ("object", "range", "slice", "str", "tuple")),
    *(f"numpy.{name}" for name in ("ndarray", "dtype", *_NUMBERS)),
    *(
        f"numpy.{core}.{name}"
        for core in ("core", "_core")
        for name in ("multiarray.scalar", "multiarray._reconstruct", "numeric._frombuffer")
    ),
    *(f"numpy.dtypes.{name.capitalize()}DType" for name in _NUMBERS),
    *(f"numpy.random._pickle.__{name}_ctor" for name in ("randomstate", "generator")),
    "numpy.random._pickle.__bit_generator_ctor",
    "numpy.random.mtrand.RandomState",
    "numpy.random._generator.Generator",
    "numpy.random.bit_generator.SeedSequence",
    "numpy.random.bit_generator.__pyx_unpickle_SeedSequence",
    *("numpy.random._mt19937.MT19937", "numpy.random._philox.Philox", "numpy.random._sfc64.SFC64"),
    *("numpy.random._pcg64.PCG64", "numpy.random._pcg64.PCG64DXSM"),
    "torch.torch_version.TorchVersion",
    "typing.Any",
    *(f"omegaconf.{name}" for name in ("dictconfig.DictConfig", "listconfig.ListConfig")),
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata")),
    *(
        f"omegaconf.nodes.{kind}Node"
        for kind in ("Any", "Boolean", "Bytes", "Enum", "Float", "Integer", "Path", "String")
    ),
    # Lightning before 1.5 names callbacks by their class.
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "pytorch_lightning.callbacks.early_stopping.EarlyStopping",
)
_DICTS = (
    "collections.defaultdict",
    "addict.addict.Dict",
    "easydict.EasyDict",
    "yacs.config.CfgNode",
    *(
        "lightning.fabric.utilities.data.AttributeDict",
        "lightning_fabric.utilities.data.AttributeDict",
    ),
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "lightning.pytorch.utilities.parsing.AttributeDict",
)
_HARMLESS: list[Any] = [
    *((_Unread, name) for name in _UNREAD),
    *((_AsDict, name) for name in _DICTS),
    (_AsList, "collections.deque"),
]

# What arrives in place of a checkpoint, by its first bytes, and the way out.
_NO_CHECKPOINTS = {
    b"": ("is empty", "copy it again"),
    b"<": ("is a web page (HTML or XML), such as a failed download's", "download it again"),
    b"version https://git-lfs": ("is a pointer of Git LFS", "fetch the file itself: git lfs pull"),
    b"/annex/objects/": ("is a pointer of git-annex", "fetch the file itself: git annex get"),
    b"\x1f\x8b": ("is compressed by gzip", "unpack it (gunzip) and import what comes out"),
    b"BZh": ("is compressed by bzip2", "unpack it (bunzip2) and import what comes out"),
    b"\xfd7zXZ": ("is compressed by xz", "unpack it (unxz) and import what comes out"),
    b"\x28\xb5\x2f\xfd": ("is compressed by zstd", "unpack it (unzstd) and import what comes out"),
    b"7z\xbc\xaf\x27\x1c": ("is a 7z archive", "unpack it and import the checkpoint in it"),
    b"Rar!": ("is a RAR archive", "unpack it and import the checkpoint in it"),
    b"\x89HDF": ("is an HDF5 file", "save its weights by torch.save, by the released names"),
}
_HEAD = 2**20
_DAMAGED = "is no file of torch.save or safetensors, or it is damaged; copy it again"


def content_of(file: Path) -> dict[str, Any]:
    """Return what a file of ``torch.save`` or of safetensors holds at its top, by name.

    Raises:
        CheckpointError: the file is missing, no checkpoint, damaged, or needs code to be read.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} is no file; name a checkpoint of the released code")
    with file.open("rb") as stream:
        head = stream.read(_HEAD)
    if head[8:9] == b"{":  # eight bytes of length, then JSON
        return _read_safetensors(file)
    _require_checkpoint(file, head)
    return _read_torch(file, head)


def _require_checkpoint(file: Path, head: bytes) -> None:
    """Raise where the file is plainly something else than one of ``torch.save``."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, (what, way_out) in _NO_CHECKPOINTS.items():
        if text.startswith(start) if start else not text:
            raise CheckpointError(f"{file} cannot be read: it {what}; {way_out}")
    if head.startswith(b"PK"):
        _require_torch_zip(file)
    elif tarfile.is_tarfile(file):
        with tarfile.open(file) as archive:
            first = archive.next()
        holds = f" that begins with {first.name!r}" if first else ""
        raise CheckpointError(
            f"{file} cannot be read: it is a tar archive{holds}; unpack it and import the "
            "checkpoint in it"
        )


def _require_torch_zip(file: Path) -> None:
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            f"{file} cannot be read: it ends too early, such as a broken download; copy it again"
        )
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    inside = [name.partition("/")[2] for name in names]
    if "constants.pkl" in inside:
        raise CheckpointError(
            f"{file} is a TorchScript archive, which is code; where you trust it, save its weights "
            "with torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth') and import that"
        )
    if "data.pkl" in inside:
        return
    if names and all(name.endswith(".npy") for name in names):
        what, way_out = "a NumPy archive", "save its arrays as tensors by name with torch.save"
    elif "archive_format" in inside:
        what, way_out = "a program of torch.export", "save its state_dict with torch.save"
    else:
        held = ", ".join(names[:3]) or "nothing"
        what, way_out = f"a zip archive of {held}", "unpack it and import the checkpoint in it"
    raise CheckpointError(f"{file} cannot be read: it is {what}; {way_out}")


def _read_safetensors(file: Path) -> dict[str, Any]:
    try:
        return dict(load_file(file))
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read: {error}; copy it again") from None


def _read_torch(file: Path, head: bytes) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged bytes raise whatever they happen to mean
        raise _not_read(file, head, error) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds one {type(content).__name__}, not weights by name")
    return dict(content)


def _not_read(file: Path, head: bytes, error: Exception) -> CheckpointError:
    if "Unsupported operand" in str(error) and head.startswith((b"PK", b"\x80")):
        return CheckpointError(
            f"{file} cannot be read: it is a pickle of another protocol than torch.save's own, or "
            "damaged; save it again with torch.save"
        )
    code = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", str(error))
    if not isinstance(error, pickle.UnpicklingError) or not code:
        return CheckpointError(f"{file} {_DAMAGED}")
    if b"torch.nn.modules." in head:  # the pickle comes first and is not compressed
        return CheckpointError(
            f"{file} holds a whole module and needs the code of {code[1]} to be read, which is not "
            "run here; where you trust it, save its weights alone with "
            "torch.save(torch.load(FILE, weights_only=False).state_dict(), 'weights.pth')"
        )
    return CheckpointError(
        f"{file} needs the code of {code[1]} to be read, which is not run here; where you "
        "trust it, save its state_dict alone (torch.save) and import that"
    )
