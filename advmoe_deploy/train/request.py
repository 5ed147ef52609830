"""Request of a training: what can be refused is refused here, before PyTorch is loaded."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.data.folder import survey
from advmoe_deploy.data.registry import folder_in, load_dataset
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import UsageError, unknown_name
from advmoe_deploy.train.config import TrainConfig, apply_overrides
from advmoe_deploy.train.fit import require_fit
from advmoe_deploy.train.own_data import chosen, of_family, of_images, size_for
from advmoe_deploy.train.recipes import RECIPES, recipe
from advmoe_deploy.train.recipes.by_family import FAMILIES, family_recipe
from advmoe_deploy.train.run.place import require_place

# What the images decide, and a recipe for others cannot say yet.
_OF_IMAGES = ("model.in_channels", "model.mean", "model.std")


@dataclass(frozen=True)
class TrainRequest:
    """A run to be: its configuration, its data, read, its folder, and how it is begun."""

    config: TrainConfig
    data: Dataset
    out: Path
    devices: int
    resume: bool
    overwrite: bool


def train_request(
    name: str,
    out: str | os.PathLike[str] | None = None,
    *,
    data: str | None = None,
    settings: Sequence[str] = (),
    devices: int = 1,
    resume: bool = False,
    overwrite: bool = False,
) -> TrainRequest:
    """Return the run that these arguments ask for; nothing is written and PyTorch is not loaded.

    Args:
        name: a recipe or, for images of one's own, a family of
            :data:`~advmoe_deploy.train.recipes.by_family.FAMILIES`.
        out: the run folder; by default ``runs/`` and the recipe's name.
        data: a data source, or the path of a folder of images.
        settings: changes, each ``key=value``.
        devices: processes that share a batch.
        resume: go on with the run in ``out``.
        overwrite: replace the run in ``out``.

    Raises:
        UsageError: an argument is unknown or makes no sense, or ``out`` is in the way.
        DataError: the data cannot be read.
    """
    given = {key: value for key, _, value in (each.partition("=") for each in settings)}
    base, source = recipe_or_family(name), _source(name, data, given)
    is_own = name in FAMILIES or folder_in(source) is not None
    # Nonsense is refused before any image is read.
    late = _OF_IMAGES if is_own else ()
    early = [each for each in settings if each.partition("=")[0] not in late]
    config = apply_overrides(base, [*early, *([f"data={source}"] if source else ())])
    called = name if name in RECIPES else f"{_stem(source)}-{name}"
    target = Path(out) if out is not None else Path("runs") / called
    if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun's processes find what the first made
        require_place(target, resume=resume, overwrite=overwrite)
    if is_own:
        config, found = _of_own_images(name, base, source, settings, given)
    else:
        found = load_dataset(config.data)
    require_fit(config, found, devices)
    return TrainRequest(config, found, target, devices, resume, overwrite)


def recipe_or_family(name: str) -> TrainConfig:
    """Return the recipe of this name, of a family the one for few images.

    Raises:
        UsageError: nothing is called so; the nearest names are offered.
    """
    if name in RECIPES:
        return recipe(name)
    if name in FAMILIES:
        return family_recipe(name, 0)
    raise unknown_name("recipe", name, [*RECIPES, *FAMILIES])


def _source(name: str, data: str | None, given: Mapping[str, str]) -> str:
    """Return the data source that was named; empty: that of the recipe."""
    if data and "data" in given:
        raise UsageError(f"--data {data} and --set data={given['data']} both name data; give one")
    source = data or given.get("data", "")
    if name in FAMILIES and not source:
        raise UsageError(
            f"{name} alone needs images of your own: pass --data FOLDER, with a folder for each "
            f"class in it, or choose a recipe such as digits-{name}"
        )
    return source


def _stem(source: str) -> str:
    """Return what the data are called in names: the folder, or the data set."""
    folder = folder_in(source)
    return folder[0].resolve().name if folder else source.partition(":")[0]


def _of_own_images(
    name: str, base: TrainConfig, source: str, settings: Sequence[str], given: Mapping[str, str]
) -> tuple[TrainConfig, Dataset]:
    """Return the configuration that fits the images, and the images."""
    seen, decoding = None, None
    if folder := folder_in(source):
        root = folder[0].resolve()
        seen = survey(root)
        own_size = None if name in FAMILIES else base.model.image_size
        size = _size(source, folder[1], given) or own_size or size_for(seen)
        channels = given.get("model.in_channels", "1" if seen.is_grey else "3")
        if channels not in ("1", "3"):
            raise UsageError(f"model.in_channels={channels} is no image's; write 1 or 3")
        decoding = Decoding.of(size, int(channels))
        source = f"folder:{root}?size={size}"
    data = load_dataset(source, decoding)
    choices, told = of_images(data, seen), base.name
    if name in FAMILIES:
        base = family_recipe(name, len(data.train))
        choices += of_family(name, base, data, _stem(source), given)
        told = f"{base.name}: for {len(data.train):,} training images"
    choices = [choice for choice in choices if choice.key not in given]
    config = apply_overrides(base, [*(choice.setting for choice in choices), *settings])
    return config.model_copy(update={"chosen": chosen(data, told, choices)}), data


def _size(source: str, in_source: int | None, given: Mapping[str, str]) -> int | None:
    """Return the image size that was asked for, if one was."""
    asked = given.get("model.image_size")
    if asked is None:
        return in_source
    if in_source not in (None, int(asked)):
        raise UsageError(f"{source} and image size {asked} contradict each other; leave one out")
    return int(asked)
