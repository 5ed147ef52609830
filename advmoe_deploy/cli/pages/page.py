"""HTML pages that need no other file (jinja2, extra ``[report]``)."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from advmoe_deploy.cli.pages.plots import require_matplotlib
from advmoe_deploy.cli.verdicts.said import Said, percent
from advmoe_deploy.errors import missing_extra
from advmoe_deploy.process import default_threads, usable_cpus
from advmoe_deploy.profiling.processor import processor_name
from advmoe_deploy.settings import epsilon_text

HTML = "report.html"


@dataclass(frozen=True)
class Head:
    """Head of every page: its model, the verdict, its reasons, and warnings."""

    command: str
    subject: str
    verdict: Sequence[Said]
    warnings: Sequence[str] = ()


def require_libraries() -> None:
    """Raise :class:`BackendUnavailableError` now, not after the work, if one is missing."""
    require_matplotlib()
    _environment()


def render(
    template: str, head: Head, *, versions: Mapping[str, str], threads: int = 0, **values: Any
) -> str:
    """Return the page of ``template``, a path below ``cli``, with ``values`` in it.

    It ends with today's date, this machine's processor, the ``threads`` (0: the default) and
    ``versions`` of what was measured here just now.
    """
    made = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": processor_name(),
        "CPU threads": f"{threads or default_threads() or usable_cpus()}",
        "versions": ", ".join(f"{name} {v}" for name, v in _with_python(versions).items()),
    }
    page: str = _environment().get_template(template).render(head=head, made=made, **values)
    return page.replace(" %", "\N{NO-BREAK SPACE}%")  # no number ends a line without its sign


def _with_python(versions: Mapping[str, str]) -> Mapping[str, str]:
    return {**versions, "python": platform.python_version()}


def _environment() -> Any:
    try:
        import jinja2
    except ImportError:
        raise missing_extra("jinja2", "report") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"epsilon": epsilon_text, "percent": percent}
    return environment
