"""The version of the package, which installers read from this file without importing it."""

__version__ = "0.1.0"
