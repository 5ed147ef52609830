"""HTML pages that need no other file (jinja2, extra ``[report]``)."""

from pathlib import Path
from typing import Any

from advmoe_deploy.cli.pages.plots import require_matplotlib
from advmoe_deploy.errors import missing_extra


def require_libraries() -> None:
    """Raise :class:`BackendUnavailableError` now, not after the work, if one is missing."""
    require_matplotlib()
    _environment()


def render(template: str, **values: Any) -> str:
    """Return the page of ``template``, a path below ``cli``, with ``values`` in it."""
    page: str = _environment().get_template(template).render(**values)
    return page


def _environment() -> Any:
    try:
        import jinja2
    except ImportError:
        raise missing_extra("jinja2", "report") from None
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
