"""Request of a training: what can be refused is refused here, before PyTorch is loaded."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote

from advmoe_deploy.data.dataset import Dataset
from advmoe_deploy.data.folder import Survey, survey
from advmoe_deploy.data.registry import folder_in, load_dataset
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import UsageError, unknown_name
from advmoe_deploy.train.config import Configure, TrainConfig, apply_overrides
from advmoe_deploy.train.fit import require_fit
from advmoe_deploy.train.origin import Origin, origin_of
from advmoe_deploy.train.own_data import chosen, of_family, of_images, of_origin, size_for
from advmoe_deploy.train.recipes import RECIPES, recipe
from advmoe_deploy.train.recipes.by_family import FAMILIES, family_recipe
from advmoe_deploy.train.run.data import RunData
from advmoe_deploy.train.run.place import require_place, require_same

# What the images decide, and a recipe for others cannot say yet.
_OF_IMAGES = ("model.in_channels", "model.mean", "model.std")


@dataclass(frozen=True)
class TrainRequest:
    """A run to be: its configuration, its data, read, its folder, and how it is begun.

    ``configure`` chooses anew, where settings were chosen for the images, what depends on others.
    """

    config: TrainConfig
    configure: Configure
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
    start: tuple[str, Path] | None = None,
    takes_out: bool = True,
    require: Callable[[TrainConfig], object] | None = None,
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
        start: the model whose weights to begin with, as it was named and where it lies.
        takes_out: whether one run will lie in ``out`` itself, which must not be in the way then.
        require: refuses configurations; asked before any image is read, of what is known then.

    Raises:
        UsageError: an argument is unknown or makes no sense, ``out`` is in the way or among the
            images, the run to go on with has other settings or data, or the model to begin with
            lies in what would be replaced.
        InputError: the data, or the model to begin with, cannot be read.
    """
    given = {key: value for key, _, value in (each.partition("=") for each in settings)}
    base, source = recipe_or_family(name), _source(name, data, given)
    origin = origin_of(*start) if start else None
    if origin:
        origin.require_agreement(given)
        base = origin.applied_to(base)
    is_own = origin is not None or name in FAMILIES or folder_in(source) is not None
    # Nonsense is refused before any image is read.
    late = _OF_IMAGES if is_own else ()
    early = [each for each in settings if each.partition("=")[0] not in late]
    config = apply_overrides(base, [*early, *([f"data={source}"] if source else ())])
    if require:
        require(config)
    called = name if name in RECIPES else f"{_stem(source)}-{name}"
    target = Path(out) if out is not None else Path("runs") / called
    if origin and overwrite and not resume:
        _require_apart(origin, target)
    # The processes of torchrun find what the first of them made.
    if takes_out and "TORCHELASTIC_RUN_ID" not in os.environ:
        require_place(target, resume=resume, overwrite=overwrite)
    if is_own:
        asked = _Asked(name, base, source or base.data, tuple(settings), given, config, origin)
        found, seen = _images(asked)
        configure: Configure = partial(_chosen_for, asked, found, seen)
        config = configure(())
    else:
        found, configure = load_dataset(config.data), partial(apply_overrides, config)
    require_fit(config, found, devices)
    if takes_out:
        require_outside(target, found)
    if resume:
        kept = config.model_copy(update={"data": found.source})
        require_same(target, kept, RunData.of(found))
    return TrainRequest(config, configure, found, target, devices, resume, overwrite)


def recipe_or_family(name: str) -> TrainConfig:
    """Return the recipe of this name, of a family the one for few images.

    Raises:
        UsageError: nothing is called so; the nearest names are offered.
    """
    if name in RECIPES:
        return recipe(name)
    if name in FAMILIES:
        return family_recipe(name, 0)
    if Path(name).is_dir():
        raise UsageError(
            f"'{name}' is a folder, where a recipe is expected; to train on its images: "
            f"advmoe train advmoe --data {quote(name)}"
        )
    raise unknown_name("recipe", name, [*RECIPES, *FAMILIES], listed_by="advmoe list recipes")


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


