"""Tar shards and parquet files as inputs: the rows of the files in them, and no surprise."""

import io
import json
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from data.packed import digits, member, write_table, write_tar

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.cli.app import run
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.errors import DataError
from advmoe_deploy.serving.batch import classify_files
from advmoe_deploy.serving.inputs import list_inputs, open_inputs
from tests.serving.written import rows_of

GREY = Decoding.of(8, channels=1)


def answers(source: object, start: int = 0) -> dict[str, object]:
    """Return what is read of each input, by its name: pixels, or a reason."""
    inputs = open_inputs(str(source))
    found = [read(GREY) for read in inputs.reads(start)]
    names = list(inputs.names(start))
    assert len(found) == len(names) == len(inputs) - start
    assert len(set(names)) == len(names)
    return {
        name: one if isinstance(one, str) else one.pixels
        for name, one in zip(names, found, strict=True)
    }


def reasons(source: object) -> dict[str, str]:
    return {name: one for name, one in answers(source).items() if isinstance(one, str)}


def test_packed_images_have_the_answers_of_their_files(tiny_bundle: Bundle, tmp_path: Path) -> None:
    images = digits(30)
    (tmp_path / "files").mkdir()
    for i, content in enumerate(images):
        (tmp_path / "files" / f"{i:02}.png").write_bytes(content)
    write_tar(
        tmp_path / "a.tar",
        [x for i, c in enumerate(images) for x in ((f"{i:02}.png", c), (f"{i:02}.cls", b"1"))],
    )
    write_table(tmp_path / "a.parquet", images, rows_per_group=7)
    found = {}
    for source in ("files", "a.tar", "a.parquet"):
        report = classify_files(
            tiny_bundle, str(tmp_path / source), tmp_path / "o.jsonl", batch=8, overwrite=True
        )
        assert (report.images, report.errors) == (30, 0)
        found[source] = rows_of(tmp_path / "o.jsonl")
    assert [row["path"] for row in found["a.tar"]] == [
        f"{tmp_path}/a.tar/{i:02}.png" for i in range(30)
    ]
    assert [row["path"] for row in found["a.parquet"]] == [
        f"{tmp_path}/a.parquet#{i}" for i in range(30)
    ]
    for rows in found.values():
        for row in rows:
            del row["path"]
    assert found["a.tar"] == found["a.parquet"] == found["files"]


def test_shards_are_found_where_files_are(tmp_path: Path) -> None:
    image = digits(1)[0]
    (tmp_path / "in").mkdir()
    write_tar(tmp_path / "in" / "b.tar", [("x.png", image), ("x.txt", b"")])
    write_tar(tmp_path / "in" / "a.TAR", [("y.PNG", image), ("._y.png", b"")])
    write_table(tmp_path / "in" / "c.parquet", [image])
    expected = [f"{tmp_path}/in/{name}" for name in ("a.TAR/y.PNG", "b.tar/x.png", "c.parquet#0")]
    (tmp_path / "list.txt").write_text("in/c.parquet\nin/b.tar\nin/a.TAR\n")
    for source in (tmp_path / "in", tmp_path / "in" / "*", tmp_path / "list.txt"):
        assert list(answers(source)) == expected
    assert [(one.reason, one.count) for one in open_inputs(str(tmp_path / "in")).skipped] == [
        ("hidden", 1),
        ("not an image by its suffix", 1),
    ]
    (tmp_path / "in" / "lost.tar").symlink_to("nowhere")
    assert [*answers(tmp_path / "in")] == sorted([*expected, f"{tmp_path}/in/lost.tar"])
    (tmp_path / "in" / "lost.tar").unlink()
    (tmp_path / "in" / "photo.png").write_bytes(image)
    listing = list_inputs(str(tmp_path / "in"))  # an archive beside photographs is none of them
    assert [Path(path).name for path in listing] == ["photo.png"]
    assert "3 skipped, a shard beside images, to be named if it is an input" in str(
        listing.skipped[0]
    )


def test_standard_input_lists_files(tiny_bundle: Bundle, tmp_path: Path) -> None:
    for name, content in zip(("a.png", "b.png"), digits(2), strict=True):
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-m", "advmoe_deploy.cli.app", "predict", str(tiny_bundle.path)]
    command += ["--input", "-", "--output", "o.jsonl"]
    for text, code in ((b"b.png\n./a.png\ngone.png\n", 0), (b"\n", 3)):
        ran = subprocess.run(
            [*command, "--overwrite"], cwd=tmp_path, input=text, capture_output=True, check=False
        )
        assert ran.returncode == code, ran.stderr
    assert b"standard input lists no path; name a folder" in ran.stderr
    rows = rows_of(tmp_path / "o.jsonl")
    assert [(row["path"], row["error"] is None) for row in rows] == [
        ("a.png", True),
        ("b.png", True),
        ("gone.png", False),
    ]


