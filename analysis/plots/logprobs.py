"""The figure of `moe-rl bench logprobs`, drawn from its JSON alone."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from moe_rl.analysis.plots.style import MUTED, colour, styled

_COLUMNS = (
    ("median_forward", "forward, s", 1.0, "{:.3g}"),
    ("median_both", "forward + backward, s", 1.0, "{:.3g}"),
    ("both_peak_bytes", "peak memory, MiB", 2.0**-20, "{:.0f}"),
    ("rms_error_nats", "root mean square error, nats", 1.0, "{:.1e}"),
)
_OURS = "moe-rl"


@styled
def logprob_bars(result: dict[str, Any]) -> Figure:
    """One row of bars a shape and dtype, one column a quantity; all axes logarithmic."""
    cases = result["cases"]
    height = 0.9 + 0.33 * sum(len(case["contestants"]) + 2 for case in cases)
    figure = Figure(figsize=(13, height), layout="constrained")
    axes = figure.subplots(len(cases), len(_COLUMNS), squeeze=False)
    for axis, (_, title, *_) in zip(axes[0], _COLUMNS, strict=True):
        axis.set_title(title)
    for row, case in zip(axes, cases, strict=True):
        names = list(case["contestants"])[::-1]
        colours = [colour("grpo") if name == _OURS else MUTED for name in names]
        for axis, (key, _, unit, form) in zip(row, _COLUMNS, strict=True):
            values = [(case["contestants"][name][key] or 0) * unit for name in names]
            # A log axis has no 0 (no peak measured, no error): its bar ends at the floor.
            floor = min((value for value in values if value > 0), default=1.0) / 3
            bars = axis.barh(names, [max(value, floor) for value in values], color=colours)
            axis.set_xscale("log")
            axis.set_xlim(floor, max(*values, floor) * 6)
            # Decades alone: between them the labels of a narrow axis run into each other.
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.bar_label(bars, [form.format(value) for value in values], padding=3)
            if axis is not row[0]:
                axis.set_yticklabels([])
        n, h, v = case["shape"]
        row[0].set_ylabel(f"N={n} H={h}\nV={v}\n{case['dtype']}")
    figure.suptitle(f"{result['device']}, {result['threads']} threads, torch {result['torch']}")
    return figure
