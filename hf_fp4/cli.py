"""`hf-fp4`: quantize a model, measure what that cost and how fast it is, convert it, and see what this machine can do.

The flags of `quantize` are `MRGPTQConfig`'s fields: names, types, defaults and help come from there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import traceback
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import report
from .bench import BenchSettings, bench
from .compressed_tensors import export_compressed_tensors, import_compressed_tensors
from .config import LOADING_ATTRIBUTES, MRGPTQConfig
from .doctor import examine
from .evaluate import evaluate
from .model_card import Measurement, add_measurement, size_text, unquantized_bytes
from .quantizer import MRGPTQHfQuantizer
from .version import __version__

# What a user can bring about; anything else is a bug of ours and keeps its traceback.
_EXPECTED = (ValueError, OSError, RuntimeError, ImportError, SafetensorError)
_SET_BY_A_RUN = ("modules", "calibration")
_CALIBRATION = (
    "dataset",
    "tokenizer",
    "num_samples",
    "sequence_length",
    "batch_size",
    "calibration_device",
    "seed",
    "work_dir",
)
# Where a field takes more in Python than on a command line.
_HELP = {
    "dataset": "calibration text: a Hub dataset NAME or NAME:CONFIG, a local .txt, .jsonl or .parquet file, or builtin, "
    "which needs no network",
    "num_samples": "calibration sequences",
    "sequence_length": "tokens in each of them",
    "work_dir": "keep each finished block here, so that a killed run resumes",
    "tokenizer": "a name or path; without it, the tokenizer of MODEL",
    "modules_to_not_convert": "a module that stays as it is, beside the output head, embeddings and routers; may be "
    "repeated",
}

_EXAMPLE = """\
example:
  hf-fp4 quantize Qwen/Qwen3-8B Qwen3-8B-NVFP4
  hf-fp4 evaluate Qwen3-8B-NVFP4 --reference Qwen/Qwen3-8B --text some-english.txt
  hf-fp4 doctor
  hf-fp4 bench Qwen3-8B-NVFP4 --reference Qwen/Qwen3-8B --compile

Anyone with hf-fp4 installed then loads it, after `import hf_fp4`, with
  AutoModelForCausalLM.from_pretrained("Qwen3-8B-NVFP4")
"""

_QUANTIZE_EXAMPLE = """\
examples:
  the defaults, calibrated on a sample of fineweb-edu from the Hub:
    hf-fp4 quantize Qwen/Qwen3-8B Qwen3-8B-NVFP4
  your own text, and blocks kept so that a killed run resumes:
    hf-fp4 quantize ./model ./model-mxfp4 --format mxfp4 --dataset my-text.jsonl --work-dir ./blocks
  a model that fits neither the GPU nor memory; the same command resumes:
    hf-fp4 quantize ./model ./model-nvfp4 --streaming --dataset my-text.jsonl --work-dir ./blocks
  rounding to nearest, weights only, no data:
    hf-fp4 quantize ./model ./model-rtn --method rtn --activations bf16
"""

_EVALUATE_EXAMPLE = """\
example:
  hf-fp4 evaluate ./model-nvfp4 --reference ./model --text held-out.txt --max-tokens 20000 --card
"""

_BENCH_EXAMPLE = """\
examples:
  hf-fp4 bench ./model-nvfp4 --reference ./model --compile
  hf-fp4 bench ./model-nvfp4 --batch 8 --prompt-tokens 2048 --new-tokens 128 --json result.json
"""

_EXPORT_EXAMPLE = """\
example:
  hf-fp4 quantize Qwen/Qwen3-8B Qwen3-8B-NVFP4 --hadamard-group-size none
  hf-fp4 export Qwen3-8B-NVFP4 Qwen3-8B-NVFP4-vllm
  vllm serve Qwen3-8B-NVFP4-vllm

Rotated layers cannot be exported, which is why it quantizes without rotation.
"""

_IMPORT_EXAMPLE = """\
examples:
  hf-fp4 import RedHatAI/Qwen3-32B-NVFP4 Qwen3-32B-NVFP4
  hf-fp4 import nvidia/Qwen3-8B-FP4 Qwen3-8B-NVFP4
"""

_DOCTOR_EXAMPLE = """\
examples:
  hf-fp4 doctor
  hf-fp4 doctor --kernel-repo you/your-kernels --trust-kernel-repo

