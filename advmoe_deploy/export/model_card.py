"""Model card of a bundle, for people."""

from typing import TYPE_CHECKING

from advmoe_deploy.bundle import MODEL, EngineSet
from advmoe_deploy.export.passes.report import PassReport, declined
from advmoe_deploy.pruning import Pruning
from advmoe_deploy.reports import Macs, ParityReport
from advmoe_deploy.reports.cautions import of_export
from advmoe_deploy.reports.text import in_markdown
from advmoe_deploy.settings import epsilon_text
from advmoe_deploy.specs import ModelSpec

if TYPE_CHECKING:  # engines are added to a card where there is no PyTorch
    from advmoe_deploy.models.checkpoint import Checkpoint

_ENGINES = "## Other engines and precisions, against the torch model"


def model_card(
    checkpoint: "Checkpoint",
    macs: Macs,
    parity: ParityReport,
    passes: dict[str, tuple[PassReport, ...]],
    engines: tuple[EngineSet, ...] = (),
    pruning: Pruning | None = None,
    denormals: int = 0,
) -> str:
    """Return the model card in Markdown."""
    sections = [
        _title(checkpoint),
        images_section(checkpoint),
        *([_pruning(pruning)] if pruning else []),
        threat_section(checkpoint),
        _metrics(checkpoint),
        macs_section(checkpoint, macs),
        *([f"## Weights\n\n{denormals_note(denormals)}."] if denormals else []),
        _parity(parity),
        *_cautions(macs, parity),
        *([_engines(engines)] if engines else []),
        _passes(passes),
        _LIMITS,
    ]
    return "\n\n".join(sections) + "\n"


def card_with_engines(card: str, engines: tuple[EngineSet, ...]) -> str:
    """Return ``card``, which has a section on engines, with these in their place."""
    before, found, rest = card.partition(f"{_ENGINES}\n")
    _, heading, after = rest.partition("\n## ")
    return f"{before}{_engines(engines)}\n{heading}{after}" if found else card


def denormals_note(count: int) -> str:
    """Return what became of ``count`` weights that were denormal."""
    return (
        f"{count:,} weights decayed to denormal numbers, nearer to 0 than 1.2e-38, and are written "
        "as the zeros that engines take them for; many processors are slow on them"
    )


def _title(checkpoint: "Checkpoint") -> str:
    spec = checkpoint.model
    names = ", ".join(map(in_markdown, checkpoint.class_names))
    shape = ", ".join(str(size) for size in spec.image_shape)
    return (
        f"# {spec.backbone}, {spec.family}\n\n{what_it_is(spec)} `{MODEL}` takes `images`, float32 "
        f"[N, {shape}] in [0, 1] (normalisation is inside), and answers `logits` "
        f"[N, {spec.num_classes}].\n\nClasses: {names}."
    )


def images_section(checkpoint: "Checkpoint") -> str:
    """Return the section on how image files are read for the model."""
    return f"## From image files to `images`\n\n{checkpoint.decoding.description()}"


def what_it_is(spec: ModelSpec) -> str:
    """Return a sentence on the network: what is routed, and where."""
    count, backbone = spec.num_experts, spec.backbone
    if spec.family == "advmoe":
        return (
            f"An AdvMoE {backbone}: a router looks at the image and sends it to one of {count} "
            f"experts of {spec.ratio:g} times the dense width."
        )
    if spec.family == "expert-networks":
        return f"A router looks at the image and sends it to one of {count} whole {backbone}s."
    if spec.family == "dual-model":
        return (
            f"Two mixtures of {count} {backbone}s each, a standard and a robust one; the robust "
            f"one's share in the logits is {spec.alpha:g}."
        )
    if spec.expert_layers is not None:
        where = ", ".join(spec.expert_layers.layers)
        return (
            f"A {backbone} in which each {spec.expert_layers.kind} of {where} is {count} experts; "
            f"its gate sends an image to {spec.top_k} of them."
        )
    if spec.transformer is not None and spec.transformer.moe_blocks:
        where = ", ".join(map(str, spec.transformer.moe_blocks))
        return (
            f"A vision transformer in which the MLP of block {where} is {count} experts; "
            f"each token goes to {spec.top_k} of them."
        )
    return f"A dense {backbone} at {spec.ratio:g} times the full width."


