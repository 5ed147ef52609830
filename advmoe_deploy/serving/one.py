"""Classification of one picture, to be looked at."""

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import DataError, UsageError
from advmoe_deploy.progress import Progress, Silent
from advmoe_deploy.runtime.select import engine_for, open_runner
from advmoe_deploy.serving.classify import FileClassifier
from advmoe_deploy.serving.inputs import open_inputs
from advmoe_deploy.serving.job import columns_of
from advmoe_deploy.specs import Frozen, Precision


class ClassAnswer(Frozen):
    """A class and its probability."""

    label: str
    label_id: int
    probability: float


class OneAnswer(Frozen):
    """Answer to one picture; ``expert_ids`` by layer, of tokens a list for each."""

    path: str
    label: str
    label_id: int
    probability: float
    top_k: tuple[ClassAnswer, ...] = ()
    expert_ids: dict[str, list[int] | list[list[int]]]
    engine: str
    precision: Precision


def classify_one(
    bundle: Bundle,
    source: str,
    *,
    engine: str | None = None,
    threads: int = 0,
    top_k: int = 0,
    progress: Progress | None = None,
) -> OneAnswer:
    """Return the answer to the one picture that ``source`` stands for.

    Raises:
        UsageError: it stands for several, or a value makes no sense.
        DataError: there is none, or it cannot be read.
    """
    columns = columns_of(bundle, 1, top_k)
    chosen = engine_for(bundle, engine, (progress or Silent()).note)
    inputs = open_inputs(source)
    if len(inputs) > 1:
        raise UsageError(
            f"{source} gives {len(inputs)} inputs; name a file for their rows (--output FILE.jsonl,"
            " .parquet or .csv), or - for lines of JSON on stdout"
        )
    with open_runner(bundle, chosen, threads=threads) as runner:
        classifier = FileClassifier(runner, columns, bundle.manifest.decoding, 1)
        ((row,),) = (window.rows for window in classifier.windows(inputs, 0, len(inputs), 1))
        computed = {"engine": runner.name, "precision": runner.precision}
    if (error := row.pop("error")) is not None:
        raise DataError(f"{row['path']} cannot be classified: {error}; name another picture")
    row["expert_ids"] = row["expert_ids"] or {}
    return OneAnswer.model_validate({**row, **computed})