def _require_apart(origin: Origin, target: Path) -> None:
    """Refuse to replace the model that a run is to begin with."""
    if origin.path.resolve().is_relative_to(os.path.realpath(target)):  # of a circle that is itself
        raise UsageError(
            f"--from {origin.source} lies in {target}, which would be replaced; choose another "
            "--out"
        )


def require_outside(target: Path, data: Dataset) -> None:
    """Refuse a run beside the class folders of its data, one of which it would be from then on.

    Raises:
        UsageError: ``target`` lies there.
    """
    folder = folder_in(data.source)
    above = Path(os.path.realpath(target)).parents if folder else ()
    for place in (each for each in above if folder and each.is_relative_to(folder[0])):
        if all((place / name).is_dir() for name in data.class_names):
            raise UsageError(
                f"{target} lies beside the classes of {place}, and would be taken for one of them; "
                "choose another --out"
            )


def _stem(source: str) -> str:
    """Return what the data are called in names: the folder, or the data set."""
    folder = folder_in(source)
    return Path(os.path.realpath(folder[0])).name if folder else source.partition(":")[0]


@dataclass(frozen=True)
class _Asked:
    """Request of a run before its images are known; ``early`` holds what was said, validated."""

    name: str
    base: TrainConfig
    source: str
    settings: tuple[str, ...]
    given: Mapping[str, str]
    early: TrainConfig
    origin: Origin | None


def _chosen_for(
    asked: _Asked, data: Dataset, seen: Survey | None, more: Sequence[str]
) -> TrainConfig:
    """Return the configuration that fits the images, with the settings ``more`` as well."""
    given = {**asked.given} | {
        key: value for key, _, value in (each.partition("=") for each in more)
    }
    early = apply_overrides(asked.early, more)
    train, test = data.train.first(early.train_images), data.test.first(early.test_images)
    data = replace(data, train=train, test=test)
    base, choices = asked.base, of_images(data, seen)
    told = base.name
    if asked.name in FAMILIES:
        base = family_recipe(asked.name, len(data.train))
        told = f"{base.name}: for {len(data.train):,} training images"
        choices += of_family(asked.name, early, data, _stem(asked.source), given)
    if asked.origin:
        begun = asked.origin.start(data.class_names)
        base = asked.origin.applied_to(base).model_copy(update={"start": begun})
        choices = of_origin(choices, base, is_family=asked.name in FAMILIES)
    choices = [choice for choice in choices if choice.key not in given]
    config = apply_overrides(base, [*(each.setting for each in choices), *asked.settings, *more])
    words = chosen(data, told, choices, config.start)
    return config.model_copy(update={"chosen": words})


def _images(asked: _Asked) -> tuple[Dataset, Survey | None]:
    """Return the images, and what a folder of them is like."""
    folder, decoding, seen, source = folder_in(asked.source), None, None, asked.source
    spec = asked.origin.spec if asked.origin else None
    if folder:
        root = Path(os.path.realpath(folder[0]))  # a link in a circle is said later
        seen = survey(root)
        own_size = None if asked.name in FAMILIES and not spec else asked.base.model.image_size
        size = _size(asked, folder[1]) or own_size or size_for(seen)
        usual = spec.in_channels if spec else 1 if seen.is_grey else 3
        channels = asked.given.get("model.in_channels", str(usual))
        if channels not in ("1", "3"):
            raise UsageError(f"model.in_channels={channels} is no image's; write 1 or 3")
        decoding = Decoding.of(size, int(channels))
        source = f"folder:{root}?size={size}"
    return load_dataset(source, decoding), seen


def _size(asked: _Asked, in_source: int | None) -> int | None:
    """Return the image size that was asked for, if one was."""
    if "model.image_size" not in asked.given:
        return in_source
    size = asked.early.model.image_size
    if in_source not in (None, size):
        raise UsageError(
            f"{asked.source} and image size {size} contradict each other; leave one out"
        )
    return size
