"""Quantize SmolLM2-135M-Instruct to NVFP4, ask it a question before and after, and measure what was lost.

    python examples/quickstart.py OUTPUT_DIRECTORY

Needs no network and no GPU: see smollm2.py for where the model comes from. The calibration text is written by the
model itself (`dataset="builtin"`), and the result is measured on held_out.txt, which was written for this purpose.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from smollm2 import write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_fp4 import MRGPTQConfig, evaluate

QUESTION = "What is the capital of France, and what is it known for?"
HELD_OUT = Path(__file__).with_name("held_out.txt")


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """What the model replies, always its most likely words."""
    chat = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs.to(model.device), max_new_tokens=60, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def weight_bytes(directory: Path) -> int:
    """Size of the weights in a checkpoint."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def run(source: Path, target: Path, config: MRGPTQConfig) -> None:
    """Quantize the checkpoint in ``source`` into ``target`` and print how the two compare."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    before = answer(original, tokenizer, QUESTION)

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, quantization_config=config)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    seconds = time.perf_counter() - start

    quantized = AutoModelForCausalLM.from_pretrained(target)  # as anyone would load it
    after = answer(quantized, tokenizer, QUESTION)
    result = evaluate(quantized, HELD_OUT.read_text(encoding="utf-8"), tokenizer, reference=original)

    print(f"\nQuestion: {QUESTION}")
    print(f"\nBefore:   {before}")
    print(f"\nAfter:    {after}")
    print(
        f"\nWeights:  {weight_bytes(source) / 1e6:.0f} MB before, {weight_bytes(target) / 1e6:.0f} MB after"
    )
    print(f"Time:     {seconds:.0f} s to calibrate, quantize and save into {target}")
    print(f"\nOn {HELD_OUT.name}, against the original model:\n{result}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="directory for both checkpoints")
    parser.add_argument("--model", type=Path, help="another checkpoint than SmolLM2, with a chat template")
    parser.add_argument("--num-samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=256)
    args = parser.parse_args()

    source = args.model or write_checkpoint(args.output / "smollm2-bf16")
    config = MRGPTQConfig(
        format="nvfp4",
        dataset="builtin",
        num_samples=args.num_samples,
        sequence_length=args.sequence_length,
    )
    run(source, args.output / "smollm2-nvfp4", config)


if __name__ == "__main__":
    main()
