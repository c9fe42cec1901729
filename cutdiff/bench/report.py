"""The measurements of a bench, as values for JSON and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from cutdiff.bench.measure import PARTS, STAGES, Timing
from cutdiff.bench.variants import VARIANTS

OURS = "cutdiff"


def summary(timings: dict[str, list[Timing]], flops: dict[str, float], peak_flops: float) -> dict[str, dict[str, Any]]:
    """The times of each contestant as median, least and most, their ratios to the sampler's, and all runs.

    Runs are paired by their round, and a ratio is the median of the pairs' ratios. A contestant that takes FLOPs of its
    own has them in `flops`, by its name.
    """
    rows = {}
    for name, runs in timings.items():
        seconds, ratios, whole = {}, {}, flops.get(name, flops["network"])
        for part in PARTS:
            own, ours = ([run.seconds[part] for run in some] for some in (runs, timings[OURS]))
            seconds[part] = spread(own)
            ratios[part] = spread([a / b for a, b in zip(own, ours, strict=True)])
        network = seconds["network"]["median"]
        rows[name] = {
            "seconds": seconds,
            "times_ours": ratios,
            "flops_per_s": whole / network,
            "times_floor": network / (whole / peak_flops),
            "runs": [asdict(run) for run in runs],
        }
    return rows


def heading(result: dict[str, Any]) -> str:
    """The lines above the table: the network, the hardware, and the differences that were proven to be small."""
    settings, precision, parity = (result[name] for name in ("settings", "precision", "parity"))
    others = [f"{name} {row['difference']:.1e}" for name, row in result["contestants"].items() if name != OURS]
    rounds = len(result["contestants"][OURS]["runs"])
    products, convolutions = precision["float32_products"], precision["tf32_convolutions"]
    proof = "not compared with diffusers' networks, as no baseline runs"
    if parity:
        proof = f"difference from diffusers' in float32: U-Net {parity['unet']:.1e}, VAE {parity['vae']:.1e}"
    lines = [
        f"{result['model']} network, random weights; {settings['height']}² px, {settings['num_steps']} steps, "
        f"{rounds} rounds; {precision['dtype']} (float32 products: {products}, TF32 in convolutions: {convolutions})",
        ", ".join(f"{key} {value}" for key, value in result["hardware"].items()),
        f"attention: {', '.join(result['attention'])}, in this order",
        proof,
        f"difference of U-Nets from ours in {precision['dtype']}: {', '.join(others) or 'none'}",
        f"product of matrices of {result['matmul_side']}²: {result['peak_flops_per_s'] / 1e12:.3g} TFLOP/s",
        f"peak resident memory of this process: {result['resident_peak_bytes'] / 1e9:.1f} GB",
    ]
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    """The table in Markdown, with a row for each contestant and one for the floor."""
    lines = [
        "| | structure s | detail s | both s [least – most] | times cutdiff [least – most] | TFLOP/s | times floor "
        "| decode s | peak GB | peak GB, decode | first run s |",
        "|---" * 11 + "|",
    ]
    for name, row in result["contestants"].items():
        seconds = row["seconds"]
        cells = [
            row["what"] if name in (OURS, *VARIANTS) else f"{name}: {row['what']}",
            *(f"{seconds[stage]['median']:.2f}" if seconds[stage]["median"] else "–" for stage in STAGES),
            cell(seconds["network"]),
            cell(row["times_ours"]["network"]),
            f"{row['flops_per_s'] / 1e12:.3g}",
            f"{row['times_floor']:.2f}",
            f"{seconds['decode']['median']:.2f}",
            *(_peak_memory(row["runs"], part) for part in ("network", "decode")),
            f"{row['first_run_s']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    floor = {part: f"{flops / result['peak_flops_per_s']:.2f}" for part, flops in result["flops"].items()}
    peak = f"{result['peak_flops_per_s'] / 1e12:.3g}"
    cells = [floor["structure"], floor["detail"], floor["network"], "–", peak, "1", floor["decode"], "–", "–", "–"]
    lines.append(f"| floor | {' | '.join(cells)} |")
    return "\n".join(lines)


def _peak_memory(runs: list[dict[str, Any]], part: str) -> str:
    peaks = [run["peak_bytes"][part] for run in runs]
    return "–" if None in peaks else f"{max(peaks) / 1e9:.2f}"


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median of some values, the least and the most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def cell(values: dict[str, float]) -> str:
    """A cell of the table for what `spread` gives."""
    return f"{values['median']:.2f} [{values['least']:.2f} – {values['most']:.2f}]"
