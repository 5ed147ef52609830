"""A file per command of ``advmoe``, named as the command is."""
