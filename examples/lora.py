"""Fine-tune a model with LoRA on a text file while its weights stay in 4 bits; the adapter is a few megabytes.

    pip install peft
    python examples/lora.py Qwen3-8B-NVFP4 my_text.txt my-adapter
    python examples/lora.py Qwen/Qwen3-8B my_text.txt my-adapter   # quantizes it first, into my-adapter/base

The adapter is reloaded at the end as anyone would load it. It belongs to the quantized model that it was trained on: beside
another quantization of the same model, or beside the original, it is a little off.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_fp4 import MRGPTQConfig


def quantized(model: str, target: Path, rows: list[dict[str, torch.Tensor]]) -> str:
    """The quantized model: the one that was named, or what is made of it in ``target``, calibrated on ``rows``."""
    if getattr(AutoConfig.from_pretrained(model), "quantization_config", None) is not None:
        return model
    tokens = [row["input_ids"] for row in rows[:128]]
    config = MRGPTQConfig(
        format="nvfp4", dataset=tokens, num_samples=len(tokens), sequence_length=len(tokens[0])
    )
    AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, device_map="auto", quantization_config=config
    ).save_pretrained(target)
    AutoTokenizer.from_pretrained(model).save_pretrained(target)
    return str(target)


def pieces(text: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, torch.Tensor]]:
    """The text in pieces of ``length`` tokens; what is left at the end is dropped."""
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    rows = tokens[: len(tokens) // length * length].view(-1, length)
    if len(rows) < 2:
        raise SystemExit(f"the text must have at least {2 * length} tokens, it has {len(tokens)}")
    return [{"input_ids": row, "labels": row} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", help="a quantized checkpoint, or a model to quantize: a directory or a Hub name"
    )
    parser.add_argument("text", type=Path, help="a text file; its last tenth is kept to measure on")
    parser.add_argument("output", type=Path, help="directory for the adapter")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=512)
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = pieces(args.text.read_text(encoding="utf-8"), tokenizer, args.sequence_length)
    held_out = max(1, len(rows) // 10)
    base = quantized(args.model, args.output / "base", rows[:-held_out])

    model = AutoModelForCausalLM.from_pretrained(base, device_map="auto")
    set_seed(0)  # of the adapter's first weights
    model = get_peft_model(model, LoraConfig(r=args.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    arguments = TrainingArguments(
        output_dir=str(args.output),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        save_strategy="no",
        report_to="none",
    )

    def evaluator(model: torch.nn.Module) -> Trainer:
        return Trainer(
            model=model, args=arguments, train_dataset=rows[:-held_out], eval_dataset=rows[-held_out:]
        )

    trainer = evaluator(model)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    model.save_pretrained(args.output)

    reloaded = AutoPeftModelForCausalLM.from_pretrained(args.output, device_map="auto")
    again = evaluator(reloaded).evaluate()["eval_loss"]
    print(f"\nOn {held_out} pieces that were not trained on:")
    for label, loss in (("before", before), ("after", after), ("reloaded", again)):
        print(f"{label:9} loss {loss:.4f}, perplexity {math.exp(loss):.2f}")


if __name__ == "__main__":
    main()