def test_no_member_leads_out_of_a_shard(tmp_path: Path) -> None:
    image = digits(1)[0]
    (tmp_path / "outside.png").write_bytes(image)
    shard = write_tar(
        tmp_path / "a.tar",
        [
            ("good.png", image),
            ("../outside.png", image),
            ("/etc/absolute.png", image),
            (member("soft.png", tarfile.SYMTYPE, "../outside.png"), b""),
            (member("hard.png", tarfile.LNKTYPE, "good.png"), b""),
            (member("device.png", tarfile.CHRTYPE), b""),
            (member("pipe.png", tarfile.FIFOTYPE), b""),
            (member("folder.png", tarfile.DIRTYPE), b""),
            ("good.png", image),
            ("good.png#2", image),
            ("empty.png", b""),
        ],
    )
    found = reasons(shard)
    assert {name.removeprefix(str(shard)): reason for name, reason in found.items()} == {
        "/../outside.png": "its name leads out of the shard; store it under another",
        "//etc/absolute.png": "its name leads out of the shard; store it under another",
        "/soft.png": "a link; store the image itself",
        "/hard.png": "a link; store the image itself",
        "/device.png": "not a regular file",
        "/pipe.png": "not a regular file",
        "/empty.png": found[f"{shard}/empty.png"],
    }
    assert found[f"{shard}/empty.png"].startswith("not a PNG")
    assert {f"{shard}/good.png", f"{shard}/good.png#2"} == answers(shard).keys() - found.keys()


def test_a_name_in_a_shard_may_be_any(tmp_path: Path) -> None:
    image = digits(1)[0]
    names = ["\udcff.png", "\\xff.png", "ж/é.png", "a#1.png", "long" * 60 + ".png", "new\nline.png"]
    with tarfile.open(
        tmp_path / "a.tar", "w", encoding="utf-8", format=tarfile.GNU_FORMAT
    ) as shard:
        for name in names:
            header = member(name)
            header.size = len(image)
            shard.addfile(header, io.BytesIO(image))
    found = [name.removeprefix(f"{tmp_path}/a.tar/") for name in answers(tmp_path / "a.tar")]
    assert found == ["\\xff.png", "\\\\xff.png", *names[2:]]


def test_a_shard_that_is_cut_off_says_so_once_at_any_byte(tmp_path: Path) -> None:
    images = digits(3)
    whole = write_tar(tmp_path / "a.tar", [(f"{i}.png", c) for i, c in enumerate(images)])
    content = whole.read_bytes()
    end = 3 * 1024  # each has a header and a block of data; then come zeros
    assert content[end:].count(0) == len(content) - end
    for length in [0, 1, 511, 512, 513, 1000, 1024, 1500, 2048, 2500, 3071, end, end + 511]:
        whole.write_bytes(content[:length])
        found = reasons(whole)
        assert str(whole) in found, length
        assert "cut off" in found[str(whole)], length
        readable = sum(length >= 1024 * i + 512 + len(image) for i, image in enumerate(images))
        assert len(answers(whole)) - len(found) == readable, length
    whole.write_bytes(content[: end + 512])
    assert not reasons(whole)
    whole.write_bytes(b"\x1f\x8b" + content)
    assert "unpack it (gunzip)" in reasons(whole)[str(whole)]
    write_tar(whole, [("a.cls", b"3")])
    assert reasons(whole)[str(whole)].startswith("holds no image (.apng, ")


def test_damaged_shards_and_tables_only_give_reasons(tmp_path: Path) -> None:
    random.seed(0)
    images = digits(4)
    files = [
        write_tar(tmp_path / "a.tar", [(f"{i}.png", c) for i, c in enumerate(images)]),
        write_table(tmp_path / "a.parquet", images),
    ]
    for file in files:
        content = file.read_bytes()
        for _ in range(150):
            damaged = bytearray(content)
            for _ in range(random.randint(1, 8)):
                damaged[random.randrange(len(damaged))] = random.randrange(256)
            file.write_bytes(damaged)
            assert 1 <= len(answers(file)) <= 5


def test_a_header_cannot_claim_memory_or_turn_back(tmp_path: Path) -> None:
    image = digits(1)[0]
    for kind in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.REGTYPE):
        for size in (8 << 30, -(1 << 40)):
            header = member("a.png", kind)
            header.size = size
            block = header.tobuf(tarfile.GNU_FORMAT)
            first = write_tar(tmp_path / "b.tar", [("a.png", image)]).read_bytes()[:1024]
            (tmp_path / "a.tar").write_bytes(first + block + bytes(10_240))
            found = reasons(tmp_path / "a.tar")
            assert "damaged" in found[str(tmp_path / "a.tar")], (kind, size)


def test_rows_without_an_image_and_broken_pages_are_errors(tmp_path: Path) -> None:
    images = digits(6)
    table = write_table(tmp_path / "a.parquet", [*images[:3], None, *images[3:], b"text"], 4)
    found = reasons(table)
    assert found[f"{table}#3"].startswith("holds no encoded image")
    assert found[f"{table}#7"].startswith("not a PNG")
    assert len(found) == 2
    content = bytearray(table.read_bytes())
    content[4:16] = b"\xff" * 12  # of the first row group
    table.write_bytes(content)
    found = answers(table)
    assert [
        str(found[f"{table}#{i}"]).startswith("no readable parquet file") for i in range(8)
    ] == ([True] * 4 + [False] * 4)