A directory with a kernel package is used instead of the Hub with
  LOCAL_KERNELS=hf-fp4/hf-fp4-kernels=DIRECTORY hf-fp4 doctor
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's) and return its exit code.

    0; 1 when `doctor` finds a wrong result; 2 for a refusal.
    """
    args = build_parser().parse_args(argv)
    args.command_line = shlex.join(["hf-fp4", *(sys.argv[1:] if argv is None else argv)])
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        resume = (
            "; the same command with the same --work-dir resumes" if getattr(args, "work_dir", None) else ""
        )
        print(f"hf-fp4: interrupted{resume}", file=sys.stderr)
        return 130
    except _EXPECTED as error:
        if args.debug:
            traceback.print_exc()
        print(f"hf-fp4: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, SafetensorError):
        return f"a weight file is damaged or incomplete, download or quantize it again ({text})"
    return text


# --- flags


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _new_parser(
        argparse.ArgumentParser,
        description="Quantize a Hugging Face causal language model to FP4 (NVFP4 or MXFP4), and measure the result.",
        epilog=_EXAMPLE,
        prog="hf-fp4",
    )
    parser.add_argument("--version", action="version", version=f"hf-fp4 {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_quantize(commands)
    _add_evaluate(commands)
    _add_bench(commands)
    _add_doctor(commands)
    _add_export(commands)
    _add_import(commands)
    return parser


def _new_parser(make: Any, *names: str, **kwargs: Any) -> argparse.ArgumentParser:
    return make(*names, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)


def _add_quantize(commands: Any) -> None:
    parser = _new_parser(
        commands.add_parser,
        "quantize",
        usage="hf-fp4 quantize [options] MODEL OUT",
        help="quantize a model to FP4 and save it",
        description="Quantize MODEL to FP4 and save it, with its tokenizer, in the directory OUT.",
        epilog=_QUANTIZE_EXAMPLE,
    )
    parser.set_defaults(run=_quantize)
    parser.add_argument("model", metavar="MODEL", help="a model on the Hub, or a local directory")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory for the result")
    parser.add_argument("--overwrite", action="store_true", help="save although OUT has files in it")
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="largest weight file (default: 5GB)"
    )
    parser.add_argument(
        "--streaming",
        action="store_true",
        help="read MODEL block by block and keep finished blocks on the disk, so that a few blocks are in memory and not the "
        "model; takes the disk space of the result once more, in --work-dir or beside OUT",
    )
    parser.add_argument("--layers", action="store_true", help="at the end, one row for every layer")
    parser.add_argument(
        "--report",
        metavar="FILE.json",
        type=Path,
        help="write what became of every layer to this file, and with matplotlib a plot of it beside it",
    )
    method = parser.add_argument_group("method")
    method.add_argument(
        "--paper",
        action="store_true",
        help="start from the recipe of arXiv 2509.23202 instead of the defaults below; other flags still count",
    )
    calibration = parser.add_argument_group("calibration")
    kernels = parser.add_argument_group("GPU kernels")
    _add_config_flags({_CALIBRATION: calibration, LOADING_ATTRIBUTES: kernels}, others=method)
    _add_loading_flags(parser)


def _add_evaluate(commands: Any) -> None:
    parser = _new_parser(
        commands.add_parser,
        "evaluate",
        usage="hf-fp4 evaluate [options] MODEL --text FILE",
        help="perplexity of a model, and its distance from the original",
        description="Perplexity of MODEL on a text and, with --reference, its KL divergence from\nthe original model "
        "and how often both give the same next token.",
        epilog=_EVALUATE_EXAMPLE,
    )
    parser.set_defaults(run=_evaluate)
    parser.add_argument("model", metavar="MODEL", help="a model on the Hub, or a local directory")
    parser.add_argument("--reference", metavar="ORIGINAL", help="the model before quantization")
    parser.add_argument("--text", metavar="FILE", type=Path, required=True, help="a UTF-8 text to measure on")
    parser.add_argument(
        "--sequence-length", metavar="N", type=int, default=512, help="tokens per sequence (default: 512)"
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, help="stop after so many tokens (default: the whole text)"
    )
    parser.add_argument(
        "--batch-size", metavar="N", type=int, default=4, help="sequences at a time (default: 4)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--card", action="store_true", help="write the result into the model card in MODEL")
    _add_loading_flags(parser)


def _add_bench(commands: Any) -> None:
    parser = _new_parser(
        commands.add_parser,
        "bench",
        usage="hf-fp4 bench [options] MODEL",
        help="tokens per second of a model, next to the original",
        description="Time MODEL, and with --reference the original model, on random tokens: one forward pass\nover the "
        "prompt (prefill), and greedy generation after it (decode).",
        epilog=_BENCH_EXAMPLE,
    )
    parser.set_defaults(run=_bench)
    parser.add_argument("model", metavar="MODEL", help="a model on the Hub, or a local directory")
    parser.add_argument("--reference", metavar="ORIGINAL", help="the model before quantization")
    for name, text in (
        ("batch", "sequences at a time"),
        ("prompt_tokens", "tokens of each prompt"),
        ("new_tokens", "tokens to generate for each"),
        ("repeats", "how often each is timed"),
    ):
        default = getattr(BenchSettings, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            metavar="N",
            type=int,
            default=default,
            help=f"{text} (default: {default})",
        )
    parser.add_argument("--compile", action="store_true", help="compile the decoding step")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the result to this file as well")
    _add_loading_flags(parser, dtype="bfloat16")


def _add_doctor(commands: Any) -> None:
    parser = _new_parser(
        commands.add_parser,
        "doctor",
        usage="hf-fp4 doctor [options]",
        help="which GPU kernels run here, why not others, and whether they are right",
        description="Show versions, GPUs and what FP4 linears run on here, with the reason for each backend that\ncannot "
        "run, and check its results. Exit code 1 if a result is wrong.",
        epilog=_DOCTOR_EXAMPLE,
    )
    parser.set_defaults(run=_doctor)
    _add_config_flags({LOADING_ATTRIBUTES: parser.add_argument_group("GPU kernels")})
    _add_debug_flag(parser)


def _add_export(commands: Any) -> None:
    parser = _new_parser(
        commands.add_parser,
        "export",
        usage="hf-fp4 export [options] CHECKPOINT OUTPUT",
        help="write a quantized model as vLLM, SGLang and stock transformers load it",
        description="Write CHECKPOINT, which hf-fp4 quantized, to the directory OUTPUT in the compressed-tensors\nlayout.",
        epilog=_EXPORT_EXAMPLE,
    )
    parser.set_defaults(run=_export)
    parser.add_argument(
        "--activations",
        metavar="TYPE",
        help="bf16: weights only, from a W4A4 checkpoint as well (default: as in the checkpoint)",
    )
    _add_conversion_flags(parser)


def _add_import(commands: Any) -> None:
    parser = _new_parser(
        commands.add_parser,
        "import",
        usage="hf-fp4 import [options] CHECKPOINT OUTPUT",
        help="make a model that llm-compressor, ModelOpt or FP-Quant quantized one of hf-fp4",
        description="Write CHECKPOINT, which llm-compressor, ModelOpt or FP-Quant quantized to NVFP4 or MXFP4, to the\n"
        "directory OUTPUT as hf-fp4 loads it.",
        epilog=_IMPORT_EXAMPLE,
    )
    parser.set_defaults(run=_import)
    parser.add_argument(
        "--activation-scale-rule",
        metavar="RULE",
        help="block scales of activations: absmax, four_over_six (nvfp4) or mse (default: absmax for nvfp4, mse for "
        "mxfp4, closest to what other runtimes do)",
    )
    _add_conversion_flags(parser)


def _add_conversion_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a local directory, or a repository on the Hub"
    )
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="directory for the result")
    parser.add_argument("--revision", metavar="REF", help="branch, tag or commit of a repository on the Hub")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="write although OUTPUT has files that this command did not write",
    )
    _add_debug_flag(parser)


def _add_loading_flags(parser: argparse.ArgumentParser, dtype: str = "auto") -> None:
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--device-map",
        metavar="MAP",
        default="auto",
        help="as in from_pretrained: auto, cpu, cuda, ... (default: auto)",
    )
    group.add_argument(
        "--dtype",
        metavar="TYPE",
        default=dtype,
        help=f"bfloat16, float16, float32, or auto: as stored (default: {dtype})",
    )
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model"
    )
    _add_debug_flag(group)


def _add_debug_flag(group: argparse._ActionsContainer) -> None:
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _add_config_flags(
    groups: dict[tuple[str, ...], argparse._ArgumentGroup], others: argparse._ArgumentGroup | None = None
) -> None:
    """A flag for every field that ``groups`` name, in that group; with ``others`` for all the rest, there."""
    hints = typing.get_type_hints(MRGPTQConfig)
    docs = _field_docs(MRGPTQConfig.__doc__ or "")
    for field in fields(MRGPTQConfig):
        group = next((group for names, group in groups.items() if field.name in names), others)
        if group is None or not field.init or field.name in _SET_BY_A_RUN:
            continue
        text = _HELP.get(field.name, docs.get(field.name, ""))
        default = "" if field.default is None else f" (default: {field.default})"
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=field.name,
            default=argparse.SUPPRESS,  # only what was given is passed on: --paper has other defaults
            help=(text + default).replace("%", "%%"),
            **_flag_type(field.name, hints[field.name]),
        )


def _flag_type(name: str, hint: Any) -> dict[str, Any]:
    options = typing.get_args(hint) or (hint,)
    word = name.rpartition("_")[2].upper()
    if bool in options:
        return {"action": argparse.BooleanOptionalAction}
    if any(typing.get_origin(option) is list for option in options):
        return {"action": "append", "metavar": "NAME"}
    if int in options:
        return {"type": int, "metavar": "N"} if len(options) == 1 else {"type": _int_or_word, "metavar": word}
    if float in options:
        return {"type": float, "metavar": "X"}
    return {"metavar": word}


def _int_or_word(text: str) -> int | str | None:
    return int(text) if text.isdigit() else None if text.lower() == "none" else text


def _field_docs(docstring: str) -> dict[str, str]:
    """Name -> plain text of the entries in a docstring's `Args:` section."""
    section = re.search(r"^    Args:\n((?:^        .*\n|\n)+)", docstring, re.MULTILINE)
    docs = {}
    for entry in re.split(r"^        (?=\S)", section[1] if section else "", flags=re.MULTILINE):
        names, _, text = entry.partition(":")
        plain = re.sub(r"``\"(\w[^`]*)\"``|`+([^`]+)`+", r"\1\2", " ".join(text.split())).rstrip(".")
        docs.update({name.strip(): plain for name in names.split(",")})
    return docs


