"""The losses of a layer-wise training as a table and a plot."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence

from ... import extras

__all__ = ["losses_csv", "losses_png"]


def losses_csv(losses: Sequence[Mapping[str, float]]) -> str:
    """CSV with a row ``layer,before,after`` for each layer: the losses of :class:`LaquantResult`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, ["layer", "before", "after"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(losses)
    return text.getvalue()


def losses_png(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes:
    """A PNG plot of each run's losses against the layer: dashed before training, solid after it.

    Args:
        runs: the losses of :class:`LaquantResult` by the run's name.

    Raises:
        MissingExtra: matplotlib is missing.
    """
    extras.require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    for index, (name, losses) in enumerate(runs.items()):
        layers = [entry["layer"] for entry in losses]
        for key, style in (("before", "--"), ("after", "-")):
            axes.plot(layers, [entry[key] for entry in losses], style, color=f"C{index}", label=f"{name}, {key}")
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("mean smooth L1 loss")
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    return png.getvalue()
