"""The linear layer of all experts: every instruction set, every path, the same bits everywhere."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from advmoe_deploy.runtime.onnxruntime.kernels.build import LIBRARY, compile_kernels, find_compiler
from tests.runtime.onnxruntime.test_custom_ops import answers, model_of, require, run, without_body

COMPILER = find_compiler()
RANDOM = np.random.default_rng(0)
# The widest vectors of a build, in floats: AVX-512, AVX2, and what any processor has.
WIDTHS = (16, 8, 4)

Arrays = dict[str, np.ndarray]
# Rows of each expert, values in and out.
CASES = {
    "narrower than a panel": ([3, 0, 5, 1], 7, 5),
    "one value": ([1, 2], 1, 1),
    "nothing in": ([2, 1], 0, 20),
    "no row": ([0, 0], 4, 3),
    "no expert but one": ([13], 64, 96),
    "whole panels": ([1, 2, 4, 6, 7, 8], 64, 96),
    "panels and a rest, blocks of 150": ([9, 16, 0, 17, 3], 300, 100),
    "many rows": ([0, 70, 1, 130, 0], 40, 70),
    "several units": ([1030, 2], 20, 49),
}


def inputs_of(loads: list[int], values_in: int, values_out: int) -> Arrays:
    """Return random inputs."""
    shapes = {
        "x": (sum(loads), values_in),
        "weight": (len(loads), values_in, values_out),
        "bias": (len(loads), values_out),
    }
    made = {name: RANDOM.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    offsets = np.cumsum([0, *loads], dtype=np.int64)
    return {"x": made["x"], "offsets": offsets, "weight": made["weight"], "bias": made["bias"]}


def exact(inputs: Arrays) -> np.ndarray:
    """Return the answers in NumPy, [S, H] in float64."""
    x, weight, bias = (inputs[name].astype(np.float64) for name in ("x", "weight", "bias"))
    ends = inputs["offsets"]
    rows = [x[ends[e] : ends[e + 1]] @ weight[e] + bias[e] for e in range(len(weight))]
    return np.concatenate(rows)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The kernels, compiled once per width."""
    if COMPILER is None:
        pytest.skip("no C compiler")
    made = {}
    for width in WIDTHS:
        folder = tmp_path_factory.mktemp(f"kernels-{width}")
        compile_kernels(f"{COMPILER} -DADVMOE_WIDEST={width}", folder)
        made[width] = folder / LIBRARY
    return made


def answered(library: Path, inputs: Arrays, threads: int = 1) -> np.ndarray:
    """Return what a library of kernels answers."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library))
    model = without_body("ExpertLinear", inputs).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


@pytest.mark.parametrize("case", CASES)
def test_kernel_and_bodies_answer_what_numpy_does(case: str) -> None:
    inputs = inputs_of(*CASES[case])
    scale = np.sqrt(max(1, CASES[case][1]))
    inputs["weight"] /= np.float32(scale)
    expected = exact(inputs).astype(np.float32)
    for answer in answers("ExpertLinear", inputs):
        require(answer, {"y": expected})


@pytest.mark.parametrize("case", CASES)
def test_instruction_sets_threads_and_places_change_nothing(
    libraries: dict[int, Path], case: str
) -> None:
    inputs = inputs_of(*CASES[case])
    shifted = {name: beside_a_line(values) for name, values in inputs.items()}
    widest = answered(libraries[16], inputs)
    expected = exact(inputs)
    for width, library in libraries.items():
        alone = answered(library, inputs)
        np.testing.assert_allclose(alone, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(answered(library, inputs, threads=3), alone)
        np.testing.assert_array_equal(answered(library, shifted), alone)
        if width == 8:  # both round once per product and sum, as 4 may not
            np.testing.assert_array_equal(alone, widest)


def beside_a_line(values: np.ndarray) -> np.ndarray:
    """Return a copy of ``values`` that begins one value after the start of a line of the cache."""
    room = np.zeros(values.size + 64, values.dtype)
    start = -room.ctypes.data // room.itemsize % (64 // room.itemsize) + 1
    copy = room[start : start + values.size].reshape(values.shape)
    copy[:] = values
    return copy


@pytest.mark.parametrize("width", WIDTHS)
def test_an_answer_does_not_depend_on_the_other_rows(
    libraries: dict[int, Path], width: int
) -> None:
    """Not even on values that are no number, and not on how many rows there are."""
    inputs = inputs_of([9, 80, 3], 70, 101)
    together = answered(libraries[width], inputs)
    spoilt = {**inputs, "x": inputs["x"].copy()}
    spoilt["x"][[2, 40, 90], [0, 69, 3]] = np.nan, np.inf, -np.inf
    bad = [2, 40, 90]
    found = answered(libraries[width], spoilt)
    assert not np.isfinite(found[bad]).any()
    good = np.delete(np.arange(len(found)), bad)
    np.testing.assert_array_equal(found[good], together[good])
    for row, expert in ((8, 0), (50, 1), (91, 2)):
        offsets = np.array([int(e > expert) for e in range(4)], np.int64)
        one = {**inputs, "x": inputs["x"][row : row + 1], "offsets": offsets}
        np.testing.assert_array_equal(answered(libraries[width], one)[0], together[row])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": (3,)}, r"must be: x \[S, D\]"),
        ({"weight": (2, 4)}, r"must be: x \[S, D\]"),
        ({"bias": (3, 5)}, "differ in experts or values"),
        ({"bias": (2, 4)}, "differ in experts or values"),
        ({"weight": (2, 3, 5)}, "rows and the experts' weight differ"),
        ({"offsets": [0, 3]}, "differ in experts or values"),
        ({"offsets": [0, 1, 2]}, "offsets must rise from 0"),
        ({"offsets": [1, 1, 3]}, "offsets must rise from 0"),
        ({"offsets": [0, 4, 3]}, "offsets must rise from 0"),
        ({"offsets": [0, -1, 3]}, "offsets must rise from 0"),
    ],
)
def test_a_kernel_refuses_what_does_not_fit(
    libraries: dict[int, Path], changed: dict[str, list[int] | tuple[int, ...]], message: str
) -> None:
    inputs = inputs_of([1, 2], 4, 5)
    for name, value in changed.items():
        inputs[name] = np.array(value) if isinstance(value, list) else np.zeros(value, np.float32)
    with pytest.raises(Exception, match=message):
        answered(libraries[16], inputs)


def test_the_body_takes_an_expert_without_rows_first_and_last() -> None:
    inputs = inputs_of([0, 2, 0], 3, 4)
    answer = run(model_of("ExpertLinear", inputs), inputs, "bodies")
    np.testing.assert_allclose(answer["y"], exact(inputs), rtol=1e-5, atol=1e-5)
