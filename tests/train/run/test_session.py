"""What a run says before its first step."""

from advmoe_deploy.train.run.session import announced
from tests.toy_training import tiny


def test_steps_that_take_longer_are_told_until_they_come() -> None:
    config = tiny("digits-advmoe", "epochs=4", "shared_start=0.5")
    longer = "; from epoch 3 on steps take longer, for the router"
    told = "epochs: 4, then a test that no time left counts (1,000 images, PGD-2)"
    assert announced(config, 1000, 0) == announced(config, 1000, 1) == told + longer
    assert announced(config, 1000, 2) == told
    assert announced(tiny("digits-advmoe", "epochs=1"), 9, 0).startswith("epochs: 1, then a test")
