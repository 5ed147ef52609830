"""Files of tokens and certificates: what cannot be used is told in a line."""

from pathlib import Path

import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.errors import InputError
from advmoe_deploy.serving.online.access.tls import read_tls
from advmoe_deploy.serving.online.access.token import read_token
from tests.serving.online.access.certificates import write_certificate

SECRET = b"0123456789abcdef"


def written(folder: Path, text: bytes, mode: int = 0o600) -> Path:
    path = folder / "token"
    path.write_bytes(text)
    path.chmod(mode)
    return path


def test_a_token_admits_who_shows_it(tmp_path: Path) -> None:
    token = read_token(written(tmp_path, SECRET + b"\n", 0o640))
    for shown in (b"Bearer " + SECRET, b"bearer  " + SECRET):
        assert token.admits(shown)
    for other in (None, b"", b"Bearer", b"Bearer ", SECRET, b"Basic " + SECRET):
        assert not token.admits(other)
    assert not token.admits(b"Bearer " + SECRET[:-1])
    assert not token.admits(b"Bearer " + SECRET + b"g")
    assert not token.admits("Bearer ä".encode())


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        (SECRET, 0o644, "chmod 600"),
        (SECRET, 0o620, "chmod 600"),
        (b"", 0o600, "is empty"),
        (b" \n", 0o600, "is empty"),
        (SECRET[:-1], 0o600, "16 to 1024"),
        (SECRET + b"\n" + SECRET, 0o600, "one line"),
        (SECRET + "ä".encode(), 0o600, "letters"),
        (bytes(9999), 0o600, "16 to 1024"),
    ],
)
def test_what_is_no_token_is_refused(tmp_path: Path, text: bytes, mode: int, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_token(written(tmp_path, text, mode))


def test_what_is_no_certificate_with_its_key_is_refused(tmp_path: Path) -> None:
    certificate, key = write_certificate(tmp_path / "own")
    other, _ = write_certificate(tmp_path / "other")
    _, sealed = write_certificate(tmp_path / "sealed", b"secret")
    noise = tmp_path / "noise"
    noise.write_bytes(b"\x00PEM")
    read_tls(certificate, key)
    for wrong in ((other, key), (noise, key), (certificate, noise), (key, certificate)):
        with pytest.raises(InputError, match="are no certificate and its key in PEM"):
            read_tls(*wrong)
    with pytest.raises(InputError, match="encrypted"):
        read_tls(certificate, sealed)
    with pytest.raises(FileNotFoundError):
        read_tls(tmp_path / "none", key)


@pytest.mark.parametrize(
    "options",
    [
        ["--token-file", "none"],
        ["--token-file", "noise"],
        ["--tls-cert", "noise", "--tls-key", "noise"],
        ["--tls-cert", "none", "--tls-key", "none"],
    ],
)
def test_wrong_files_end_the_command_in_a_line(
    tiny_bundle: Bundle,
    options: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("noise").write_bytes(b"\x00PEM")
    Path("noise").chmod(0o600)
    assert run(["serve", str(tiny_bundle.path), "--port=0", *options]) == 3
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "Traceback" not in told
