"""Clean accuracy of a model, class by class, with its calibration and the use of its experts."""
