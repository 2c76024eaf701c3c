"""Draw the figures of docs/walsh.md beside this file: python docs/figures/draw_walsh.py (needs matplotlib)."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure
from torch import Tensor

from rcp_kernels import hadamard_matrix, walsh_matrix
from rcp_kernels.ops.walsh_matrices import sequency

FOLDER = Path(__file__).parent
MATRIX_SIZE = 32
SIZE, GROUP = 4096, 128
COLORS = {"natural": "tab:orange", "sequency": "tab:blue"}


def draw_matrices() -> None:
    """Both orders of one matrix as images, with the sign changes of every row beside it."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 4, width_ratios=(4, 1.1, 4, 1.1))
    for (image, bars), (name, matrix) in zip(
        (axes[:2], axes[2:]),
        {"natural": hadamard_matrix(MATRIX_SIZE), "sequency": walsh_matrix(MATRIX_SIZE)}.items(),
        strict=True,
    ):
        image.imshow(
            matrix, cmap="gray", vmin=-1.4, vmax=1.1, aspect="auto"
        )  # so that the bars stand beside their rows
        image.set_title(f"{name} order, n = {MATRIX_SIZE}")
        image.set_ylabel("row")
        image.set_xticks([])
        bars.barh(range(MATRIX_SIZE), sequency(matrix).tolist(), color=COLORS[name])
        bars.set_ylim(MATRIX_SIZE - 0.5, -0.5)
        bars.set_yticks([])
        bars.set_title("sign changes", fontsize=10)
        bars.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / "walsh_matrices.png", dpi=110)


def draw_spread() -> None:
    """The sequency of every row, and its standard deviation inside each quantization group."""
    orders = {"natural": sequency(hadamard_matrix(SIZE)), "sequency": sequency(walsh_matrix(SIZE))}
    figure = Figure(figsize=(10, 4), layout="constrained")
    rows, groups = figure.subplots(1, 2)
    for name, values in orders.items():
        rows.plot(values, ".", markersize=1.5, color=COLORS[name], label=f"{name} order")
        spread = within_group(values)
        groups.plot(spread, ".-", color=COLORS[name], label=f"{name} order, mean {spread.mean():.1f}")
    rows.set_title(f"sign changes of each row, n = {SIZE}")
    rows.set_xlabel("row")
    rows.set_ylabel("sequency")
    rows.legend(markerscale=6, loc="upper left", framealpha=1)
    groups.set_title(f"standard deviation within each group of {GROUP} rows")
    groups.set_xlabel("group")
    groups.set_yscale("log")
    groups.set_ylim(10, 4000)
    groups.legend(loc="center right")
    for axes in (rows, groups):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FOLDER / "walsh_spread.png", dpi=110)


def within_group(values: Tensor) -> Tensor:
    return values.double().view(-1, GROUP).std(dim=1, correction=0)


if __name__ == "__main__":
    draw_matrices()
    draw_spread()
