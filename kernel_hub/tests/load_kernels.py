"""Loads the package through LOCAL_KERNELS, as a user does, and traces its functions: `python load_kernels.py [LIBRARY...]`.

The libraries are loaded first: stand-ins for what a PyTorch without CUDA lacks. Nothing here runs on a GPU, which the process enforces. Prints JSON.
"""

import ctypes
import itertools
import json
import sys

import torch

REPO = "hf-fp4/hf-fp4-kernels"
CAPABILITIES = [(8, 0), (9, 0), (10, 0)]
FORMATS = {"nvfp4": (16, torch.float8_e4m3fn), "mxfp4": (32, torch.uint8)}


def refuse(*args, **kwargs):
    raise AssertionError("CUDA was initialized, and nothing here needs it")


def trace(kernels, format, activations, m, n=48, k=192):
    """Every function on tensors without data, which reach the ops' schemas and fakes but no kernel.

    They say they are on the CPU: tensors without data on a GPU would initialize CUDA where there is one.
    """
    group, scale_dtype = FORMATS[format]
    weight = torch.empty(n, k // 2, dtype=torch.uint8)
    scale = torch.empty(n, k // group, dtype=torch.uint8).view(scale_dtype)
    divisor = torch.empty(1) if format == "nvfp4" else None
    x = torch.empty(2, m, k, dtype=torch.bfloat16)
    bias = torch.empty(n, dtype=torch.bfloat16)
    prepared = kernels.prepare_weight(weight, scale, divisor)
    restored = kernels.restore_weight(*prepared, n, k)
    assert [(t.shape, t.dtype) for t in restored] == [(t.shape, t.dtype) for t in (weight, scale)]
    assert prepared.row_scale.shape == (n,) and prepared.row_scale.dtype == torch.float32
    for static in (divisor, None):
        options = {"activations": activations, "hadamard": 64, "input_global_scale": static}
        y = kernels.linear(x, *prepared, bias, **options)
        tokens = kernels.prepare_activation(x, format=format, **options)
        shared = kernels.gemm(tokens, *prepared, bias)
        several = kernels.linears(x, [prepared, prepared], [bias, None], **options)
        for result in (y, shared, *several):
            assert result.shape == (2, m, n) and result.dtype == x.dtype
        codes, scales, multiplier = kernels.rotate_quantize(x, format=format, input_global_scale=static)
        assert codes.shape == (2 * m, k // 2) and codes.dtype == torch.uint8
        assert scales.shape == (2 * m, k // group) and scales.dtype == scale_dtype
        assert multiplier.dtype == torch.float32
        assert multiplier.shape == (2 * m if format == "nvfp4" and static is None else 1,)
    trace_experts(kernels, weight, scale, divisor, x[0], activations)


def trace_experts(kernels, weight, scale, divisor, x, activations):
    if kernels._cpu.is_compiled():
        return
    experts, (n, k) = 3, (weight.shape[0], x.shape[1])
    stored = [t.expand(experts, *t.shape).contiguous() for t in (weight, scale)]
    prepared = kernels.prepare_experts(*stored, None if divisor is None else divisor.expand(experts))
    assert prepared.row_scale.shape == (experts, n) and prepared.row_scale.dtype == torch.float32
    restored = kernels.restore_weight(*prepared, n, k)
    assert [(t.shape, t.dtype) for t in restored] == [(t.shape, t.dtype) for t in stored]
    offsets = torch.empty(experts + 1, dtype=torch.int64)
    for index in (None, torch.empty(7, dtype=torch.int32)):
        y = kernels.grouped_linear(x, offsets, *prepared, index=index, activations=activations, hadamard=64)
        assert y.shape == (len(x) if index is None else 7, n) and y.dtype == x.dtype


def main(*libraries: str) -> None:
    for library in libraries:
        ctypes.CDLL(library)
    torch.cuda._lazy_init = refuse
    import kernels

    module = kernels.get_kernel(REPO, version=1, check_arch=False)
    assert not torch.cuda.is_initialized()
    from torch._subclasses.fake_tensor import FakeTensorMode

    backends = {}
    for capability in CAPABILITIES:
        torch.cuda.get_device_capability = lambda device=None, capability=capability: capability
        backends[".".join(map(str, capability))] = module.backend_of()
        with FakeTensorMode():
            for format, activations, m in itertools.product(FORMATS, ("fp4", "bf16"), (1, 20, 300, 1024)):
                trace(module, format, activations, m)
    sys.stdout.write(json.dumps({"file": module.__file__, "backends": backends}))


if __name__ == "__main__":
    main(*sys.argv[1:])
