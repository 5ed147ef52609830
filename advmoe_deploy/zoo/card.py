"""Model card of a model of the zoo, written from its checkpoint and its record."""

from typing import TYPE_CHECKING

from advmoe_deploy.export.model_card import (
    images_section,
    macs_section,
    threat_section,
    what_it_is,
)
from advmoe_deploy.reports.text import in_markdown
from advmoe_deploy.settings import epsilon_text
from advmoe_deploy.zoo.record import Evaluation, ModelRecord, Share

if TYPE_CHECKING:
    from advmoe_deploy.models.checkpoint import Checkpoint

_CIFAR = (
    "a labelled part of 80 Million Tiny Images (A. Krizhevsky, 2009), whose authors state no "
    "licence; the photographs were collected from the web"
)
_IMAGENET = "photographs of others, under ImageNet's terms: research and education, not commerce"
# What is said of the data that a model learned from, which its weights' licence does not change.
_DATA_NOTES = {
    "digits": "handwritten digits of E. Alpaydin and C. Kaynak, UCI (1998), CC BY 4.0",
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
    "tiny-imagenet": _IMAGENET,
    "imagenet": _IMAGENET,
}


def run_card(name: str, checkpoint: "Checkpoint", record: ModelRecord) -> str:
    """Return the card in Markdown: what it is, what it reaches, and what it is not for."""
    sections = [
        _title(name, checkpoint),
        _usage(name),
        images_section(checkpoint),
        threat_section(checkpoint),
        _measured(checkpoint, record),
        macs_section(checkpoint, record.macs),
        _weights(checkpoint, record),
        _training(checkpoint, record),
        _licence(record),
        _intended(checkpoint),
        _limits(checkpoint),
    ]
    return "\n\n".join(sections) + "\n"


def accuracy(share: Share) -> str:
    """Return a share in percent, with its interval and n."""
    low, high = 100 * share.low, 100 * share.high
    return f"{100 * share.value:.1f} % ({low:.1f} to {high:.1f} %, n = {share.n})"


def _title(name: str, checkpoint: "Checkpoint") -> str:
    return (
        f"# {name}\n\n{what_it_is(checkpoint.model)}\n\n"
        f"Classes: {', '.join(map(in_markdown, checkpoint.class_names))}."
    )


def _usage(name: str) -> str:
    return (
        f"## Use\n\nWith advmoe-deploy, SOURCE being `zoo:{name}`, `hub:USER/{name}` or a folder:"
        "\n\n"
        "    advmoe export SOURCE --format onnx\n\n"
        "or, in Python, `advmoe_deploy.load_model(SOURCE)`: a torch module from images "
        "[N, C, H, W] in [0, 1] to logits."
    )


def _measured(checkpoint: "Checkpoint", record: ModelRecord) -> str:
    tables = [_evaluation(each, checkpoint.weights_sha256) for each in record.evaluations]
    if not tables:
        rows = [f"| {name} | {value:.4g} |" for name, value in checkpoint.metrics.items()]
        of = ", float32 weights" if record.rounding else ""
        tables = ["\n".join([f"| on the hold-out, in training{of} | |", "|---|---|", *rows])]
        if not rows:
            tables = ["Nothing was measured: do not take this model for a robust one."]
    return "\n\n".join(["## Measured", *tables])


def _evaluation(measured: Evaluation, stored: str) -> str:
    threat = measured.threat
    radius = f"{threat.norm}, epsilon {epsilon_text(threat.epsilon)}"
    of = {"": "", stored: ", on the weights that are here"}.get(
        measured.weights, ", on the float32 weights"
    )
    lines = [
        f"By `{measured.by}` on test images of {measured.data}, {radius}{of}; 95 % intervals:\n",
        "| | accuracy |",
        "|---|---|",
        f"| clean | {accuracy(measured.clean)} |",
        f"| robust: {measured.attack_words} | {accuracy(measured.robust)} |",
        "\nAttacks, each on what withstood those before it, and what stands after it:\n",
        "| attack | standing |",
        "|---|---|",
        *(f"| {step.title} | {100 * step.standing:.1f} % |" for step in measured.attacks),
    ]
    return "\n".join(lines)


def _weights(checkpoint: "Checkpoint", record: ModelRecord) -> str:
    how = record.rounding.sentence() if record.rounding else "As they were trained."
    return (
        f"## Weights\n\nsafetensors, one copy of each; loading makes float32 of them. {how}\n\n"
        f"SHA-256 `{checkpoint.weights_sha256}`"
    )


def _training(checkpoint: "Checkpoint", record: ModelRecord) -> str:
    recipe, provenance = checkpoint.recipe, checkpoint.provenance
    known = {
        "recipe": recipe.get("name"),
        "data": record.data,
        "epochs": recipe.get("epochs"),
        "seed": provenance.get("seed", recipe.get("seed")),
        "loss": recipe.get("loss"),
        "versions": ", ".join(f"{k} {v}" for k, v in provenance.get("versions", {}).items()),
    }
    rows = [f"| {name} | {value} |" for name, value in known.items() if value not in (None, "")]
    nothing = "Nothing is known of it."
    return "## Training\n\n" + ("\n".join(["| | |", "|---|---|", *rows]) if rows else nothing)


def _licence(record: ModelRecord) -> str:
    weights = record.licence or "none is stated; ask whoever gave it to you"
    note = _DATA_NOTES.get(record.data)
    data = f"\n- data ({record.data}): {note}." if note else ""
    return f"## Licence\n\n- weights: {weights}.{data}"


def _intended(checkpoint: "Checkpoint") -> str:
    size = checkpoint.model.image_size
    return (
        "## Intended use\n\nResearch on robust classifiers, trying advmoe-deploy, and a baseline "
        f"to compare with. It knows its {checkpoint.model.num_classes} classes at {size} x {size} "
        "pixels, and calls everything else one of them. It is not meant for decisions on people, "
        "nor for safety without measurements on your own images."
    )


def _limits(checkpoint: "Checkpoint") -> str:
    lines = [
        "Robustness is measured, not proved: it holds for the threat model above and the attacks "
        "that are listed. Other norms, larger changes, blur, weather or patches are not covered.",
        "An adversary with more steps, restarts or a new attack may do better; "
        "`advmoe verify --attacks full` tries harder.",
        "The classes are as rare or as frequent as in the data it learned from, and so are its "
        "mistakes.",
    ]
    if checkpoint.model.num_experts > 1:
        lines.append(
            "A route is a hard choice: where the two best scores are close, another engine or "
            "precision may choose the other expert."
        )
    return "\n".join(["## Limits\n", *(f"- {line}" for line in lines)])
