"""Quantize a model so that both hf-fp4 and vLLM can load it: save it, put it on the Hub if you like, export it for vLLM.

    python examples/share_and_serve.py Qwen/Qwen3-8B quantized
    python examples/share_and_serve.py Qwen/Qwen3-8B quantized --push you/Qwen3-8B-NVFP4   # private; or add --public

`quantized/model` is for hf-fp4. A model card (README.md) lies in it, which says what was quantized, how, and how to load it.
`quantized/vllm` is the same model in the compressed-tensors layout, which vLLM and SGLang read without hf-fp4.

Those do not rotate the input of a layer, so this quantizes without rotation (`hadamard_group_size=None`). If you don't need
them, leave that out: the default is closer to the original model. To push, log in first with `hf auth login`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_fp4 import MRGPTQConfig, export_compressed_tensors


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the model to quantize: a directory or a Hub name")
    parser.add_argument("output", type=Path, help="directory for both versions")
    parser.add_argument("--push", metavar="YOU/NAME", help="a repository on the Hub to upload to")
    parser.add_argument("--public", action="store_true", help="make a new repository visible to everyone")
    parser.add_argument("--format", default="nvfp4", choices=["nvfp4", "mxfp4"])
    parser.add_argument("--dataset", default="builtin", help="calibration text: a file or a Hub dataset")
    parser.add_argument("--num-samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens in each of them")
    args = parser.parse_args()

    config = MRGPTQConfig(
        format=args.format,
        hadamard_group_size=None,
        dataset=args.dataset,
        num_samples=args.num_samples,
        sequence_length=args.sequence_length,
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, device_map="auto", quantization_config=config
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    saved = args.output / "model"
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    print(f"The model: {saved}\nIts card:  {saved / 'README.md'}")
    print("Put what it lost into the card, measured on a text of yours, with")
    print(f"  hf-fp4 evaluate {saved} --reference {args.model} --text my_text.txt --card")

    exported = export_compressed_tensors(saved, args.output / "vllm")
    print(f"Serve it with\n  vllm serve {exported}")

    if args.push:
        model.push_to_hub(args.push, private=not args.public)
        tokenizer.push_to_hub(args.push)
        print(f"Uploaded to {args.push}")


if __name__ == "__main__":
    main()
