"""The pictures of a run, from its JSON alone: bars of every engine, and the roofline.

python benchmarks/suite/plots.py RESULTS.json --bars FILE.png --roofline FILE.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

OURS, PEERS, LIMIT = "#1f6f8b", "#b8b8b8", "#c0392b"
MARKS = {"prefill": "s", "decode": "o", "decode, batch": "^"}
COLOURS = {"bf16": "#1f6f8b", "int8": "#d98e04", "int4": "#7d3c98"}


def draw_bars(results: Mapping[str, Any], path: Path) -> None:
    """Seconds of every engine in each phase; a line where the limit is."""
    import matplotlib.pyplot as plt

    phases = list(dict.fromkeys(row["phase_name"] for row in results["rows"]))
    most = max(sum(row["phase_name"] == phase for row in results["rows"]) for phase in phases)
    figure, axes = plt.subplots(len(phases), 1, figsize=(8, len(phases) * (0.9 + 0.24 * most)), squeeze=False)
    for axis, phase in zip(axes[:, 0], phases, strict=True):
        rows = sorted((row for row in results["rows"] if row["phase_name"] == phase), key=_seconds, reverse=True)
        places = range(len(rows))
        axis.barh(
            places, [1000 * _seconds(row) for row in rows], color=[OURS if row["ours"] else PEERS for row in rows]
        )
        for place, row in ((place, row) for place, row in enumerate(rows) if row["limit_seconds"] is not None):
            axis.plot([1000 * row["limit_seconds"]] * 2, [place - 0.45, place + 0.45], color=LIMIT, linewidth=2)
        axis.set_yticks(places, [row["engine"] for row in rows], fontsize=8)
        axis.set_title(f"{phase}: ms, shorter is better; red: the limit", fontsize=9, loc="left")
    figure.suptitle(_caption(results), fontsize=8)
    _save(figure, path)


def draw_roofline(results: Mapping[str, Any], path: Path) -> None:
    """Operations a second over operations per byte of weights and cache; ours filled, the best peer hollow."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7.5, 5))
    limit = results["limits"].get("decode") or next(iter(results["limits"].values()))
    products = results["limits"].get("prefill", limit)
    intensity = [2 ** (power / 8) for power in range(-16, 97)]
    for kind, style in (("bf16", "-"), ("int8", "--")):
        top = products[kind]["rate"]
        roof = [min(x * limit["sum"]["rate"], top) for x in intensity]
        axis.plot(intensity, roof, style, color="black", linewidth=1, label=f"limit, products of {kind}")
    for row in _points(results):
        read = row["weight_bytes"] + row["cache_bytes"]
        axis.plot(
            row["operations"] / read, row["operations"] / _seconds(row), MARKS[row["phase_key"]],
            color=COLOURS[row["precision"]], fillstyle="full" if row["ours"] else "none", markersize=8,
            label=f"{row['engine']}, {row['phase_name']}",
        )  # fmt: skip
    axis.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="operations per second")
    axis.grid(True, which="major", linewidth=0.3)
    axis.legend(fontsize=6, loc="lower right")
    figure.suptitle(_caption(results), fontsize=8)
    _save(figure, path)


def _points(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Our fast rows, and the fastest peer of each precision and phase."""
    found: dict[tuple[str, str, bool], Mapping[str, Any]] = {}
    for row in results["rows"]:
        key = row["phase_key"], row["precision"], row["ours"]
        if key[0] in MARKS and (key not in found or _seconds(row) < _seconds(found[key])):
            found[key] = row
    return list(found.values())


def _seconds(row: Mapping[str, Any]) -> float:
    return row["seconds"]["median"]


def _caption(results: Mapping[str, Any]) -> str:
    shape, made = results["shape"], results["machine"]
    return (
        f"{shape['name']}, {shape['parameters'] / 1e6:.0f} M parameters; {made['processor'].split(',')[0]}, "
        f"{results['threads']} threads; {results['date'][:10]}"
    )


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--bars", type=Path)
    parser.add_argument("--roofline", type=Path)
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")  # there may be no screen
    results = json.loads(options.results.read_text(encoding="utf-8"))
    for draw, path in ((draw_bars, options.bars), (draw_roofline, options.roofline)):
        if path:
            draw(results, path)


if __name__ == "__main__":
    main()