# --- quantize


def _quantize(args: argparse.Namespace) -> None:
    given = _given_fields(args)
    config = MRGPTQConfig.paper(**given) if args.paper else MRGPTQConfig(**given)
    _check_writable("--report", args.report)
    _check_target(args.out, args.model, args.overwrite)
    _check_unquantized(args)
    config.tokenizer = tokenizer = _load_tokenizer(args, given.get("tokenizer"))
    with _placement(args, config) as placement:
        model = _load_model(args, args.model, quantization_config=config, **placement)
        model.save_pretrained(args.out, max_shard_size=args.max_shard_size)
    if tokenizer is not None:
        tokenizer.save_pretrained(args.out)
    _report(args, model)
    saved = sum(file.stat().st_size for file in args.out.glob("*.safetensors"))
    print(f"{args.out}: {size_text(saved)}, was {size_text(unquantized_bytes(model))}")
    if tokenizer is None:
        print(f"{args.model} has no tokenizer, none was saved")


@contextmanager
def _placement(args: argparse.Namespace, config: MRGPTQConfig) -> Iterator[dict[str, Any]]:
    """Where the model is loaded to; with --streaming, what is not read yet and what is finished are on the disk.

    Without a work directory, finished blocks are in a directory beside OUT for as long as this lasts.
    """
    if not args.streaming:
        yield {"device_map": args.device_map}
        return
    if args.device_map != "auto":
        raise ValueError(
            f"--streaming places the model itself, got --device-map {args.device_map}; leave one of them out"
        )
    beside = next(path for path in args.out.absolute().parents if path.exists())
    with TemporaryDirectory(dir=beside, prefix=".streaming-", ignore_cleanup_errors=True) as directory:
        if config.work_dir is None:
            config.work_dir = Path(directory, "blocks")
        if config.needs_calibration:
            yield {"device_map": {"": "disk"}, "offload_folder": str(Path(directory, "converted"))}
        else:  # weights are rounded as they are read
            yield {"device_map": "cpu"}


