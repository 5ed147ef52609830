"""Command line: the command ``advmoe``."""

from advmoe_deploy.process import prepare

prepare()  # here, before any module of the command can load a library that reads the environment
