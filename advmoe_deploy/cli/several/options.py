"""Options of ``analyze`` where it looks at several runs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from advmoe_deploy.cli.options import use_torch_threads
from advmoe_deploy.cli.session import Session

if TYPE_CHECKING:
    from advmoe_deploy.analysis.redundancy import Withstood
    from advmoe_deploy.analysis.several.trial import TrialSettings
    from advmoe_deploy.cli.several.presentation import Presentation
    from advmoe_deploy.specs import Frozen


@dataclass(frozen=True)
class TrialOptions:
    """Runs as they were named, and options of the command line."""

    paths: tuple[Path, ...]
    data: str | None
    class_map: str | None
    images: int
    epsilon: float | None
    steps: int
    seed: int
    out: Path | None
    overwrite: bool
    threads: int

    def settings(self) -> "TrialSettings":
        """Return what to attack, and how hard."""
        from advmoe_deploy.analysis.several.trial import TrialSettings
        from advmoe_deploy.data.matching import read_class_map

        return TrialSettings(
            images=self.images,
            data=self.data,
            class_map=read_class_map(self.class_map),
            epsilon=self.epsilon,
            steps=self.steps,
            seed=self.seed,
        )

    def write(
        self,
        ui: Session,
        target: Path,
        name: str,
        make: "Callable[[], tuple[Frozen, dict[str, str], Presentation]]",
        measured: "Sequence[Frozen]",
        found: "Callable[[], Mapping[str, Withstood]]",
    ) -> None:
        """Put the report that ``make`` returns into ``target``, which may not be in the way.

        ``make`` returns with it the versions it was made by, and what is shown of it. It fills
        ``measured``, of which nothing is lost if it is stopped or the report cannot be written:
        ``found`` returns it by name.
        """
        from advmoe_deploy.cli.pages.page import require_libraries
        from advmoe_deploy.files import refuse_existing, staged_directory

        require_libraries()
        refuse_existing(target, overwrite=self.overwrite, marker=name)

        from advmoe_deploy.cli.several.presentation import screen, so_far, write_page

        use_torch_threads(self.threads)
        with ui.keeping(measured, lambda: so_far(found())):
            report, versions, shown = make()
            with staged_directory(target, overwrite=self.overwrite) as staged:
                write_page(report, shown, staged, name, versions=versions, threads=self.threads)
        value = {"out": str(target), **report.model_dump(mode="json")}
        ui.show(value, lambda: screen(shown, target))
