"""Quantize a model with your own text or chats as calibration data, and measure the result on text that was held out.

    python examples/own_data.py Qwen/Qwen3-8B my_chats.jsonl held_out.txt quantized

The calibration text decides which errors matter, so take what the model will see when it is used. A .txt file is one long
text. In a .jsonl file each line is {"text": "..."} or a chat, {"messages": [{"role": "user", "content": "..."}, ...]}.
`held_out.txt` should be of the same kind and must not be part of the calibration data.

Everything is written below the last argument: the model in `model/`, what became of each layer in `report.json` (with
matplotlib, a plot beside it), and finished blocks in `blocks/`. If the run is killed, the same command goes on where it was;
when it is done, `blocks/` may be deleted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_fp4 import MRGPTQConfig, evaluate, report


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the model to quantize: a directory or a Hub name")
    parser.add_argument("data", type=Path, help="calibration data: a .txt, .jsonl or .parquet file")
    parser.add_argument("held_out", type=Path, help="a text file to measure on")
    parser.add_argument("output", type=Path, help="directory for everything that is written")
    parser.add_argument("--format", default="nvfp4", choices=["nvfp4", "mxfp4"])
    parser.add_argument("--num-samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens in each of them")
    args = parser.parse_args()
    if not args.held_out.is_file():  # better now than after the work
        parser.error(f"there is no file {args.held_out}")

    config = MRGPTQConfig(
        format=args.format,
        dataset=str(args.data),
        num_samples=args.num_samples,
        sequence_length=args.sequence_length,
        work_dir=args.output / "blocks",
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, device_map="auto", quantization_config=config
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model.save_pretrained(args.output / "model")
    tokenizer.save_pretrained(args.output / "model")

    layers, skipped = model.hf_quantizer.report, model.hf_quantizer.skipped
    report.write(args.output / "report.json", layers, skipped)
    print(report.describe(layers, skipped, every_layer=False))

    original = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, device_map="auto")
    result = evaluate(model, args.held_out, tokenizer, reference=original)
    print(f"On {args.held_out.name}, against the original model:\n{result}")


if __name__ == "__main__":
    main()
