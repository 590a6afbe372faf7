"""Rounding while loading: the unquantized model is never in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

PEAK = """
import sys, threading, time
import torch, transformers, hf_fp4
from transformers import AutoModelForCausalLM

def anonymous() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

peak, done = [0], threading.Event()
def watch():
    while not done.is_set():
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.002)

torch.set_num_threads(1)
warm = torch.randn(64, 64) @ torch.randn(64, 64)
start = anonymous()
threading.Thread(target=watch, daemon=True).start()
options = {"quantization_config": hf_fp4.MRGPTQConfig(method="rtn", activations="bf16")} if sys.argv[2] == "fp4" else {}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16, **options)
for parameter in model.parameters():
    parameter.data = parameter.data.clone()  # mapped from the file until it is touched
done.set()
print((peak[0] if options else anonymous()) - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads RssAnon from /proc")
def test_the_unquantized_model_is_never_in_memory(tmp_path):
    config = LlamaConfig(
        vocab_size=64, hidden_size=512, intermediate_size=1536, num_hidden_layers=24, num_attention_heads=8
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path)

    def grown(kind: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(tmp_path), kind], capture_output=True, text=True, check=True
        )
        return int(done.stdout.split()[-1])

    assert size > 150e6
    assert grown("bf16") > 0.9 * size  # so the measure sees a model that is in memory
    assert grown("fp4") < 0.6 * size
