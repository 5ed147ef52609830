"""A signed bundle is the one that was signed, by the one who holds the key."""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from advmoe_deploy.bundle import (
    CARD,
    MANIFEST,
    MANIFEST_HASH,
    SIGNATURE,
    Bundle,
    hash_line,
    open_bundle,
)
from advmoe_deploy.card import replace_card
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import AdvMoEError, BundleError, InputError, MachineError
from advmoe_deploy.sealing.signature import require_signature, sign_bundle
from tests.cli.command_line import said
from tests.sealing.bundles import put, put_manifest

pytest.importorskip("model_signing")

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa


def test_without_a_temporary_folder_the_way_out_is_named(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not-there"))
    keys = write_pair(tmp_path / "keys", ec.generate_private_key(ec.SECP256R1()))
    with pytest.raises(MachineError, match="set TMPDIR"):
        sign_bundle(tiny_bundle, keys / "key.pem")


def write_pair(folder: Path, private: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> Path:
    """Write key.pem and key.pub as openssl does; return the folder."""
    folder.mkdir()
    (folder / "key.pem").write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
    (folder / "key.pub").write_bytes(
        private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return folder


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A pair of keys: key.pem and key.pub."""
    return write_pair(tmp_path / "keys", ec.generate_private_key(ec.SECP256R1()))


@pytest.fixture
def signed(tiny_bundle: Bundle, tmp_path: Path, keys: Path) -> Path:
    """A signed bundle that a test may damage."""
    copy = Path(shutil.copytree(tiny_bundle.path, tmp_path / "copy"))
    assert sign_bundle(open_bundle(copy), keys / "key.pem") == copy / SIGNATURE
    return copy


def refusal(bundle: Path, key: Path) -> str:
    with pytest.raises(AdvMoEError) as caught:
        require_signature(open_bundle(bundle), key)
    assert caught.value.exit_code == 3
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_a_signed_bundle_is_accepted_and_can_be_signed_again(signed: Path, keys: Path) -> None:
    require_signature(open_bundle(signed), keys / "key.pub")
    sign_bundle(open_bundle(signed), keys / "key.pem")
    require_signature(open_bundle(signed), keys / "key.pub")


def test_no_changed_file_is_accepted_though_every_hash_fits(signed: Path, keys: Path) -> None:
    sealed = {n: (signed / n).read_bytes() for n in (MANIFEST, MANIFEST_HASH)}
    for name in open_bundle(signed).manifest.files:
        content = (signed / name).read_bytes()
        changed = bytearray(content)
        changed[len(content) // 2] ^= 1
        put(signed, name, bytes(changed))
        assert "is not a signature of this bundle" in refusal(signed, keys / "key.pub")
        for other, text in {**sealed, name: content}.items():
            (signed / other).write_bytes(text)
    require_signature(open_bundle(signed), keys / "key.pub")


def test_a_card_that_only_a_line_of_the_hashes_vouches_for_is_refused(
    signed: Path, keys: Path
) -> None:
    card = b"# the most robust model there is"
    (signed / CARD).write_bytes(card)
    hashes = signed / MANIFEST_HASH
    hashes.write_bytes(hashes.read_bytes() + hash_line(CARD, card))
    open_bundle(signed)  # as in the instant in which a card is replaced
    assert "MODEL_CARD.md is not what was exported" in refusal(signed, keys / "key.pub")


def test_a_bundle_opens_while_it_is_signed_and_after_that_was_killed(
    signed: Path, keys: Path
) -> None:
    left = signed / f".manifest.sig.partial-{platform.node()}-999999999-0123abcd"
    left.write_bytes(b"half")
    sign_bundle(open_bundle(signed), keys / "key.pem")
    assert not left.exists()
    require_signature(open_bundle(signed), keys / "key.pub")


def test_a_signature_that_is_no_file_or_too_large_is_none(signed: Path, keys: Path) -> None:
    opened, file = open_bundle(signed), signed / SIGNATURE
    with file.open("ab") as signature:
        signature.truncate(1 << 30)
    with pytest.raises(BundleError, match=r"has no manifest\.sig"):
        require_signature(opened, keys / "key.pub")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(BundleError, match=r"has no manifest\.sig"):
        require_signature(opened, keys / "key.pub")


@pytest.mark.parametrize("name", ["model.onnx", "MODEL_CARD.md", "new.onnx"])
def test_a_manifest_that_was_hashed_again_is_refused(signed: Path, keys: Path, name: str) -> None:
    put(signed, name, b"something else")
    open_bundle(signed)  # for whom accidents alone matter, every hash fits
    assert "is not a signature of this bundle" in refusal(signed, keys / "key.pub")


def test_a_manifest_of_the_same_meaning_is_refused(signed: Path, keys: Path) -> None:
    put_manifest(signed, json.loads((signed / MANIFEST).read_bytes()))
    assert "is not a signature of this bundle" in refusal(signed, keys / "key.pub")


def test_no_flipped_byte_of_what_the_signature_says_is_accepted(signed: Path, keys: Path) -> None:
    text = (signed / SIGNATURE).read_bytes()
    fields = json.loads(text)["dsseEnvelope"]
    opened = open_bundle(signed)
    for value in (fields["payload"], fields["signatures"][0]["sig"]):
        begin = text.index(value.encode())
        for place in range(begin, begin + len(value) - 4, 37):
            damaged = bytearray(text)
            damaged[place] = ord("A") if damaged[place] != ord("A") else ord("B")
            (signed / SIGNATURE).write_bytes(damaged)
            with pytest.raises(BundleError, match="is not a signature"):
                require_signature(opened, keys / "key.pub")


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b"\xff\x00", b"null"])
def test_a_signature_of_another_form_is_refused(signed: Path, keys: Path, content: bytes) -> None:
    (signed / SIGNATURE).write_bytes(content)
    assert "is not a signature of this bundle" in refusal(signed, keys / "key.pub")


def test_a_bundle_without_a_signature_is_refused(signed: Path, keys: Path) -> None:
    (signed / SIGNATURE).unlink()
    assert "advmoe sign" in refusal(signed, keys / "key.pub")


def test_the_signature_of_another_is_refused(signed: Path, tmp_path: Path) -> None:
    other = write_pair(tmp_path / "other", ec.generate_private_key(ec.SECP384R1()))
    assert "name the key of whoever signed it" in refusal(signed, other / "key.pub")
    sign_bundle(open_bundle(signed), other / "key.pem")
    require_signature(open_bundle(signed), other / "key.pub")


@pytest.mark.parametrize("kind", ["garbage", "rsa", "private", "curve", "gone", "folder"])
def test_a_key_of_another_kind_is_refused(
    signed: Path, keys: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "rsa":
        keys = write_pair(tmp_path / "rsa", rsa.generate_private_key(65537, 2048))
    elif kind == "curve":
        keys = write_pair(tmp_path / "curve", ec.generate_private_key(ec.SECP256K1()))
    swapped = {"key.pub": "key.pem", "key.pem": "key.pub"} if kind == "private" else {}
    for name, use in (("key.pub", require_signature), ("key.pem", sign_bundle)):
        key = keys / swapped.get(name, name)
        if kind == "garbage":
            key.write_bytes(b"\x00\xff")
        elif kind in ("gone", "folder"):
            key.unlink()
        if kind == "folder":
            key.mkdir()
        kinds: tuple[type[Exception], ...] = (InputError, OSError)
        with pytest.raises(kinds) as caught:
            use(open_bundle(signed), key)
        if isinstance(caught.value, InputError):
            assert "openssl ecparam" in str(caught.value)
            assert "http" not in str(caught.value)  # an address that is cut leads nowhere
            assert str(caught.value).isprintable()


def test_the_card_of_a_signed_bundle_is_not_replaced(signed: Path) -> None:
    with pytest.raises(BundleError, match="sign it again"):
        replace_card(open_bundle(signed), "# new\n")
    open_bundle(signed)


def test_what_is_checked_is_the_manifest_that_was_opened(signed: Path, keys: Path) -> None:
    good = (signed / MANIFEST).read_bytes()
    fields = json.loads(good)
    put_manifest(signed, fields | {"created": "yesterday"})
    opened = open_bundle(signed)
    put_manifest(signed, good)  # swapped back before the signature is looked at
    with pytest.raises(BundleError, match="is not a signature"):
        require_signature(opened, keys / "key.pub")


def test_the_commands(
    signed: Path, keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, public, out = str(keys / "key.pem"), str(keys / "key.pub"), tmp_path / "out.jsonl"
    assert run(["sign", str(signed), "--key", key, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["signature"] == str(signed / SIGNATURE)
    put(signed, "MODEL_CARD.md", b"# Better than ever\n")
    files = ["--input", str(tmp_path), "--output", str(out)]
    for command in (["serve"], ["predict", *files], ["verify"]):
        words = [command[0], str(signed), *command[1:], "--require-signature", public]
        assert run(words) == 3
        line = said(capsys)
        assert "is not a signature of this bundle" in line
    assert not out.exists()


def test_without_the_library_it_is_named(signed: Path, keys: Path) -> None:
    program = (
        "import sys; sys.modules['model_signing'] = None\n"
        "from advmoe_deploy.cli.app import main\n"
        f"sys.argv = ['advmoe', 'sign', {str(signed)!r}, '--key', {str(keys / 'key.pem')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 4
    assert "pip install 'advmoe-deploy[sign]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
