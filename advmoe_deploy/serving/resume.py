"""Resume of an unfinished batch job, from the journal that an interrupted run left."""

from collections.abc import Iterable
from itertools import islice, takewhile
from pathlib import Path

from advmoe_deploy.errors import UsageError
from advmoe_deploy.files import refuse_existing
from advmoe_deploy.journal import Journal, Row
from advmoe_deploy.serving.classify import count_errors


def journal_of(output: Path) -> Path:
    """Return where the journal of ``output`` lies while its job runs."""
    return output.with_name(f".{output.name}.partial.jsonl")


def open_journal(
    output: Path,
    job: Row,
    names: Iterable[str],
    count: int,
    *,
    batch: int,
    resume: bool,
    overwrite: bool,
) -> tuple[Journal, int]:
    """Return the journal beside ``output``, locked, and how many of its rows are errors.

    The inputs of ``job`` are ``count``, and their rows have ``names``.

    Raises:
        UsageError: something is in the way, or the journal is of another job or in use.
    """
    path = journal_of(output)
    _refuse(output, path, resume=resume, overwrite=overwrite)
    journal = Journal(path)
    try:
        if resume:
            return journal, _resumed(journal, job, names, count, batch)
        journal.begin(job)
    except BaseException:
        journal.close()
        raise
    return journal, 0


def _resumed(journal: Journal, job: Row, names: Iterable[str], count: int, batch: int) -> int:
    """Keep the rows that ``job`` has for the first ``names``, and return how many are errors.

    Whole batches only, unless all rows are there: then every batch holds the images that it would
    have held without the interruption, and answers agree to the last bit.
    """
    begun = journal.job()
    if begun is None:
        journal.begin(job)
        return 0
    if other := [key for key in job if begun.get(key) != job[key]]:
        raise UsageError(
            f"{journal.path} was begun with another {', '.join(other)}; "
            "pass --overwrite without --resume to start again"
        )
    # No row is kept in memory: of millions there may be less room than the first run needed.
    pairs = zip(journal.rows(), islice(names, count), strict=False)
    own = takewhile(lambda pair: pair[0].get("path") == pair[1] and "error" in pair[0], pairs)
    whole = sum(1 for _ in own)
    journal.keep(whole if whole == count else whole // batch * batch)
    return count_errors(journal.rows())


def _refuse(output: Path, journal: Path, *, resume: bool, overwrite: bool) -> None:
    if resume and output.exists() and not overwrite:
        raise UsageError(f"{output} is finished already; pass --overwrite to do it again")
    if resume and journal.exists():
        return
    refuse_existing(output, overwrite=overwrite)
    if journal.exists() and not overwrite:
        raise UsageError(
            f"{journal} holds an unfinished run; pass --resume to continue it "
            "or --overwrite to start again"
        )
