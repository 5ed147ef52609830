"""Methods: which parameters learn in which step, one after the other on each batch.

advmoe              a router step, then an expert step, both on the model's loss
advmoe-released     the same with the released code's loss for the router
router-only         the router's parameters, experts as they were initialised, or as --from has them
experts-only        the experts' parameters, router as it was initialised, or as --from has it
joint               all parameters in one step: AT dense, AT S-Dense, AT MoE, Robust Experts, V-MoE
sparse              dense, then which weights to keep, then those: see sparse.py
rt-er               all parameters of expert networks
jtdmoe              the robust mixture, then the standard one behind the robust one
"""

from collections.abc import Callable, Container
from dataclasses import dataclass, replace
from functools import partial

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from advmoe_deploy.models.base import Classifier, is_router_parameter
from advmoe_deploy.models.families.dual import ROBUST, STANDARD, DualModel
from advmoe_deploy.models.routing.routing import Surrogate
from advmoe_deploy.train.config import TrainConfig
from advmoe_deploy.train.objectives.adversarial import (
    Standard,
    TrainingObjective,
    ascent_of,
    objective_of,
)
from advmoe_deploy.train.objectives.expert_losses import standard_phase_logits
from advmoe_deploy.train.objectives.experts import JtdMoe, RtEr
from advmoe_deploy.train.objectives.forward import RoutedForward
from advmoe_deploy.train.objectives.released import LabelParity

Named = dict[str, nn.Parameter]
ROUTER, EXPERTS, SCORES = "router", "experts", "scores"


@dataclass(frozen=True)
class Phase:
    """One step: which groups of parameters it moves, and what it minimises.

    ``model`` is the classifier that is attacked and trained, all or a part of the run's model;
    ``call`` runs it in the loss, maybe with what stands beside it. ``surrogate`` is that of the
    loss, ``attack_surrogate`` that of the attack. ``finds`` says whether the step finds its own
    examples or takes those of the phase before. ``routes_learn`` adds the terms for routers.
    The step is taken on one of ``every`` so many batches; this share of the images takes
    ``random_routes`` in it.
    """

    name: str
    groups: tuple[str, ...]
    objective: TrainingObjective
    model: Classifier
    call: RoutedForward
    surrogate: Surrogate | None
    attack_surrogate: Surrogate | None
    finds: bool = True
    routes_learn: bool = False
    every: int = 1
    random_routes: float = 0.0


def is_router_group(group: str) -> bool:
    """Return whether the parameters of ``group`` are those of routers."""
    return group.endswith(ROUTER)


def groups_of(model: Classifier) -> dict[str, Named]:
    """Return the parameters that learn, by group and by name.

    Groups are ``router`` and ``experts``, the latter everything else; of a dual model those of
    each mixture, such as ``robust.router``.
    """
    groups: dict[str, Named] = {}
    for name, parameter in model.named_parameters():
        group = ROUTER if is_router_parameter(name) else EXPERTS
        if isinstance(model, DualModel):
            group = f"{name.partition('.')[0]}.{group}"
        groups.setdefault(group, {})[name] = parameter
    return groups


def still(model: Classifier, learning: Container[str]) -> None:
    """Hold the BatchNorms of which no parameter is ``learning``, by name, at what they have seen.

    Those of a trained model that no step is to move would else drift with the batches.
    """
    for prefix, module in model.named_modules():
        own = [f"{prefix}.{name}" for name, _ in module.named_parameters(recurse=False)]
        if isinstance(module, _BatchNorm) and not any(name in learning for name in own):
            module.eval()


def phases_of(config: TrainConfig, model: Classifier) -> tuple[Phase, ...]:
    """Return the steps of ``config.method`` on each batch; of ``sparse``, those of its weights."""
    groups = tuple(groups_of(model))
    whole = partial(_phase, config, model, objective_of(config))
    match config.method:
        case "advmoe":
            router = whole(ROUTER, (ROUTER,))
            experts = whole(EXPERTS, (EXPERTS,), finds=config.attack_per_step)
            return (
                replace(router, every=config.router_every),
                replace(experts, random_routes=config.random_routes),
            )
        case "advmoe-released":
            return _released(config, model)
        case "router-only":
            return (whole(ROUTER, tuple(g for g in groups if is_router_group(g))),)
        case "experts-only":
            return (whole(EXPERTS, tuple(g for g in groups if not is_router_group(g))),)
        case "joint" | "sparse":
            return (whole(" and ".join(groups), groups),)
        case "rt-er":
            objective = RtEr(ascent_of(config), config.beta)
            return (_phase(config, model, objective, " and ".join(groups), groups),)
        case "jtdmoe":
            assert isinstance(model, DualModel)
            return _dual(config, model, groups)


def _phase(
    config: TrainConfig,
    model: Classifier,
    objective: TrainingObjective,
    name: str,
    groups: tuple[str, ...],
    *,
    call: RoutedForward | None = None,
    finds: bool = True,
) -> Phase:
    learns = any(is_router_group(group) for group in groups)
    through_router = config.attack_target == "straight-through"
    return Phase(
        name=name,
        groups=groups,
        objective=objective,
        model=model,
        call=call or model,
        surrogate="probability" if learns else None,
        attack_surrogate="probability" if through_router else None,
        finds=finds,
        routes_learn=learns,
    )


def _released(config: TrainConfig, model: Classifier) -> tuple[Phase, ...]:
    """Return the released code's steps: hard routes pass the gradient of the raw score."""
    parts: list[tuple[str, TrainingObjective, bool]] = [
        (ROUTER, LabelParity(ascent_of(config), config.beta), True),
        (EXPERTS, objective_of(config), config.attack_per_step),
    ]
    return tuple(
        Phase(
            name=name,
            groups=(name,),
            objective=objective,
            model=model,
            call=model,
            surrogate="score",
            attack_surrogate="score" if config.attack_target == "straight-through" else None,
            finds=finds,
        )
        for name, objective, finds in parts
    )


def _dual(config: TrainConfig, model: DualModel, groups: tuple[str, ...]) -> tuple[Phase, ...]:
    def of(mixture: str) -> tuple[str, ...]:
        return tuple(group for group in groups if group.startswith(mixture))

    every = JtdMoe(ascent_of(config), config.beta)
    behind: Callable[..., object] = partial(standard_phase_logits, model)
    return (
        _phase(config, model.robust, every, ROBUST, of(ROBUST)),
        _phase(config, model.standard, Standard(), STANDARD, of(STANDARD), call=behind),  # type: ignore[arg-type]
    )
