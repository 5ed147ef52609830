"""What the server makes of a router that is late, or asks an expert that ends."""

import time
from typing import Any

import numpy as np
import pytest

from advmoe_deploy.bundle import Bundle
from advmoe_deploy.errors import MachineError
from advmoe_deploy.serving.ray_serve.app import Remote, _faults

ray = pytest.importorskip("ray", reason="Ray is not installed (extra 'ray')")
pytest.importorskip("ray.serve", reason="Ray Serve is not installed", exc_type=ImportError)


class Late:
    """A router that answers two parts, and to the third has no answer; and what it promises."""

    def __init__(self) -> None:
        self.given, self.cancelled = list[float](), 0

    def remote(self, _: Any) -> "Late":
        return self

    def result(self, timeout_s: float) -> dict[str, Any]:
        self.given.append(timeout_s)
        if len(self.given) == 3:
            raise TimeoutError
        time.sleep(0.01)
        return {}

    def cancel(self) -> None:
        self.cancelled += 1


def test_all_parts_share_one_time(tiny_bundle: Bundle) -> None:
    late = Late()
    with pytest.raises(MachineError, match="no answer within 60 s"):
        Remote(tiny_bundle, late, 1, 60).infer(np.zeros((3, 1, 8, 8), np.float32))
    assert 60 >= late.given[0] > late.given[1] > late.given[2]
    assert late.cancelled == 3


@pytest.mark.parametrize("through_the_router", [False, True])
def test_a_replica_that_ends_is_the_machine_s_fault(through_the_router: bool) -> None:
    error = ray.exceptions.ActorDiedError()
    if through_the_router:  # as Ray hands on what a replica raised
        error = ray.exceptions.RayTaskError("f", "its trace", error).as_instanceof_cause()
    with pytest.raises(MachineError, match="a replica ended meanwhile"), _faults(1):
        raise error


def test_a_fault_of_our_own_stays_one() -> None:
    error = ray.exceptions.RayTaskError("f", "its trace", ValueError("x")).as_instanceof_cause()
    with pytest.raises(ValueError, match="its trace"), _faults(1):
        raise error
