"""Train a small robust model on handwritten digits, export it, check it, and classify with it.

    python examples/train_export_predict.py OUT [KEY=VALUE...]

Two minutes on two cores; with epochs=1 it is quick and learns little. The same by commands: advmoe
train, export, verify.
"""

import sys
from pathlib import Path

import advmoe_deploy as advmoe
from advmoe_deploy.data.dataset import to_float
from advmoe_deploy.data.registry import load_dataset


def main(out: Path, settings: list[str]) -> None:
    """Write a run and a bundle into ``out`` and print what they reach."""
    report = advmoe.train("digits-advmoe", out / "run", settings=["epochs=15", *settings])
    print(f"clean {report.clean_accuracy:.1%}, under attack {report.robust_accuracy:.1%}")

    bundle = advmoe.export(out / "run", out / "bundle")
    survived = advmoe.verify(bundle, images=100)
    print(f"after the export, under more attacks: {survived.robust_accuracy.engine:.1%}")

    digits = load_dataset("digits").test  # or your own images, float32 [N, C, H, W] in [0, 1]
    images = to_float(digits.images[:5])
    with advmoe.open_runner(bundle) as runner:
        prediction = runner.infer(images)
    (experts,) = prediction.expert_ids.values()  # AdvMoE routes an image once, for all layers
    for truth, logits, expert in zip(digits.labels, prediction.logits, experts, strict=False):
        name = bundle.manifest.class_names[int(logits.argmax())]
        print(f"digit {truth} is called {name} by expert {expert[0]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
