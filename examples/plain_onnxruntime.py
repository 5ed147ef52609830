"""Run an exported model without this package: ONNX Runtime, numpy and Pillow are enough.

    python examples/plain_onnxruntime.py BUNDLE IMAGE...

Normalisation is part of the graph, which takes float32 images [N, C, H, W] in [0, 1]. How files
become such images stands under "decoding" in the bundle's manifest.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read on import; else an id is left in the home folder
import onnxruntime


def pixels_of(file: Path, decoding: dict[str, Any]) -> np.ndarray:
    """Return the image in ``file`` as the model takes it, float32 [C, H, W] in [0, 1]."""
    if decoding["rule"] != 1:
        sys.exit(f"images are decoded by rule {decoding['rule']}, this program knows rule 1")
    size, channels = decoding["size"], decoding["channels"]
    with Image.open(file, formats=decoding["formats"]) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith(("I", "F")):  # above 8 bits, where Pillow's convert() clips
            if opened.format != "PNG":
                sys.exit(f"{file}: save it as a PNG, whose 16 bits have a known range")
            image = Image.fromarray(((np.asarray(image, int) + 128) // 257).astype(np.uint8))
    image = image.convert("RGB").convert("L" if channels == 1 else "RGB")
    if image.size != (size, size):
        side = min(image.size) * size / decoding["shorter_side"]
        left, top = ((length - side) / 2 for length in image.size)
        square = (left, top, left + side, top + side)
        image = image.resize((size, size), Image.Resampling.BILINEAR, square)
    return np.asarray(image, np.float32).reshape(size, size, channels).transpose(2, 0, 1) / 255


def main(bundle: Path, files: list[Path]) -> None:
    """Print a class, a probability and the experts for each image."""
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    images = np.stack([pixels_of(file, manifest["decoding"]) for file in files])
    session = onnxruntime.InferenceSession(bundle / "model.onnx")
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {"images": images}), strict=True))
    logits = outputs.pop("logits")
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    experts = {name: ids for name, ids in outputs.items() if ids.dtype.kind == "i"}
    for row, (file, best) in enumerate(zip(files, shares.argmax(axis=1), strict=True)):
        used = ", ".join(f"{name} {ids[row].tolist()}" for name, ids in experts.items())
        print(f"{file}: {manifest['class_names'][best]} ({shares[row, best]:.1%}); {used}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(file) for file in sys.argv[2:]])
