"""``analyze --dissect``: AdvMoE's dissection of trained runs, and what trains those it lacks."""

import json
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from advmoe_deploy.cli.session import Session
from advmoe_deploy.cli.several.options import TrialOptions
from advmoe_deploy.cli.verdicts.said import listed
from advmoe_deploy.errors import UsageError
from advmoe_deploy.settings import epsilon_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from advmoe_deploy.analysis.redundancy import Withstood
    from advmoe_deploy.analysis.several.dissect import Dissected
    from advmoe_deploy.analysis.several.roles import Needed, Role, Run
    from advmoe_deploy.cli.several.presentation import Presentation
    from advmoe_deploy.specs import Frozen
    from advmoe_deploy.train.config import TrainConfig

REPORT = "dissection.json"
_METHODS = {
    "standard": "joint",
    "robust router": "router-only",
    "robust experts": "experts-only",
    "experts moved": "experts-only",
}


def dissect_runs(options: TrialOptions, ui: Session) -> None:
    """Dissect the runs that were named; those it lacks are named with what trains them."""
    from advmoe_deploy.analysis.several.roles import read_run, roles_of
    from advmoe_deploy.zoo.resolve import resolve

    runs = [read_run(str(path), resolve(path)) for path in options.paths]
    roles = roles_of(runs)
    require_all(roles, runs)

    measured: list[Dissected] = []

    def make() -> "tuple[Frozen, dict[str, str], Presentation]":
        from advmoe_deploy.analysis.several.dissect import dissect
        from advmoe_deploy.cli.several.dissection import shown_dissection

        report = dissect(roles, options.settings(), measured=measured, progress=ui.progress)
        return report, report.versions, shown_dissection(report)

    def found() -> "Mapping[str, Withstood]":
        return {f"{one.role}, {one.run}": one.withstood for one in measured}

    options.write(ui, options.out or Path("dissection"), REPORT, make, measured, found)


def require_all(roles: "Mapping[Role, Sequence[Run]]", runs: "Sequence[Run]") -> None:
    """Refuse a dissection that lacks a run, naming the commands that train what is missing.

    Raises:
        UsageError: a run is missing.
    """
    from advmoe_deploy.analysis.several.roles import BEGINS_WITH, NEEDED

    missing = [role for role in NEEDED if role not in roles]
    if not missing:
        return
    folder = Path(runs[0].name).parent
    places = {role: str(folder / role.replace(" ", "-")) for role in NEEDED}
    places |= {role: roles[role][0].name for role in NEEDED if role in roles}
    commands = []
    for role in missing:
        begun = BEGINS_WITH.get(role)
        options = ["--from", places[begun]] if begun else []
        commands.append(_command(role, runs[0], [*options, "--out", places[role]]))
    names = listed([f"'{role}'" for role in missing])
    plural = "s" if len(missing) > 1 else ""
    raise UsageError(f"the dissection lacks the run{plural} {names}; train: {'; '.join(commands)}")


def _command(role: "Needed", like: "Run", options: list[str]) -> str:
    """Return the command that trains ``role`` for the network and the data of ``like``."""
    from advmoe_deploy.train.recipes import recipe

    name, config = _recipe(role, like)
    changed = _settings(recipe(name).model_dump(mode="json"), config.model_dump(mode="json"), "")
    if role == "standard":  # the others take the network of the run that they begin with
        own = like.checkpoint.model.model_dump(mode="json")
        changed |= _settings(config.model.model_dump(mode="json"), own, "model.")
    data, threat = like.checkpoint.data, like.checkpoint.threat
    alike = ["--data", data] if data and data != config.data else []
    if threat and threat != config.threat:
        alike += ["--epsilon", epsilon_text(threat.epsilon)]
    sets = [part for key, value in changed.items() for part in ("--set", f"{key}={value}")]
    return " ".join(map(quote, ["advmoe", "train", name, *alike, *sets, *options]))


def _recipe(role: "Needed", like: "Run") -> "tuple[str, TrainConfig]":
    """Return the recipe to name, and its configuration once it trains ``role``.

    One that trains just that if there is one for these data, else one to change.
    """
    from advmoe_deploy.train.recipes import RECIPES, recipe
    from advmoe_deploy.train.recipes.dissection import on_clean_images, only_experts, only_router

    spec, data = like.checkpoint.model, like.checkpoint.data.partition(":")[0]
    alike = [
        (name, config) for name in RECIPES if (config := recipe(name)).model.family == spec.family
    ]
    alike.sort(key=lambda one: (one[1].data != data, one[1].model.backbone != spec.backbone))
    for name, config in alike:
        exactly = (config.data, config.model.backbone) == (data, spec.backbone)
        clean = config.loss == "standard"
        if exactly and (config.method, clean) == (_METHODS[role], role == "standard"):
            return name, config
    name, base = next(
        (name, config)
        for name, config in alike
        if config.loss != "standard" and not config.method.endswith("-only")
    )
    make = {"joint": on_clean_images, "router-only": only_router, "experts-only": only_experts}
    return name, make[_METHODS[role]](base, name=base.name)


def _settings(
    before: "Mapping[str, object]", after: "Mapping[str, object]", prefix: str
) -> dict[str, str]:
    """Return what ``--set`` has to say so that ``before`` becomes ``after``, the network aside."""
    return {
        f"{prefix}{key}": value if isinstance(value, str) else json.dumps(value)
        for key, value in after.items()
        if value != before[key] and key != "model"
    }
