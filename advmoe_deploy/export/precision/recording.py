"""Recording of the inputs of a plan's segments as images run through it."""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from advmoe_deploy.closing import Closing
from advmoe_deploy.parity.answers import Images
from advmoe_deploy.parity.compare import predictions_of
from advmoe_deploy.plan import Plan
from advmoe_deploy.runtime.engine import Engine, Source
from advmoe_deploy.runtime.onnxruntime.engine import OrtEngine
from advmoe_deploy.runtime.plan_runner import PlanRunner

RecordedRows = list[dict[str, NDArray[Any]]]


class _Recorder(Closing):
    """An engine that, while it is told to, keeps what it is given."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.rows: RecordedRows | None = None

    @property
    def output_names(self) -> tuple[str, ...]:
        """The outputs of the engine."""
        return self._engine.output_names

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return what the engine answers."""
        if self.rows is not None:
            self.rows.append(dict(inputs))
        return self._engine.run(inputs)

    def close(self) -> None:
        """Close the engine."""
        self._engine.close()


class Recording(Closing):
    """A plan that runs on recorders."""

    def __init__(
        self, plan: Plan, sources: Mapping[str, bytes], image_shape: tuple[int, int, int]
    ) -> None:
        self._recorders: dict[str, _Recorder] = {}

        def record(name: str, graph: Source) -> Engine:
            self._recorders[name] = _Recorder(OrtEngine(graph))
            return self._recorders[name]

        self._runner = PlanRunner(plan, sources, image_shape, open_engine=record)

    def rows_of(self, names: Sequence[str], images: Images) -> dict[str, RecordedRows]:
        """Return by segment what the plan gives it, batch by batch, when ``images`` run through."""
        recorders = {name: self._recorders[name] for name in names}
        rows: dict[str, RecordedRows] = {name: [] for name in names}
        for name, recorder in recorders.items():
            recorder.rows = rows[name]
        predictions_of(self._runner, images)
        for recorder in recorders.values():
            recorder.rows = None
        return rows

    def close(self) -> None:
        """Close the engines."""
        self._runner.close()
