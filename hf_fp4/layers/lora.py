"""PEFT on FP4 layers. An adapter beside one is trained as beside any `nn.Linear`; it cannot be merged into one."""

from __future__ import annotations

import functools
from typing import Any

from .linear import FP4Linear


@functools.cache
def refuse_merging() -> None:
    """Have PEFT say, before it changes anything, that an adapter cannot be merged into a packed weight.

    PEFT has no place to register this: it would add to the bytes, and torch would complain about their shape.
    """
    try:
        from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    except ImportError:
        return

    check = BaseTuner._check_merge_allowed

    @functools.wraps(check)
    def checked(tuner: Any) -> None:
        check(tuner)
        for name, module in tuner.model.named_modules():
            if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), FP4Linear):
                raise ValueError(
                    f"expected unquantized layers to merge an adapter into, got FP4 weights in {name}; keep the adapter "
                    "beside them, or call dequantize() on the model first and merge then"
                )

    BaseTuner._check_merge_allowed = checked  # type: ignore[method-assign]