def threat_section(checkpoint: "Checkpoint") -> str:
    """Return the section on what the attacker may do."""
    if checkpoint.threat is None:
        return "## Threat model\n\nNone is declared: do not take this model for a robust one."
    threat = checkpoint.threat
    return (
        f"## Threat model\n\n{threat.norm}, epsilon {epsilon_text(threat.epsilon)} in [0, 1] "
        "pixels."
    )


def _pruning(pruning: Pruning) -> str:
    lines = ["## Experts that were left out\n", *(f"- {line}" for line in pruning.findings())]
    lines += [
        "",
        "Inputs unlike those images, and adversarial ones above all, may be sent elsewhere than in "
        "the whole model and get other answers than its. What was measured in training is the "
        "whole model's; `advmoe verify` attacks and measures this one.",
    ]
    return "\n".join(lines)


def _metrics(checkpoint: "Checkpoint") -> str:
    rows = [f"| {name} | {value:.4g} |" for name, value in checkpoint.metrics.items()]
    table = "\n".join(["| on the hold-out | |", "|---|---|", *rows])
    nothing = "Nothing was measured in training."
    return (
        f"## Measured in training\n\n{table if rows else nothing}\n\n"
        "Run `advmoe verify` for the exported model's own numbers."
    )


def macs_section(checkpoint: "Checkpoint", macs: Macs) -> str:
    """Return the section on multiply-accumulates per image, in millions."""
    rows = {"executed": macs.executed, "dense network of full width": macs.dense}
    if checkpoint.model.num_experts > 1:
        rows = {
            "network with the selected experts": macs.selected,
            "routers": macs.router,
            "executed: both": macs.executed,
            "every expert, then select": macs.unfused,
            "dense network of full width": macs.dense,
            "dense network of this ratio": macs.s_dense,
        }
    lines = [f"| {name} | {value / 1e6:,.2f} M |" for name, value in rows.items()]
    return "\n".join(["## Multiply-accumulates per image\n", "| | |", "|---|---:|", *lines])


def _parity(parity: ParityReport) -> str:
    lines = [
        f"On {parity.images} images of {parity.data}, logits differ from the torch model by at "
        f"most {parity.max_abs_logit_diff:.2g}; relative to the image's largest logit where that "
        f"exceeds 1, by {parity.max_relative_logit_diff:.2g} (limit {parity.logit_tolerance:g})."
    ]
    if parity.layers:
        lines.append(
            f"Routes agree on {100 * parity.route_agreement:.4g} % of the rows whose best scores "
            f"are more than {parity.margin:g} apart; {parity.close_calls} are closer, "
            f"{parity.close_flips} of those flipped.\n\n"
            "| layer | rows per expert |\n|---|---|"
        )
    for layer in parity.layers:
        load = ", ".join(str(count) for count in layer.expert_load)
        lines.append(f"| {layer.layer} | {load} |")
    return "## Parity with the torch model\n\n" + "\n".join(lines)


def _cautions(macs: Macs, parity: ParityReport) -> list[str]:
    lines = [f"- {line}" for line in of_export(macs, parity)]
    return ["\n".join(["## Warnings\n", *lines])] if lines else []


def _engines(engines: tuple[EngineSet, ...]) -> str:
    lines = [f"{_ENGINES}\n"]
    for each in engines:
        name = f"`--engine {each.name}`" if each.is_built else f"graphs for `{each.name}`"
        lines += [f"{name}:\n", *(f"- {line}" for line in each.findings()), ""]
    return "\n".join(lines).rstrip()


def _passes(passes: dict[str, tuple[PassReport, ...]]) -> str:
    lines = []
    for graph, reports in passes.items():
        done = ", ".join(f"{report.name} {report.applied}" for report in reports)
        lines.append(f"- {graph}: {done}")
    lines += [f"- {reason}, {count} times" for reason, count in declined(passes).items()]
    return "\n".join(["## Graph passes, and how often each applied\n", *lines])


_LIMITS = """## Limits

- No capacity limit: every image is answered, whatever else is in its batch, and its answer does \
not depend on the others.
- A route is a hard choice. Where the two best scores are close, another engine or precision may \
choose the other expert.
- Robustness holds for the threat model above and the attacks it was measured with, for no other.
- Hashes in `manifest.json` guard against accident, not against an attacker."""
