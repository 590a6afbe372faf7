"""Backends of the operators: `select` finds the best for a device; the reference runs everywhere."""

from . import reference as reference
from .hub import BACKENDS as BACKENDS
from .hub import DEVICE_BACKENDS as DEVICE_BACKENDS
from .hub import REFERENCE as REFERENCE
from .hub import Kernels as Kernels
from .hub import KernelSource as KernelSource
from .hub import describe as describe
from .hub import device_context as device_context
from .hub import fake_quantize as fake_quantize
from .hub import fake_quantizes as fake_quantizes
from .hub import input_arguments as input_arguments
from .hub import quantize_input as quantize_input
from .hub import select as select
