"""Run an exported model without this package: ONNX Runtime, numpy and Pillow are enough.

    python examples/plain_onnxruntime.py BUNDLE IMAGE...

Normalisation is part of the graph, which takes float32 images [N, C, H, W] in [0, 1].
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def main(bundle: Path, files: list[Path]) -> None:
    """Print a class, a probability and the experts for each image."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    session = onnxruntime.InferenceSession(
        bundle / "model.onnx", providers=["CPUExecutionProvider"]
    )
    _, channels, height, width = session.get_inputs()[0].shape
    pixels = []
    for file in files:
        with Image.open(file) as image:
            fitted = image.convert("L" if channels == 1 else "RGB").resize((width, height))
        pixels.append(np.asarray(fitted, np.float32).reshape(height, width, channels) / 255)
    images = np.stack(pixels).transpose(0, 3, 1, 2)

    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {"images": images}), strict=True))
    logits = outputs.pop("logits")
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    experts = {name: ids for name, ids in outputs.items() if ids.dtype.kind == "i"}
    for row, file in enumerate(files):
        best = int(shares[row].argmax())
        used = ", ".join(f"{name} {ids[row].tolist()}" for name, ids in experts.items())
        print(f"{file}: {manifest['class_names'][best]} ({shares[row, best]:.1%}); {used}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(file) for file in sys.argv[2:]])
