"""What a page shows."""

from pathlib import Path

from advmoe_deploy.verify.examples.entry import Entry

KINDS = ("analysis", "demo", "eval", "profile", "report")
Pages = dict[str, Path]


def entry_of(out: Path) -> Entry:
    return Entry.model_validate_json((out / "report" / "report.json").read_text(encoding="utf-8"))
