"""The `llorch` command, and home: the whole system in one process on one machine."""

from importlib.metadata import version

__version__ = version("llorch")
