"""FP4 (NVFP4 and MXFP4) quantization for Hugging Face transformers.

Importing this package registers the method with transformers; `from_pretrained` then quantizes a model that is loaded
with a `MRGPTQConfig`, and loads a checkpoint that was quantized before without any argument.
"""

from . import backends as backends  # registers the operators' implementations
from .compressed_tensors import export_compressed_tensors, import_compressed_tensors
from .config import MRGPTQConfig
from .evaluate import evaluate
from .layers.experts import FP4Experts
from .layers.linear import FP4Linear
from .quantizer import MRGPTQHfQuantizer
from .version import __version__ as __version__

__all__ = [
    "FP4Experts",
    "FP4Linear",
    "MRGPTQConfig",
    "MRGPTQHfQuantizer",
    "evaluate",
    "export_compressed_tensors",
    "import_compressed_tensors",
]
