"""The figure of `moe-rl bench logprobs`, drawn from its JSON alone."""

from pathlib import Path
from typing import Any

from moe_rl.experiments.bench.logprob_peers import OURS

_COLUMNS = (
    ("median_forward", "forward, s", 1.0, "{:.3g}"),
    ("median_both", "forward + backward, s", 1.0, "{:.3g}"),
    ("both_peak_bytes", "peak memory, MiB", 2.0**-20, "{:.0f}"),
    ("rms_error_nats", "root mean square error, nats", 1.0, "{:.1e}"),
)
_OURS_COLOUR, _PEER_COLOUR = "#c2410c", "#64748b"


def draw(result: dict[str, Any], path: Path) -> None:
    """One row of bars a shape and dtype, one column a quantity; all axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullFormatter

    cases = result["cases"]
    figure, axes = plt.subplots(
        len(cases),
        len(_COLUMNS),
        figsize=(13, 0.9 + 0.33 * sum(len(case["contestants"]) + 2 for case in cases)),
        squeeze=False,
        layout="constrained",
    )
    for axis, (_, title, *_) in zip(axes[0], _COLUMNS, strict=True):
        axis.set_title(title, fontsize=10)
    for row, case in zip(axes, cases, strict=True):
        names = list(case["contestants"])[::-1]
        colours = [_OURS_COLOUR if name == OURS else _PEER_COLOUR for name in names]
        for axis, (key, _, unit, form) in zip(row, _COLUMNS, strict=True):
            values = [(case["contestants"][name][key] or 0) * unit for name in names]
            floor = min((value for value in values if value > 0), default=1.0) / 3
            bars = axis.barh(names, [max(value, floor) for value in values], color=colours)
            axis.set_xscale("log")
            axis.set_xlim(floor, max(*values, floor) * 6)
            # Decades alone: between them the labels of a narrow axis run into each other.
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.bar_label(bars, [form.format(value) for value in values], padding=3, fontsize=8)
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            if axis is not row[0]:
                axis.set_yticklabels([])
        n, h, v = case["shape"]
        row[0].set_ylabel(f"N={n} H={h}\nV={v}\n{case['dtype']}", fontsize=9)
    figure.suptitle(f"{result['device']}, {result['threads']} threads, torch {result['torch']}")
    figure.savefig(path, dpi=130)
    plt.close(figure)
