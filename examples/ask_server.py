"""Ask a running server about an image file, with the standard library alone.

    advmoe serve BUNDLE &
    python examples/ask_server.py http://127.0.0.1:8000/v2/models/advmoe IMAGE

A model is named after its family. The server turns, crops and scales the picture as it was done in
training. Tensors go to ``/infer`` by the Open Inference Protocol v2, so Triton's client asks too.
"""

import json
import sys
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen


def main(model: str, file: Path) -> None:
    """Print the most probable classes of one image, and the experts that it took."""
    kind = {"Content-Type": "application/octet-stream"}
    try:
        with urlopen(Request(f"{model}/image", file.read_bytes(), kind), timeout=30) as reply:
            answer = json.load(reply)
    except HTTPError as error:
        sys.exit(f"{error.code}: {json.load(error)['error']}")
    except URLError as error:
        sys.exit(f"{model} does not answer ({error.reason}); start 'advmoe serve', or name another")
    for found in answer["top"]:
        print(f"{found['label']}: {found['probability']:.2%}")
    for route in answer["routes"]:
        print(f"experts of {route['layer']}: {route['expert_ids']}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
