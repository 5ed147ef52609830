"""Every setting of a run, with its meaning and its default."""

from typing import Literal

from pydantic import ConfigDict, Field

from advmoe_deploy.specs import Frozen, ModelSpec, Pixels, ThreatModel

Method = Literal[
    "advmoe",
    "advmoe-released",
    "router-only",
    "experts-only",
    "joint",
    "sparse",
    "rt-er",
    "jtdmoe",
]
Loss = Literal["trades", "pgd-at", "n-fgsm", "fast", "free", "standard"]
BalanceLoss = Literal[
    "switch",
    "entropy",
    "column-entropy",
    "variance",
    "importance",
    "load",
    "importance-load",
]

MAX_ROUTER_LR = 0.01


class TrainFields(Frozen):
    """Everything that decides a run, the data aside: the same value gives the same weights.

    ``method`` says which parameters learn in which step (:mod:`~advmoe_deploy.train.step.methods`),
    ``loss`` how examples are found and what is minimised on them
    (:mod:`~advmoe_deploy.train.objectives.adversarial`). ``beta`` weighs the second term of TRADES
    and RT-ER.

    ``router_lr`` is a peak like ``lr``, and bounded: at 0.1 the scores of AdvMoE's router explode
    and all images flip between experts. ``router_grad_clip`` bounds the norm of its gradient.

    ``attack_steps`` are those of every attack with more than one; ``attack_noise`` is the deviation
    of the start of those that ascend a divergence, while those that ascend the cross-entropy start
    anywhere in the ball. ``attack_step_size`` in [0, 1] pixels is by default 2.5 * epsilon / steps,
    epsilon (``n-fgsm``, ``free``) or 1.25 * epsilon (``fast``). ``nfgsm_noise`` is N-FGSM's k,
    ``free_repeats`` the m of free adversarial training, which repeats each batch without shortening
    the run.
    ``attack_target`` says whether the gradient of the attack inside training enters the router.
    ``attack_per_step`` finds new examples for the expert step, as the paper does; without it the
    router's are used again, for about a third less work. ``attack_in_eval_mode`` attacks the
    model with its running statistics instead of the batch's.

    ``shared_start`` is the share of the epochs in which all experts are one, without a router;
    then each takes up the weights so far (sparse upcycling, Komatsuzaki et al., ICLR 2023).

    ``train_images`` trains on the first so many of the training images only, ``test_images`` tests
    on the first so many of the test images. ``batch_size`` images make one optimizer step.
    ``accumulate`` works through them in so many parts, for less memory; BatchNorm then sees a part
    at a time.
    ``ema_decay`` averages the weights that are evaluated and kept.

    ``balance_loss`` times ``balance_weight`` is added wherever a router learns; ``gate_noise``,
    ``capacity_factor`` and ``capacity_overflow`` act in training steps only, never in attacks or
    measurements (:mod:`~advmoe_deploy.train.objectives.forward`).

    ``random_routes`` sends this share of the images to random experts in the experts' step,
    attacked and clean: each expert then learns from all kinds of images, and whoever moves a route
    moves little else. ``route_stability`` times KL(scores || scores under attack) is added to the
    router's loss. The router takes its step on one of ``router_every`` batches.

    Some remedies against a router that sends everything to one expert are not in AdvMoE's paper,
    and on in our recipes of its method. ``balanced_start`` sets the router's last bias so that the
    mean scores of the first batch are equal; ``even_loads`` sets it after every epoch so that the
    experts get equally many of the clean training images. ``class_routing_weight`` adds to the
    router's loss minus the mutual information of class and expert, on clean images and on those
    that attack the router: all images of a class to one expert, and as many to each. (The paper's
    released code prescribes label modulo E instead; here the router chooses.) On the digits the
    paper's objective alone collapses within six epochs, and balancing the load alone splits each
    class at random, which leaves each expert half the data of every class.

    Method ``sparse`` prunes to the multiply-accumulates of the S-Dense network of ``sparse_ratio``,
    or to ``sparse_density`` of the weights of each layer where that is set.
    ``track_router_robustness`` records how the routes withstand attacks before and after experts
    are updated (:mod:`~advmoe_deploy.train.run.router_robustness`).

    ``chosen`` says what was chosen from the data and the device, and why; it decides nothing.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    name: str
    data: str
    model: ModelSpec
    threat: ThreatModel
    method: Method
    loss: Loss = "trades"
    beta: float = Field(6.0, ge=0)
    epochs: int = Field(100, ge=1)
    shared_start: float = Field(0.0, ge=0, lt=1)
    train_images: int | None = Field(None, ge=2)
    test_images: int | None = Field(None, ge=1)
    batch_size: int = Field(128, ge=2)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(0.1, gt=0)
    router_lr: float = Field(MAX_ROUTER_LR, gt=0, le=MAX_ROUTER_LR)
    router_grad_clip: float = Field(1.0, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    schedule: Literal["cosine", "one-cycle"] = "cosine"
    attack_steps: int = Field(2, ge=1)
    attack_step_size: Pixels | None = Field(None, gt=0)
    attack_noise: float = Field(0.001, ge=0)
    nfgsm_noise: float = Field(2.0, ge=0)
    free_repeats: int = Field(4, ge=1)
    attack_target: Literal["model", "straight-through"] = "straight-through"
    attack_per_step: bool = True
    attack_in_eval_mode: bool = True
    balance_loss: BalanceLoss | None = None
    balance_weight: float = Field(0.5, gt=0)
    gate_noise: float = Field(0.0, ge=0)
    capacity_factor: float | None = Field(None, gt=0)
    capacity_overflow: Literal["reassign", "drop"] = "reassign"
    router_every: int = Field(1, ge=1)
    random_routes: float = Field(0.0, ge=0, le=1)
    route_stability: float = Field(0.0, ge=0)
    balanced_start: bool = False
    even_loads: bool = False
    class_routing_weight: float = Field(0.0, ge=0)
    sparse_ratio: float = Field(0.5, gt=0, le=1)
    sparse_density: float | None = Field(None, gt=0, le=1)
    crop_padding: int = Field(0, ge=0)
    flip: bool = False
    ema_decay: float | None = Field(None, gt=0, lt=1)
    seed: int = Field(0, ge=0)
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    channels_last: bool = True
    evaluate_every: int = Field(1, ge=1)
    holdout_attack_steps: int = Field(10, ge=1)
    test_attack_steps: int = Field(50, ge=1)
    track_router_robustness: bool = False
    chosen: dict[str, str] = Field(default_factory=dict)

    @property
    def shared_epochs(self) -> int:
        """Epochs that all experts share."""
        return int(self.shared_start * self.epochs + 1e-9)  # 0.6 of 5 is 3
