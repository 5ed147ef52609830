"""Ask a running server, with the standard library alone.

    advmoe serve BUNDLE &
    python examples/ask_server.py http://127.0.0.1:8000/v2/models/advmoe IMAGE

A model is named after its family. A picture that is not square should be cropped first.

The protocol is the Open Inference Protocol v2, so Triton's client works as well.
"""

import json
import sys
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from PIL import Image


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """Return the answer to a GET, or to a POST of ``body``, both JSON."""
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=30) as answer:
        return json.load(answer)


def main(model: str, file: Path) -> None:
    """Print each tensor of the model's answer for one image."""
    (wanted,) = ask(model)["inputs"]
    _, channels, height, width = wanted["shape"]
    with Image.open(file) as image:
        bands = image.convert("L" if channels == 1 else "RGB").resize((width, height)).split()
    pixels = [value / 255 for band in bands for value in band.tobytes()]
    tensor = {**wanted, "shape": [1, channels, height, width], "data": pixels}
    answer = ask(f"{model}/infer", {"inputs": [tensor]})
    for output in answer["outputs"]:
        print(output["name"], output["shape"], output["data"])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
