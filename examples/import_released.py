"""Bring in a checkpoint that a paper's released code wrote, and export it.

    python examples/import_released.py FILE advmoe|robust-experts|dual-model OUT [KEY=VALUE...]

Nothing in FILE is run. What names and shapes cannot tell is said, as in image_size=64 top_k=2.
The same by commands: advmoe import, advmoe export.
"""

import sys
from pathlib import Path

import advmoe_deploy as advmoe


def main(file: Path, source: str, out: Path, settings: list[str]) -> None:
    """Write a run and a bundle into ``out`` and print what the file held."""
    run = advmoe.import_checkpoint(file, source, out / "run", settings=settings)
    spec = run.model
    print(f"{spec.family}: {spec.num_experts} experts, {spec.num_classes} classes")
    for what in ("unwrapped", "left_out", "normalisation"):
        print(f"{what}:", ", ".join(run.provenance[what]) or "nothing")

    # Parity is checked on images; random ones do where the paper's data are not at hand.
    bundle = advmoe.export(out / "run", out / "bundle", data="random:64")
    print("exported to", bundle.path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
