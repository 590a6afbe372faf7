"""The comparison table: RTN, the paper's recipe and the defaults, for both formats, on your model and your texts.

    python examples/accuracy.py MODEL --calibration calibration.txt --text encyclopedia.txt news.txt --out results

writes `results/accuracy.json` (one record per run), `accuracy.md` (the table) and, with matplotlib, `accuracy.png`. Finished
runs are kept in the JSON file: a killed or extended comparison goes on where it was. `examples/texts.py` makes the texts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_fp4 import MRGPTQConfig, evaluate

RECIPES = ("rtn", "paper", "default")


def recipe_config(recipe: str, format: str, activations: str, **data: Any) -> MRGPTQConfig:
    """The config of one row; RTN is the plain one: absmax scales, no rotation, no data."""
    if recipe == "rtn":
        plain = {"hadamard_group_size": None, "scale_rule": "absmax", "activation_scale_rule": "absmax"}
        return MRGPTQConfig(format=format, activations=activations, method="rtn", **plain)
    if recipe == "paper":
        return MRGPTQConfig.paper(format, activations=activations, **data)
    return MRGPTQConfig(format=format, activations=activations, **data)


def spread(text: str, characters: int, places: int = 32) -> str:
    """``characters`` of a text, taken at ``places`` all over it, so that no single subject decides."""
    length = characters // places
    if len(text) <= characters:
        return text
    return "\n\n".join(text[i * (len(text) // places) :][:length] for i in range(places))


def measure(args: argparse.Namespace, run: dict[str, Any], reference: Any, tokenizer: Any) -> dict[str, Any]:
    """Quantize as ``run`` says and compare with ``reference`` on every text."""
    data = {
        "dataset": args.calibration,
        "num_samples": args.num_samples,
        "sequence_length": args.sequence_length,
        "seed": run["seed"],
    }
    start = time.perf_counter()
    config = recipe_config(run["recipe"], run["format"], run["activations"], **data)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=reference.dtype, device_map=args.device, quantization_config=config
    )
    result: dict[str, Any] = {**run, "seconds": time.perf_counter() - start, "texts": {}}
    for file in args.text:
        text = spread(Path(file).read_text(encoding="utf-8"), args.max_tokens * 6)
        scores = evaluate(model, text, tokenizer, reference=reference, max_tokens=args.max_tokens)
        result["texts"][Path(file).stem] = scores.to_dict()
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: one line per recipe, KL per text as mean (and spread over seeds)."""
    texts = list(results[0]["texts"])
    lines = [
        "| format | activations | recipe | "
        + " | ".join(f"KL {name}" for name in texts)
        + " | perplexity | top-1 |",
        "| --- | --- | --- |" + " --- |" * (len(texts) + 2),
    ]
    for (format, activations, recipe), runs in grouped(results):
        cells = [mean_and_spread([run["texts"][name]["kl_divergence"] for run in runs]) for name in texts]
        first = [run["texts"][texts[0]] for run in runs]
        perplexity = statistics.mean(score["perplexity"] for score in first)
        top1 = statistics.mean(score["top1_agreement"] for score in first)
        shown = "W4A4" if activations == "fp4" else "W4A16"
        lines.append(
            f"| {format} | {shown} | {recipe} | {' | '.join(cells)} | {perplexity:.2f} | {100 * top1:.1f} % |"
        )
    original = results[0]["texts"][texts[0]]["reference_perplexity"]
    return (
        "\n".join(lines)
        + f"\n\nPerplexity and top-1 on {texts[0]}; the original model's perplexity is {original:.2f}.\n"
    )


def grouped(results: list[dict[str, Any]]) -> list[tuple[tuple[str, str, str], list[dict[str, Any]]]]:
    """Runs that differ in the seed alone, in the order of the table."""

    def key(run: dict[str, Any]) -> tuple[str, str, str]:
        return run["format"], run["activations"], run["recipe"]

    def position(run: dict[str, Any]) -> tuple[bool, bool, int]:
        return run["format"] != "nvfp4", run["activations"] != "fp4", RECIPES.index(run["recipe"])

    return [(group, list(runs)) for group, runs in itertools.groupby(sorted(results, key=position), key)]


def mean_and_spread(values: list[float]) -> str:
    """``0.349``, or ``0.349 ± 0.002`` (half the range) for several seeds."""
    mean = statistics.mean(values)
    return f"{mean:.4f}" if len(values) == 1 else f"{mean:.4f} ± {(max(values) - min(values)) / 2:.4f}"


def plot(results: list[dict[str, Any]], file: Path) -> None:
    """Bars of the KL on the first text, a group per format and activations."""
    from matplotlib.figure import Figure

    name = next(iter(results[0]["texts"]))
    means = {
        group: statistics.mean(run["texts"][name]["kl_divergence"] for run in runs)
        for group, runs in grouped(results)
    }
    columns = list(dict.fromkeys((format, activations) for format, activations, _ in means))
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    for offset, recipe in enumerate(RECIPES):
        heights = [means.get((*column, recipe), float("nan")) for column in columns]
        bars = axes.bar([i + 0.27 * (offset - 1) for i in range(len(columns))], heights, 0.25, label=recipe)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    names = [f"{format} {'W4A4' if activations == 'fp4' else 'W4A16'}" for format, activations in columns]
    axes.set_xticks(range(len(columns)), names)
    axes.set_ylabel(f"KL to the original model, {name}")
    axes.legend()
    figure.savefig(file, dpi=150)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True, help="a text file, a Hub dataset, or builtin")
    parser.add_argument("--text", nargs="+", required=True, help="held-out text files")
    parser.add_argument("--out", type=Path, default=Path("accuracy"))
    parser.add_argument("--formats", nargs="+", default=["nvfp4", "mxfp4"], choices=["nvfp4", "mxfp4"])
    parser.add_argument("--activations", nargs="+", default=["fp4", "bf16"], choices=["fp4", "bf16"])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=16384, help="of each held-out text")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)

    args.out.mkdir(parents=True, exist_ok=True)
    record = args.out / "accuracy.json"
    results: list[dict[str, Any]] = json.loads(record.read_text()) if record.exists() else []
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, device_map=args.device)
    for format, activations, recipe, seed in itertools.product(
        args.formats, args.activations, args.recipes, args.seeds
    ):
        run = {"format": format, "activations": activations, "recipe": recipe, "seed": seed}
        if recipe == "rtn" and seed != args.seeds[0]:
            continue  # rounding to nearest has no calibration data, so nothing depends on the seed
        if any(all(done[key] == value for key, value in run.items()) for done in results):
            continue
        results.append(measure(args, run, reference, tokenizer))
        record.write_text(json.dumps(results, indent=1))
        (args.out / "accuracy.md").write_text(table(results), encoding="utf-8")
        print(f"{run}: {results[-1]['seconds']:.0f} s", flush=True)
    print(table(results))
    try:
        plot(results, args.out / "accuracy.png")
    except ImportError:
        print("no plot: pip install matplotlib")


if __name__ == "__main__":
    main()
