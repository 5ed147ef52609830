"""A checkpoint is what its spec says or it is refused."""

import json
import shutil
from pathlib import Path

import pytest

from advmoe_deploy.errors import CheckpointError
from advmoe_deploy.models.checkpoint import CHECKPOINT, load_checkpoint


def test_there_is_one_name_per_class(tiny_run: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_run / "model", tmp_path / "model"))
    fields = json.loads((model / CHECKPOINT).read_text())
    (model / CHECKPOINT).write_text(json.dumps(fields | {"class_names": ["a", "b", "c"]}))
    with pytest.raises(CheckpointError, match="3 names for num_classes=10") as caught:
        load_checkpoint(model)
    assert "\n" not in str(caught.value)