def test_a_page_that_becomes_gigabytes_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    zeros = arrow.table({"image": arrow.array([bytes(40 << 20)], arrow.binary())})
    parquet.write_table(zeros, file, compression="zstd", use_dictionary=False)
    assert file.stat().st_size < 100_000
    assert "images do not shrink so" in reasons(file)[f"{file}#0"]


def test_columns_of_images_are_told_by_name_or_because_they_are_alone(tmp_path: Path) -> None:
    image, file = digits(1)[0], tmp_path / "a.parquet"
    for columns in (
        {"bytes": arrow.array([image], arrow.binary())},
        {"other": arrow.array([b"x"]), "img": arrow.array([image], arrow.large_binary())},
        {"text": arrow.array(["x"]), "photo": arrow.array([{"bytes": image}])},
    ):
        parquet.write_table(arrow.table(columns), file)
        assert list(answers(file)) == [f"{file}#0"]
        assert not reasons(file)
    for columns in ({"a": [b"x"], "b": [b"y"]}, {"image": ["a.png"]}, {"image": [{"path": "a"}]}):
        parquet.write_table(arrow.table(columns), file)
        assert "none that is binary, or a struct with bytes" in reasons(file)[str(file)]
    parquet.write_table(arrow.table({"image": arrow.array([], arrow.binary())}), file)
    assert "says that it has 0 rows" in reasons(file)[str(file)]
    file.write_bytes(b"PAR1")
    assert reasons(file)[str(file)].startswith("no readable parquet file")


def test_reading_may_begin_anywhere(tmp_path: Path) -> None:
    images = digits(11)
    (tmp_path / "0.png").write_bytes(images[0])
    write_table(tmp_path / "1.parquet", images[1:6], rows_per_group=2)
    write_tar(tmp_path / "2.tar", [(f"{i}.png", c) for i, c in enumerate(images[6:9])])
    write_table(tmp_path / "3.parquet", images[9:], rows_per_group=2)
    whole = list(answers(tmp_path / "*").items())
    assert len(whole) == 11
    for start in range(11):
        part = answers(tmp_path / "*", start)
        assert list(part) == [name for name, _ in whole[start:]]
        for name, pixels in whole[start:]:
            assert np.array_equal(part[name], pixels)


BOUNDED = """
import resource, sys
from advmoe_deploy.decoding import Decoding
from advmoe_deploy.serving.inputs import open_inputs

peaks = []
for source in sys.argv[1:]:
    inputs = open_inputs(source)
    found = [type(read(Decoding.of(8))) for read in inputs.reads()]
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10)
print(*peaks)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has other units elsewhere")
def test_large_shards_are_read_in_little_memory(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    large = [rng.bytes(512 << 10) for _ in range(8)]  # no images: it is about reading them
    small = write_table(tmp_path / "small.parquet", large[:1])
    images = [i.to_bytes(2, "big") + content for i, content in enumerate(large * 50)]
    table = write_table(tmp_path / "a.parquet", images, rows_per_group=400)  # one group
    shard = write_tar(tmp_path / "a.tar", [(f"{i}.png", c) for i, c in enumerate(images)])
    assert min(file.stat().st_size for file in (table, shard)) > 200 << 20
    command = [sys.executable, "-c", BOUNDED, str(small), str(shard), str(table)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    begun, after_tar, after_table = map(int, ran.stdout.split())
    assert after_tar - begun < 16, ran.stdout
    assert after_table - begun < 96, ran.stdout


def test_too_many_errors_end_a_run_that_can_go_on(
    tiny_bundle: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images: list[bytes | None] = [None if i % 4 == 3 else c for i, c in enumerate(digits(24))]
    source, output = write_table(tmp_path / "a.parquet", images), tmp_path / "o.jsonl"
    command = ["predict", str(tiny_bundle.path), "--input", str(source), "--output", str(output)]
    command += ["--batch", "4"]
    assert run([*command, "--max-errors", "2"]) == 3
    said = capfd.readouterr().err.replace("\n", " ")
    assert "3 of the first 12 inputs could not be read, more than --max-errors 2" in said
    assert "12 of 24 rows are kept" in said
    assert not output.exists()
    assert run([*command, "--max-errors", "2", "--resume"]) == 3  # at once, and nothing is lost
    assert run([*command, "--max-errors", "5", "--resume"]) == 3
    assert "6 of the first 24" in capfd.readouterr().err.replace("\n", " ")
    assert run([*command, "--max-errors", "6", "--resume", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["resumed"] == 24
    whole = tmp_path / "whole.jsonl"
    classify_files(tiny_bundle, str(source), whole, batch=4)
    assert output.read_bytes() == whole.read_bytes()


def test_an_empty_input_is_no_folder(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(digits(1)[0])
    with pytest.raises(DataError, match="the input is an empty text"):
        open_inputs("")
    assert run(["predict", str(tiny_bundle.path), "--input", "", "--output", "o.jsonl"]) == 3
    assert not (tmp_path / "o.jsonl").exists()
