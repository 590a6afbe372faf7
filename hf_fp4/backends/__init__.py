"""Backends of the operators."""

from . import reference as reference