def _report(args: argparse.Namespace, model: PreTrainedModel) -> None:
    quantizer: Any = model.hf_quantizer
    print(report.describe(quantizer.report, quantizer.skipped, every_layer=args.layers))
    if args.report is not None:
        for file in report.write(args.report, quantizer.report, quantizer.skipped):
            print(f"report: {file}")


def _given_fields(args: argparse.Namespace) -> dict[str, Any]:
    return {f.name: getattr(args, f.name) for f in fields(MRGPTQConfig) if hasattr(args, f.name)}


def _check_writable(flag: str, file: Path | None) -> None:
    """Refuse a file that cannot be written before the work, not after it."""
    if file is not None and not file.absolute().parent.is_dir():
        raise ValueError(f"{flag} must be in a directory that exists, got {file}; make it first")


def _check_target(out: Path, model: str, overwrite: bool) -> None:
    """Refuse an unusable OUT before the work, not after it."""
    if out.exists() and out.resolve() == Path(model).resolve():
        raise ValueError(f"OUT must not be MODEL itself, got {out} for both; choose another directory")
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(
            f"OUT must be a directory, got {out} where {existing} is a file; choose another name"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"OUT must be writable, got {out} where {existing} is not; choose another place")
    if existing == out and any(out.iterdir()) and not overwrite:
        raise ValueError(
            f"OUT must be new or empty, got {out} with files in it; choose another or pass --overwrite"
        )


