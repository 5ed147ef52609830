"""The folder that batch inference is tried on."""

from pathlib import Path

import pytest
from PIL import Image

from advmoe_deploy.data.registry import load_dataset


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty digits, one text file and one truncated image, all called .png. Read it only."""
    folder = tmp_path_factory.mktemp("digits")
    for index, image in enumerate(load_dataset("digits").test.images[:20]):
        Image.fromarray(image[0]).save(folder / f"{index:02}.png")
    (folder / "05b.png").write_text("text")
    whole = (folder / "00.png").read_bytes()
    (folder / "zz.png").write_bytes(whole[: len(whole) - 30])
    return folder
