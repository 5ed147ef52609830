"""Commands of ``advmoe``, a file each, named as the command is."""