def _check_unquantized(args: argparse.Namespace) -> None:
    """Refuse a model that transformers would load as it is, with only a warning that the flags are ignored."""
    found = AutoConfig.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    if quantization := getattr(found, "quantization_config", None):
        known = quantization if isinstance(quantization, dict) else quantization.to_dict()
        raise ValueError(
            f"MODEL must not be quantized, got {args.model}, which is ({known.get('quant_method')}); "
            "give the original model"
        )


# --- evaluate


def _evaluate(args: argparse.Namespace) -> None:
    if not args.text.is_file():  # before models are loaded
        raise ValueError(f"--text must be a file, got {args.text}; check the path")
    if args.card and not Path(args.model).is_dir():
        raise ValueError(f"--card writes into MODEL, a directory that hf-fp4 saved, got {args.model}")
    tokenizer = _load_tokenizer(args, args.model)
    model = _load_model(args, args.model)
    if args.card and not isinstance(getattr(model, "hf_quantizer", None), MRGPTQHfQuantizer):
        raise ValueError(
            f"--card writes into MODEL, a directory that hf-fp4 saved, got {args.model}, another model"
        )
    reference = _load_model(args, args.reference) if args.reference else None
    result = evaluate(
        model,
        args.text,
        tokenizer,
        reference=reference,
        sequence_length=args.sequence_length,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
    )
    if args.card:
        add_measurement(model, Path(args.model), Measurement(args.text.name, result.to_dict()))
    print(json.dumps(result.to_dict()) if args.json else result)


# --- bench and doctor


def _bench(args: argparse.Namespace) -> None:
    settings = BenchSettings(args.batch, args.prompt_tokens, args.new_tokens, args.compile, args.repeats)
    _check_writable("--json", args.json)
    result = bench(lambda name: _load_model(args, name), args.model, args.reference, settings)
    print("\n".join(["", *report.table(result.rows()), "", *result.notes(), args.command_line]))
    if args.json:
        values = {**result.to_dict(), "command": args.command_line}
        args.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _doctor(args: argparse.Namespace) -> int:
    config = MRGPTQConfig(**_given_fields(args))
    return 0 if examine(config.kernel_source) else 1


# --- export and import


def _export(args: argparse.Namespace) -> None:
    kwargs = {"activations": args.activations, "revision": args.revision, "overwrite": args.overwrite}
    print(f"written: {export_compressed_tensors(args.checkpoint, args.output, **kwargs)}")


def _import(args: argparse.Namespace) -> None:
    kwargs = {"revision": args.revision, "overwrite": args.overwrite}
    rule = args.activation_scale_rule
    out = import_compressed_tensors(args.checkpoint, args.output, activation_scale_rule=rule, **kwargs)
    print(f"written: {out}")


# --- loading


def _load_model(args: argparse.Namespace, name: str, **kwargs: Any) -> PreTrainedModel:
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype, None)
    if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"--dtype must be auto, bfloat16, float16 or float32, got {args.dtype}")
    placement = {"device_map": args.device_map, **kwargs}
    return AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, trust_remote_code=args.trust_remote_code, **placement
    )


def _load_tokenizer(args: argparse.Namespace, name: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer `name`; where that is None, the one beside the model or, as some models have none, None."""
    try:
        return AutoTokenizer.from_pretrained(name or args.model, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if name is not None:
            raise ValueError(f"{name} has no tokenizer that can be loaded: {error}") from error
        return None


if __name__ == "__main__":
    sys.exit(main())
