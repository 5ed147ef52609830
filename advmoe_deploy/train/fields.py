"""Every setting of a run, with its meaning and its default."""

from typing import Literal

from pydantic import ConfigDict, Field

from advmoe_deploy.specs import Fraction, Frozen, ModelSpec, ThreatModel

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


class Start(Frozen):
    """The model that a run begins with, as it was named and found, and what tells its weights.

    ``new_head`` says that its classes are others, so that the last layer begins at random.
    """

    source: str
    path: str
    weights_sha256: str
    new_head: bool


class TrainFields(Frozen):
    """Everything that decides a run, the data aside: the same value gives the same weights.

    Methods are described in :mod:`~advmoe_deploy.train.step.methods`, losses in
    :mod:`~advmoe_deploy.train.objectives.adversarial`, what acts in training steps only in
    :mod:`~advmoe_deploy.train.objectives.forward`.

    Some remedies against a router that sends everything to one expert are not in AdvMoE's paper,
    and on in our recipes of its method: ``balanced_start``, ``even_loads``,
    ``class_routing_weight``. (The paper's released code prescribes label modulo E instead; here
    the router chooses.) On the digits the paper's objective alone collapses within six epochs, and
    balancing the load alone splits each class at random, which leaves each expert half the data of
    every class.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    name: str
    """Name of the run in reports."""
    data: str
    """Data source: a folder of images by class, NAME or NAME:PATH."""
    model: ModelSpec
    threat: ThreatModel
    method: Method
    """Parameters that learn in each step."""
    loss: Loss = "trades"
    """Loss that is minimised, and the way to its examples."""
    beta: float = Field(6.0, ge=0)
    """Weight of the second term of TRADES and RT-ER."""
    epochs: int = Field(100, ge=1)
    """Passes over the training images."""
    shared_start: float = Field(0.0, ge=0, lt=1)
    """Share of the epochs in which all experts are one, without a router; then each takes up the
    weights so far (sparse upcycling, Komatsuzaki et al., ICLR 2023)."""
    train_images: int | None = Field(None, ge=2)
    """Train on the first so many of the training images only."""
    test_images: int | None = Field(None, ge=1)
    """Test on the first so many of the test images only."""
    batch_size: int = Field(128, ge=2)
    """Images of one optimizer step."""
    accumulate: int = Field(1, ge=1)
    """Parts that a batch is worked through in, for less memory; BatchNorm sees a part at a time."""
    lr: float = Field(0.1, gt=0)
    """Peak learning rate."""
    router_lr: float = Field(MAX_ROUTER_LR, gt=0, le=MAX_ROUTER_LR)
    """Peak learning rate of the router; above 0.01 AdvMoE's scores explode and all images flip
    between experts."""
    router_grad_clip: float = Field(1.0, gt=0)
    """Bound of the norm of the router's gradient."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of the optimizers."""
    weight_decay: float = Field(5e-4, ge=0)
    """Weight decay of the optimizers."""
    schedule: Literal["cosine", "one-cycle"] = "cosine"
    """Course of the learning rates: from their peak, or to it and back."""
    attack_steps: int = Field(2, ge=1)
    """Steps of every attack inside training that has more than one."""
    attack_step_size: Fraction | None = Field(None, gt=0)
    """Step in [0, 1] pixels; by default 2.5 epsilon / attack_steps, epsilon (n-fgsm, free) or
    1.25 epsilon (fast)."""
    attack_noise: float = Field(0.001, ge=0)
    """Deviation of the start of attacks that ascend a divergence; those that ascend the
    cross-entropy start anywhere in the ball."""
    nfgsm_noise: float = Field(2.0, ge=0)
    """k of N-FGSM, whose noise is uniform in k times the ball."""
    free_repeats: int = Field(4, ge=1)
    """m of free adversarial training, which repeats each batch without shortening the run."""
    attack_target: Literal["model", "straight-through"] = "straight-through"
    """Attack inside training; only the gradient of straight-through enters the router."""
    attack_per_step: bool = True
    """Find new examples for the experts' step, as AdvMoE's paper does; without it the router's are
    used again, for about a third less work."""
    attack_in_eval_mode: bool = True
    """Attack the model with its running statistics instead of the batch's."""
    balance_loss: BalanceLoss | None = None
    """Loss for even loads of the experts, added wherever a router learns."""
    balance_weight: float = Field(0.5, gt=0)
    """Weight of balance_loss."""
    gate_noise: float = Field(0.0, ge=0)
    """Deviation of noise on the scores, in training steps only."""
    capacity_factor: float | None = Field(None, gt=0)
    """Rows that an expert takes in a training step, in fair shares; null: any number."""
    capacity_overflow: Literal["reassign", "drop"] = "reassign"
    """Fate of rows above the capacity."""
    router_every: int = Field(1, ge=1)
    """The router takes its step on one of so many batches."""
    random_routes: float = Field(0.0, ge=0, le=1)
    """Share of the images sent to random experts in the experts' step, attacked and clean, so that
    each learns from all kinds, and to move a route moves little else."""
    route_stability: float = Field(0.0, ge=0)
    """Weight of KL(scores || scores under attack) in the router's loss."""
    balanced_start: bool = False
    """Set the router's last bias so that the mean scores of the first batch are equal."""
    even_loads: bool = False
    """Set that bias after every epoch so that the experts get equally many clean images."""
    class_routing_weight: float = Field(0.0, ge=0)
    """Weight of minus the mutual information of class and expert in the router's loss: all images
    of a class to one expert, and as many to each."""
    sparse_ratio: float = Field(0.5, gt=0, le=1)
    """Method sparse prunes to the multiply-accumulates of the S-Dense network of this ratio."""
    sparse_density: float | None = Field(None, gt=0, le=1)
    """Method sparse keeps this share of the weights of each layer instead."""
    crop_padding: int = Field(0, ge=0)
    """Pixels of black around an image before a random crop of its size."""
    flip: bool = False
    """Mirror half of the training images."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of the average of the weights that is evaluated and kept."""
    seed: int = Field(0, ge=0, lt=1 << 64)
    """Seed of weights, order and every random number."""
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true"
    """Number format of the computation; 16-mixed needs a GPU."""
    channels_last: bool = True
    """Lay out images as convolutions on a GPU like best."""
    evaluate_every: int = Field(1, ge=1)
    """Epochs between measurements on the hold-out, of which the best is the result; the last epoch
    is measured too, and the first in which experts part, where a router may collapse."""
    holdout_attack_steps: int = Field(10, ge=1)
    """Steps of PGD on the hold-out."""
    test_attack_steps: int = Field(50, ge=1)
    """Steps of PGD on the test images."""
    test_attack_step_size: Fraction | None = Field(None, gt=0)
    """Their size in [0, 1] pixels; by default 2.5 epsilon / test_attack_steps."""
    track_router_robustness: bool = False
    """Record how routes withstand attacks before and after experts are updated."""
    start: Start | None = None
    """Model whose weights the run begins with; null: random ones."""
    chosen: dict[str, str] = Field(default_factory=dict)
    """Settings chosen from the data and the device, each with its reason; it decides nothing."""

    @property
    def shared_epochs(self) -> int:
        """Epochs that all experts share."""
        return int(self.shared_start * self.epochs + 1e-9)  # 0.6 of 5 is 3

    def evaluates(self, epoch: int) -> bool:
        """Return whether the model is measured on the hold-out after ``epoch``, counted from 1."""
        parts = self.shared_epochs > 0 and epoch == self.shared_epochs + 1
        return parts or epoch == self.epochs or epoch % self.evaluate_every == 0
