"""TensorRT engine for one segment, behind NumPy arrays.

Written against the documented interface; not run on a GPU yet.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from numpy.typing import NDArray

from advmoe_deploy.closing import Closing
from advmoe_deploy.reports.devices import Device
from advmoe_deploy.runtime.engine import Source
from advmoe_deploy.runtime.tensorrt.cuda import wait_for_default_stream
from advmoe_deploy.runtime.tensorrt.program import Program
from advmoe_deploy.runtime.tensorrt.slot import DeviceArray, SingleSlot
from advmoe_deploy.runtime.tensorrt.slot_pool import SlotPool


class TensorRtEngine(Closing):
    """One TensorRT engine; safe to call from several threads at once.

    Batches are padded up to few sizes, each of which has a CUDA graph of its own once met twice.
    """

    def __init__(self, source: Source, *, device: Device | None = None, contexts: int = 2) -> None:
        """Load an engine.

        Args:
            source: the serialised engine, or its file.
            device: what it was built for, where that is known.
            contexts: how many runs may be under way at once; more wait.

        Raises:
            BackendUnavailableError: TensorRT or a GPU is missing, or is another one.
            BundleError: TensorRT cannot read the engine.
            MachineError: memory is used up.
        """
        self._program = Program(source, device=device)
        self.output_names: tuple[str, ...] = tuple(self._program.outputs)
        with ExitStack() as stack:
            stack.callback(self._program.close)
            slots = [stack.enter_context(SingleSlot(self._program)) for _ in range(contexts)]
            self._stack = stack.pop_all()
        self._slots = SlotPool(slots)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return every output by name.

        Raises:
            BundleError: the engine does not take these inputs.
            MachineError: memory is used up, or CUDA failed.
            UsageError: the engine is closed, or was not built for so large a batch.
        """
        with self._slots.slot() as slot:
            return slot.fetch(slot.start_on(inputs))

    @contextmanager
    def on_device(self, inputs: Mapping[str, NDArray[Any]]) -> Iterator[dict[str, DeviceArray]]:
        """Give every output by name where it is, in the GPU's memory, until the block ends.

        What was queued on CUDA's default stream by then is waited for. What reads the outputs on
        another stream has to be waited for in the block, and what is to last has to be copied.

        Raises:
            The same as :meth:`run`.
        """
        with self._slots.slot() as slot:
            answers = slot.start_on(inputs)
            slot.settle()
            try:
                yield answers
            finally:
                for answer in answers.values():
                    answer.is_lent = False
                wait_for_default_stream()

    def device_ms(self, inputs: Mapping[str, NDArray[Any]], *, rounds: int) -> list[float]:
        """Return the milliseconds that the GPU takes for each of so many runs, copies aside.

        Raises:
            The same as :meth:`run`.
        """
        with self._slots.slot() as slot:
            return slot.device_ms(inputs, rounds)

    def close(self) -> None:
        """Release contexts, memory and the engine, once nobody runs on them any more."""
        self._slots.close()
        self._stack.close()
