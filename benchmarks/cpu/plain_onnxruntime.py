"""Run a model in plain ONNX Runtime, without advmoe-deploy: what any user of the file has.

    python plain_onnxruntime.py MODEL.onnx IMAGES.npy ANSWERS.npz [LIBRARY]

Needs numpy and onnxruntime only, of whatever version. Answers hold every output of the model by
name. Given the library of the custom operators, they run as kernels, else as their bodies.
"""

import sys

import numpy as np
import onnxruntime


def main() -> None:
    """Answer all images, 250 at a time."""
    model, images, answers, *library = sys.argv[1:]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(library[0])
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    pixels = np.load(images)
    parts = [session.run(None, {"images": pixels[i : i + 250]}) for i in range(0, len(pixels), 250)]
    outputs = (np.concatenate(values) for values in zip(*parts))  # noqa: B905
    np.savez(answers, **dict(zip(names, outputs)))  # noqa: B905
    print(onnxruntime.__version__)


if __name__ == "__main__":
    main()
