"""How fast is a model: prefill and decoding in tokens per second, with a static cache, and next to the original model."""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StaticCache
from transformers.utils import logging

from .doctor import describe_device, versions
from .layers.linear import FP4Linear
from .model_card import size_text

_COMPILE: dict[str, Any] = {"fullgraph": True, "mode": "reduce-overhead"}
"""How the decoding step is compiled; what `generate` does by default on a GPU, but a graph break is an error."""


@dataclass(frozen=True)
class BenchSettings:
    """What is timed.

    Attributes:
        batch: sequences at a time.
        prompt_tokens: tokens of each prompt, at least 1.
        new_tokens: tokens generated for each, at least 2: the first belongs to the prefill.
        compile: whether the decoding step is compiled.
        repeats: how often each is timed after the warm-up.
    """

    batch: int = 1
    prompt_tokens: int = 512
    new_tokens: int = 64
    compile: bool = False
    repeats: int = 5

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("prompt_tokens", 1), ("new_tokens", 2), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Rate:
    """Tokens per second: the median of the repeats, the slowest and the fastest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, tokens: int, seconds: list[float]) -> Rate:
        """From the times that ``tokens`` tokens took."""
        rates = [tokens / second for second in seconds]
        return cls(statistics.median(rates), min(rates), max(rates))

    def __str__(self) -> str:
        return f"{_number(self.median)} ({_number(self.low)} to {_number(self.high)})"


@dataclass(frozen=True)
class Measurement:
    """One model.

    Attributes:
        name: what it was loaded from.
        prefill: prompt tokens per second, of all sequences together.
        decode: new tokens per second, of all sequences together.
        weight_bytes: what its parameters and buffers take.
        read_per_second: bytes of weights, without input embeddings that are only looked up, times decoding steps per second;
            memory bandwidth is the bound of this (a mixture of experts reads less than all).
        peak_bytes: most GPU memory in use from the warm-up on, all GPUs together; None without a GPU.
        linears: backend -> how many FP4 linears run on it.
    """

    name: str
    prefill: Rate
    decode: Rate
    weight_bytes: int
    read_per_second: float
    peak_bytes: int | None
    linears: dict[str, int]


@dataclass(frozen=True)
class BenchResult:
    """One or two measurements and what they were made with; the second is the reference."""

    settings: BenchSettings
    models: list[Measurement]
    dtype: str
    devices: list[str]
    versions: dict[str, str] = field(default_factory=dict)

    def ratio(self) -> dict[str, float | None]:
        """The first model over the reference; above 1 is faster, or larger."""
        model, reference = self.models
        peaks = (model.peak_bytes, reference.peak_bytes)
        return {
            "prefill": model.prefill.median / reference.prefill.median,
            "decode": model.decode.median / reference.decode.median,
            "peak_bytes": None if peaks[0] is None or not peaks[1] else peaks[0] / peaks[1],
            "weight_bytes": model.weight_bytes / reference.weight_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "ratio": self.ratio() if len(self.models) == 2 else None}

    def rows(self) -> list[tuple[str, ...]]:
        """A table: one row for each model, and one for the ratio."""
        rows: list[tuple[str, ...]] = [
            ("model", "prefill tokens/s", "decode tokens/s", "peak memory", "weights", "weights read")
        ]
        for m in self.models:
            rows.append(
                (
                    m.name,
                    str(m.prefill),
                    str(m.decode),
                    "-" if m.peak_bytes is None else size_text(m.peak_bytes),
                    size_text(m.weight_bytes),
                    f"{size_text(m.read_per_second)}/s",
                )
            )
        if len(self.models) == 2:
            cells = ("-" if value is None else f"{value:.2f}" for value in self.ratio().values())
            rows.append(("ratio", *cells, ""))
        return rows

    def notes(self) -> list[str]:
        """What a reader of the table has to know."""
        s = self.settings
        step = f"decoding step compiled {_COMPILE}" if s.compile else "decoding step not compiled"
        lines = [
            f"{self.dtype}, batch {s.batch}, {s.prompt_tokens} prompt tokens, {s.new_tokens} new, static cache; {step}",
            f"tokens/s: median (slowest to fastest) of {s.repeats}",
            "weights read: weights without looked-up embeddings, once for each decoding step; bounded by memory bandwidth",
        ]
        for m in self.models:
            if m.linears:
                backends = ", ".join(f"{count} on {backend}" for backend, count in m.linears.items())
                lines.append(f"FP4 linears of {m.name}: {backends}")
        lines += [f"device: {device}" for device in self.devices]
        return [*lines, ", ".join(f"{name} {version}" for name, version in self.versions.items())]


def bench(
    load: Callable[[str], PreTrainedModel],
    model: str,
    reference: str | None,
    settings: BenchSettings,
    *,
    progress: bool = True,
) -> BenchResult:
    """Time ``model`` and then ``reference``; only one of them is in memory at a time.

    Args:
        load: name -> model, on its devices.
        model, reference: names for ``load``; no reference: ``model`` alone.
        settings: what to time.
        progress: show a progress bar.

    Raises:
        ValueError: a model cannot take so many tokens, or has no static cache.
        RuntimeError: logits are not finite, or the decoding step cannot be compiled.
    """
    measured: list[Measurement] = []
    dtype, devices = "", []
    for name in [model, *([] if reference is None else [reference])]:
        loaded = load(name)
        dtype = str(loaded.dtype).removeprefix("torch.")
        devices = [describe_device(device) for device in _devices(loaded)]
        measured.append(measure(loaded, name, settings, progress=progress))
        del loaded
        _free()
    return BenchResult(settings, measured, dtype, devices, versions())


def _free() -> None:
    torch.compiler.reset()  # compiled code holds on to the model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(
    model: PreTrainedModel, name: str, settings: BenchSettings, *, progress: bool = True
) -> Measurement:
    """Warm up and time one model, see `bench`. The tokens are random, the same in every run."""
    _check(model, name, settings)
    run = _Run(model, name, settings)
    warm_ups = 2 if settings.compile else 1  # CUDA graphs are recorded after the first calls of compiled code
    gpus = [device for device in run.devices if device.type == "cuda"]
    for device in gpus:
        torch.cuda.reset_peak_memory_stats(device)
    prefill, decode = [], []
    with logging.tqdm(total=2 * (warm_ups + settings.repeats), disable=not progress) as bar:
        for i in range(warm_ups + settings.repeats):
            stage = "Timing" if i >= warm_ups else "Compiling" if settings.compile else "Warming up"
            bar.set_description(f"{stage} {name}")
            prefill.append(run.prefill())
            bar.update()
            decode.append(run.decode())
            bar.update()
    step = statistics.median(decode[warm_ups:]) / (settings.new_tokens - 1)
    return Measurement(
        name,
        Rate.of(settings.batch * settings.prompt_tokens, prefill[warm_ups:]),
        Rate.of(settings.batch * (settings.new_tokens - 1), decode[warm_ups:]),
        _bytes(model),
        (_bytes(model) - _looked_up_bytes(model)) / step,
        sum(map(torch.cuda.max_memory_allocated, gpus)) if gpus else None,
        dict(Counter(m.kernels.backend for m in model.modules() if isinstance(m, FP4Linear))),
    )


def _check(model: PreTrainedModel, name: str, settings: BenchSettings) -> None:
    """Refuse what would fail in the middle, or time something else than it says."""
    total = settings.prompt_tokens + settings.new_tokens
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and total > limit:
        raise ValueError(
            f"prompt_tokens + new_tokens must be at most max_position_embeddings of {name}, {limit}, got {total}; "
            "lower them"
        )
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise ValueError(
            f"all of {name} must be in GPU memory or all of it on the CPU, got device_map {sorted(places)}; "
            "pass --device-map cpu, or use a larger GPU"
        )


class _Run:
    """A model, its prompt and its cache; the cache is made once, as CUDA graphs are tied to its place in memory."""

    def __init__(self, model: Any, name: str, settings: BenchSettings):
        self.model, self.name, self.settings = model.eval(), name, settings
        self.devices = _devices(model)
        embeddings = model.get_input_embeddings().weight
        shape = (settings.batch, settings.prompt_tokens)
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(len(embeddings), shape, generator=generator).to(embeddings.device)
        cache = StaticCache(config=model.config, max_cache_len=settings.prompt_tokens + settings.new_tokens)
        # transformers 5.24 renamed the argument.
        renamed = "cache" in inspect.signature(model.forward).parameters
        self.cache, self.cached = cache, {"cache" if renamed else "past_key_values": cache}

    def prefill(self) -> float:
        """Seconds of one forward pass over the prompt, of which the last token's logits are computed."""
        keep = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        self.cache.reset()
        start = self._now()
        with torch.no_grad():
            logits = self.model(input_ids=self.ids, use_cache=True, **self.cached, **keep).logits
        seconds = self._now() - start
        if not bool(torch.isfinite(logits[:, -1]).all()):
            raise RuntimeError(_NOT_FINITE.format(self.name))
        if int(self.cache.get_seq_length()) != self.settings.prompt_tokens:
            raise ValueError(
                f"{self.name} must take a static cache, got {type(self.model).__name__}, which does not"
            )
        return seconds

    def decode(self) -> float:
        """Seconds that `generate` takes from the prompt's logits to its end: new_tokens - 1 steps."""
        self.cache.reset()
        clock = _Clock(self._now)
        count = self.settings.new_tokens
        ids = self.model.generate(
            self.ids,
            attention_mask=torch.ones_like(self.ids),
            **self.cached,
            logits_processor=LogitsProcessorList([clock]),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_k=None,
            top_p=None,
            pad_token_id=0,
            **self._compilation(),
        )
        seconds = self._now() - clock.start
        if clock.found_nan():
            raise RuntimeError(_NOT_FINITE.format(self.name))
        got = ids.shape[1] - self.settings.prompt_tokens
        if got != count or clock.calls != count:
            raise RuntimeError(
                f"{self.name} must generate {count} tokens, got {got} in {clock.calls} steps; its generation_config ends "
                "or skips steps"
            )
        if self.settings.compile and not hasattr(self.model, "_compiled_call"):
            raise RuntimeError(
                f"transformers does not compile {type(self.model).__name__}; leave out --compile"
            )
        return seconds

    def _compilation(self) -> dict[str, Any]:
        if not self.settings.compile:
            return {"disable_compile": True}
        config: Any = CompileConfig(**_COMPILE)
        config._compile_all_devices = True  # on a CPU too, where `generate` would not
        return {"compile_config": config}

    def _now(self) -> float:
        """The time when everything that was started has ended."""
        for device in self.devices:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        return time.perf_counter()


_NOT_FINITE = "logits must be finite, got NaN or inf from {}; check its weights and its dtype"


class _Clock(LogitsProcessor):
    """Starts when `generate` has the prompt's logits; changes nothing."""

    def __init__(self, now: Callable[[], float]):
        self._now, self.calls, self.start = now, 0, 0.0
        self._last: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``scores`` as they are."""
        if self.calls == 0:
            self.start = self._now()
        self.calls += 1
        self._last = scores
        return scores

    def found_nan(self) -> bool:
        """Whether the last logits hold NaN; -inf is what `min_new_tokens` puts there."""
        return self._last is None or bool(self._last.isnan().any())


def _devices(model: nn.Module) -> list[torch.device]:
    tensors = (*model.parameters(), *model.buffers())
    return sorted({t.device for t in tensors if not t.is_meta}, key=str)


def _bytes(model: nn.Module) -> int:
    """Parameters and buffers; tied ones count once."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def _looked_up_bytes(model: Any) -> int:
    """The input embeddings, of which a step reads only some rows, unless they are the output head as well."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embeddings.weight:
        return 0
    return embeddings.weight.numel() * embeddings.weight.element_size()


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
