"""What a run did to every layer: a table for the terminal, JSON, and a plot."""

from __future__ import annotations

import json
import re
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from .calibration.driver import LayerReport
from .layers.replace import describe_skipped


def write(file: Path, report: list[LayerReport], skipped: dict[str, str]) -> list[Path]:
    """Write the report as JSON to ``file``, and if matplotlib is there and errors were measured, a plot beside it.

    Returns:
        The files that were written.
    """
    content = {"layers": [asdict(row) for row in report], "skipped": skipped}
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    picture = file.with_suffix(".png")
    if all(row.error is None for row in report):
        return [file]
    try:
        _plot(report, picture)
    except ImportError:
        return [file]
    return [file, picture]


def _plot(report: list[LayerReport], file: Path) -> None:
    """Error of every layer by block, one line per kind of linear; dashed: if it were rounded to nearest."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for kind, rows in _by_kind(report).items():
        pairs = [
            (row.error, row.rounded_error)
            for row in rows
            if row.error is not None and row.rounded_error is not None
        ]
        blocks = range(len(pairs))
        (line,) = axes.plot(blocks, [error for error, _ in pairs], label=kind.rpartition("*.")[2])
        axes.plot(blocks, [rounded for _, rounded in pairs], "--", color=line.get_color(), alpha=0.5)
    axes.set_yscale("log")
    axes.set_xlabel("block")
    axes.set_ylabel("squared output error over squared output")
    axes.set_title("solid: as quantized, dashed: rounded to nearest", fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)


def describe(report: list[LayerReport], skipped: dict[str, str], *, every_layer: bool) -> str:
    """The table of converted linears, and why others were not converted."""
    if every_layer:
        header: tuple[str, ...] = ("module", "Hadamard", "rounded", "error")
    else:
        header = ("module", "layers", "Hadamard", "rounded", "error", "worst")
    rows = [_layer_row(row) for row in report] if every_layer else _kind_rows(report)
    measured = any(row.error is not None for row in report)
    columns = len(header) if measured else header.index("rounded")
    lines = ["", *table([row[:columns] for row in (header, *rows)])]
    if measured:
        lines.append(
            "error: squared error of a layer's output over its squared output, on the calibration data; rounded: the same for "
            "rounding to nearest"
        )
    if skipped:
        lines.append(f"not converted: {describe_skipped(skipped)}")
    return "\n".join([*lines, ""])


def _layer_row(row: LayerReport) -> tuple[str, ...]:
    return row.name, str(row.hadamard_size or "none"), _percent(row.rounded_error), _percent(row.error)


def _kind_rows(report: Iterable[LayerReport]) -> list[tuple[str, ...]]:
    """One row for each linear of a block: `model.layers.*.mlp.up_proj`."""
    rows: list[tuple[str, ...]] = []
    for kind, members in _by_kind(report).items():
        sizes = Counter(row.hadamard_size or 0 for row in members)
        hadamard = ", ".join(
            f"{size or 'none'}" + (f" x{n}" if len(sizes) > 1 else "") for size, n in sorted(sizes.items())
        )
        measured = [(row.error, row.name) for row in members if row.error is not None]
        means = [_mean([getattr(row, field) for row in members]) for field in ("rounded_error", "error")]
        worst, where = max(measured, default=(None, ""))
        layer = "".join(re.findall(r"(?<![^.])\d+(?![^.])", where)[:1])
        rows.append(
            (
                kind,
                str(len(members)),
                hadamard,
                *map(_percent, means),
                _percent(worst) + (f" in {layer}" if layer else ""),
            )
        )
    return rows


def _by_kind(report: Iterable[LayerReport]) -> dict[str, list[LayerReport]]:
    """The layers of each `model.layers.*.mlp.up_proj`."""
    kinds: dict[str, list[LayerReport]] = {}
    for row in report:
        kinds.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", row.name), []).append(row)
    return kinds


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of text with the columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"
