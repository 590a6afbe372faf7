"""Quantize a model that is larger than your GPU: it stays in CPU memory, and its blocks visit the GPU one at a time.

    python examples/big_model.py meta-llama/Llama-3.3-70B-Instruct my_text.txt quantized
    torchrun --nproc-per-node 4 examples/big_model.py ...   # the same arguments, on four GPUs
    python examples/big_model.py ... --streaming            # for a model that is larger than CPU memory, too

The CPU memory must hold the model in bfloat16 (2 bytes per parameter); the GPU only one block and what it computes. With
--streaming the model stays on the disk, and memory holds a few blocks of it. With torchrun each process has a GPU and a share of
the calibration text, and each holds the model: four processes need four times the memory. All of them end with the same model,
and the first one saves it.

Finished blocks are kept in `quantized/blocks`: if the run is killed, the same command goes on where it was. When it is done,
they may be deleted; the model is in `quantized/model`. Without a GPU everything runs on the CPU, which is where this script
was tested.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_fp4 import MRGPTQConfig


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the model to quantize: a directory or a Hub name")
    parser.add_argument("data", help="calibration text: a .txt, .jsonl or .parquet file, or a Hub dataset")
    parser.add_argument("output", type=Path, help="directory for everything that is written")
    parser.add_argument("--format", default="nvfp4", choices=["nvfp4", "mxfp4"])
    parser.add_argument("--num-samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--sequence-length", type=int, default=2048, help="tokens in each of them")
    parser.add_argument(
        "--batch-size", type=int, default=8, help="sequences at a time; fewer need less memory"
    )
    parser.add_argument("--streaming", action="store_true", help="leave the model on the disk")
    args = parser.parse_args()

    together = "LOCAL_RANK" in os.environ  # torchrun sets it: which of a machine's processes this is
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else None
    if gpu:
        torch.cuda.set_device(gpu)
    if together:
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")

    config = MRGPTQConfig(
        format=args.format,
        dataset=args.data,
        num_samples=args.num_samples,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        calibration_device=gpu,
        work_dir=args.output / "blocks",
    )
    placement = {"device_map": "cpu"}
    if args.streaming:
        placement = {"device_map": {"": "disk"}, "offload_folder": str(args.output / "offload")}
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, quantization_config=config, **placement
    )
    if not together or dist.get_rank() == 0:  # all processes hold the same model
        model.save_pretrained(args.output / "model")
        AutoTokenizer.from_pretrained(args.model).save_pretrained(args.output / "model")
        print(f"Saved in {args.output / 'model'}")
    if together:
        dist.barrier()  # wait until it is saved
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
