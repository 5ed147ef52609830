"""A card is replaced whole, and the bundle opens whatever happens meanwhile."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from advmoe_deploy import files as files_module
from advmoe_deploy.bundle import CARD, MANIFEST, MANIFEST_HASH, MODEL, Bundle, open_bundle
from advmoe_deploy.card import replace_card
from advmoe_deploy.errors import BundleError
from advmoe_deploy.export.model_card import card_with_engines
from advmoe_deploy.verify.examples.card import _BEGIN, _END, _SECTION

NEW = "# Another card\n"


def contents(bundle: Bundle) -> dict[str, bytes]:
    files = [file for file in bundle.path.rglob("*") if file.is_file()]
    return {file.relative_to(bundle.path).as_posix(): file.read_bytes() for file in files}


def test_the_card_and_its_hash_change_and_nothing_else(copy: Bundle) -> None:
    before = contents(copy)
    replaced = replace_card(copy, NEW)
    after = contents(copy)
    assert {name for name in before if before[name] != after[name]} == {
        CARD,
        MANIFEST,
        MANIFEST_HASH,
    }
    assert after.keys() == before.keys()
    opened = open_bundle(copy.path)
    assert opened.manifest == replaced.manifest
    assert opened.identity == copy.identity
    assert after[CARD] == NEW.encode()
    assert after[MANIFEST_HASH].count(b"\n") == 1
    assert replace_card(copy, NEW).manifest == opened.manifest  # even if opened before the last
    assert contents(copy) == after


@pytest.mark.parametrize("step", range(4))
def test_a_kill_leaves_the_old_card_or_the_new_one(copy: Bundle, step: int) -> None:
    program = (
        "import os, sys\nfrom pathlib import Path\n"
        "from advmoe_deploy.bundle import open_bundle\n"
        "from advmoe_deploy.card import replace_card\n"
        "real, done = Path.replace, []\n"
        "def replace(path, target):\n"
        f"    if len(done) == {step}: os._exit(9)\n"
        "    done.append(path)\n"
        "    return real(path, target)\n"
        "Path.replace = replace\n"
        f"replace_card(open_bundle(Path(sys.argv[1])), {NEW!r})\n"
    )
    old = copy.file(CARD).read_text()
    done = subprocess.run([sys.executable, "-c", program, str(copy.path)], check=False)
    assert done.returncode == 9
    opened = open_bundle(copy.path)
    assert opened.file(CARD).read_text() == (old if step < 2 else NEW)
    replace_card(opened, "# A third\n")
    assert open_bundle(copy.path).file(CARD).read_text() == "# A third\n"
    assert contents(copy).keys() == {*opened.manifest.files, MANIFEST, MANIFEST_HASH}


@pytest.mark.parametrize("written", range(4))
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_disk_changes_nothing(
    copy: Bundle, monkeypatch: pytest.MonkeyPatch, written: int, number: int
) -> None:
    real, done, before = files_module._write_to_disk, [], contents(copy)

    def full(path: Path, content: bytes) -> None:
        if len(done) == written:
            path.write_bytes(content[:3])
            raise OSError(number, "")
        done.append(path)
        real(path, content)

    monkeypatch.setattr(files_module, "_write_to_disk", full)
    with pytest.raises(OSError, match=str(copy.path)) as caught:
        replace_card(copy, NEW)
    assert caught.value.errno == number
    assert contents(copy) == before


def test_what_was_tampered_with_stays_refused(copy: Bundle) -> None:
    graph = copy.path / MODEL
    graph.write_bytes(graph.read_bytes()[:-1] + b"!")
    before = contents(copy)
    with pytest.raises(BundleError, match=r"model\.onnx is not what was exported"):
        replace_card(copy, NEW)
    assert contents(copy) == before
    with pytest.raises(BundleError, match=r"model\.onnx is not what was exported"):
        open_bundle(copy.path)


def test_another_card_than_the_announced_one_is_refused(copy: Bundle) -> None:
    hashes = copy.path / MANIFEST_HASH
    hashes.write_text(f"{hashes.read_text()}{'0' * 64}  {CARD}\n")
    open_bundle(copy.path)
    (copy.path / CARD).write_text(NEW)
    with pytest.raises(BundleError, match=CARD):
        open_bundle(copy.path)


def test_another_bundle_in_its_place_gets_no_card(copy: Bundle) -> None:
    changed = copy.manifest.model_copy(update={"producer": "somebody else"})
    with pytest.raises(BundleError, match="another bundle"):
        replace_card(Bundle(copy.path, changed), NEW)


def test_other_engines_on_the_card_leave_what_was_measured(copy: Bundle) -> None:
    card = copy.file(CARD).read_text()
    assert "## Other engines" in card
    measured = f"{card}\n{_BEGIN}\n## Measured\n{_END}\n"
    assert _SECTION.search(card_with_engines(measured, ()))
