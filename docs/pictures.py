"""Draws the pictures of the explanations into docs/images: python docs/pictures.py

All are made of numbers computed here, with a fixed seed, so that a run writes the same files again.
"""

from pathlib import Path

import numpy as np

IMAGES = Path(__file__).parent / "images"
FLOAT, QUANTIZED, CORRECTED, GREY = "#1f6f8b", "#c8553d", "#3a7d44", "#777777"


def shift(pyplot):
    """Weights on a grid, and the outputs of their channel: float, quantized, and with the shift taken out."""
    rng = np.random.default_rng(4)
    weights = rng.normal(0, 0.5, 12)
    quantized = np.round(weights / 0.4) * 0.4
    inputs = rng.gamma(2.0, 0.5, (4000, 12))
    expected, found = inputs @ weights, inputs @ quantized
    value = ((weights - quantized) * inputs.mean(axis=0)).sum()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 2.7), width_ratios=[1, 1.25], layout="constrained")
    for level in np.arange(-1.2, 1.3, 0.4):
        left.axhline(level, color="#dddddd", linewidth=0.8, zorder=0)
    left.vlines(range(12), np.minimum(weights, quantized), np.maximum(weights, quantized), color=GREY, linewidth=1)
    left.plot(weights, "o", color=FLOAT, label="W")
    left.plot(quantized, "s", color=QUANTIZED, markersize=4, label="Wq, on the grid")
    left.set(title="weights of one output channel", xlabel="input channel", xticks=range(0, 12, 2), ylim=(-1.3, 1.8))
    left.legend(loc="upper center", ncols=2, fontsize=8)
    bins = np.linspace(-4, 4, 60)
    for values, color, label in (
        (expected, FLOAT, "W x + b"),
        (found, QUANTIZED, "Wq x + b"),
        (found + value, CORRECTED, "Wq x + b + s"),
    ):
        right.hist(values, bins, histtype="step", color=color, label=label)
        right.axvline(values.mean(), color=color, linewidth=0.8, linestyle="--")
    right.set(title=f"its outputs over all samples: shift s = {value:+.2f}", yticks=[])
    right.legend(loc="upper left", fontsize=8)
    return figure


def activation(pyplot):
    """An error of negative values alone: taken out of the mean before a ReLU, it is put into the mean after it."""
    rng = np.random.default_rng(1)
    expected = np.where(rng.random(20000) < 0.7, rng.normal(-1.4, 0.5, 20000), rng.normal(1.0, 0.5, 20000))
    found = expected - 0.6 * (expected < 0)
    corrected = found + expected.mean() - found.mean()
    figure, axes = pyplot.subplots(1, 2, figsize=(8.4, 2.3), layout="constrained")
    before, after = axes
    for values, color, label in (
        (expected, FLOAT, "float"),
        (found, QUANTIZED, "quantized"),
        (corrected, CORRECTED, "corrected by empirical"),
    ):
        before.hist(values, np.linspace(-4, 4, 80), histtype="step", color=color, label=label)
        before.axvline(values.mean(), color=color, linestyle="--", linewidth=0.9)
        passed = np.maximum(values, 0)
        after.hist(passed[passed > 0], np.linspace(-4, 4, 80), histtype="step", color=color)
        after.axvline(passed.mean(), color=color, linestyle="--", linewidth=0.9)
    before.set(title="before the ReLU: corrected has the mean of float", yticks=[], xlim=(-4, 4))
    after.set(title="after it: quantized had, corrected has not", yticks=[], xlim=(-1, 4))
    before.legend(loc="upper right", fontsize=8)
    return figure


def sqnr(pyplot):
    """How large the error is beside the output, for each SQNR."""
    figure, axis = pyplot.subplots(figsize=(8.4, 2.3), layout="constrained")
    decibels = np.linspace(0, 50, 200)
    axis.semilogy(decibels, 100 * 10 ** (-decibels / 20), color=FLOAT)
    for level in (0, 6, 10, 20, 30, 40):
        share = 100 * 10 ** (-level / 20)
        axis.plot(level, share, "o", color=QUANTIZED)
        axis.annotate(f"{share:.0f} %", (level, share), (6, 4), textcoords="offset points", fontsize=9)
    axis.set(xlabel="SQNR in dB", ylabel="error / output", yticks=[1, 10, 100], yticklabels=["1 %", "10 %", "100 %"])
    axis.grid(visible=True, color="#eeeeee")
    return figure


def equalization(pyplot):
    """Ranges of 16 channels in the layer that makes them and in the one that reads them, before and after."""
    rng = np.random.default_rng(2)
    made = np.exp(rng.normal(0, 0.9, 16))
    read = np.exp(rng.normal(0, 0.25, 16)) / made
    factors = np.sqrt(made / read)
    figure, axes = pyplot.subplots(1, 2, figsize=(8.4, 2.4), sharey=True, layout="constrained")
    place = np.arange(16)
    for axis, first, second, name in (
        (axes[0], made, read, "before"),
        (axes[1], made / factors, read * factors, "after: equal on both sides"),
    ):
        axis.bar(place - 0.2, first, 0.4, color=FLOAT, label="layer that makes the channel")
        axis.bar(place + 0.2, second, 0.4, color=QUANTIZED, label="layer that reads it")
        axis.axhline(max(first), color=FLOAT, linewidth=0.8, linestyle="--")
        axis.axhline(max(second), color=QUANTIZED, linewidth=0.8, linestyle="--")
        axis.set(title=name, xlabel="channel", xticks=[])
    axes[0].set_ylabel("largest |weight|")
    axes[1].legend(loc="upper right", fontsize=8)
    return figure


def box(axis, x, y, width, height, text, color, **options):
    """A box with text in it."""
    from matplotlib.patches import FancyBboxPatch

    axis.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.02", facecolor=color, edgecolor=GREY, linewidth=0.8)
    )
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9, **options)


def arrow(axis, start, end):
    """An arrow from one point to another."""
    axis.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": GREY})


def blank(pyplot, width, height):
    """A figure for boxes, in units of inches."""
    figure, axis = pyplot.subplots(figsize=(width, height), layout="constrained")
    axis.set(xlim=(0, width), ylim=(0, height))
    axis.axis("off")
    return figure, axis


def sweep(pyplot):
    """The cut through the network, and what is held at it."""
    figure, axis = blank(pyplot, 8.4, 2.3)
    for index, name in enumerate(("conv1", "conv2", "conv3", "conv4", "dense")):
        x = 0.3 + 1.65 * index
        done = index < 2
        color = "#d9ead3" if done else "#fce5cd" if index == 2 else "#eeeeee"
        box(axis, x, 1.1, 1.1, 0.55, name, color)
        axis.text(
            x + 0.55, 0.75, "corrected" if done else "measured now" if index == 2 else "", ha="center", fontsize=8, color=GREY
        )
        if index < 4:
            arrow(axis, (x + 1.15, 1.37), (x + 1.6, 1.37))
    axis.axvline(3.45, 0.12, 0.95, color=QUANTIZED, linestyle="--")
    axis.text(3.5, 2.15, "the cut: activations of all samples are held here", fontsize=9, color=QUANTIZED)
    axis.text(3.5, 0.3, "conv3: mean output, float and quantized → shift → added to what is held → on", fontsize=9, color=GREY)
    return figure


def held_out(pyplot):
    """What each part of the samples is for."""
    figure, axis = blank(pyplot, 8.4, 2.2)
    box(axis, 0.1, 1.35, 1.9, 0.6, "48 samples fit", "#cfe2f3")
    box(axis, 0.1, 0.35, 1.9, 0.6, "16 held out score", "#fce5cd")
    box(axis, 2.7, 1.35, 1.9, 0.6, "candidates:\nsquared, activation, ...", "#eeeeee")
    box(axis, 2.7, 0.35, 1.9, 0.6, "surely better than\nuncorrected?", "#eeeeee")
    box(axis, 5.3, 1.35, 2.9, 0.6, "yes: fitted again to all 64", "#d9ead3")
    box(axis, 5.3, 0.35, 2.9, 0.6, "no: the model as it was", "#f4cccc")
    arrow(axis, (2.05, 1.65), (2.65, 1.65))
    arrow(axis, (2.05, 0.65), (2.65, 0.65))
    arrow(axis, (3.65, 1.3), (3.65, 1.0))
    arrow(axis, (4.65, 0.75), (5.25, 1.5))
    arrow(axis, (4.65, 0.65), (5.25, 0.65))
    return figure


def main():
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {"svg.hashsalt": "biascorr", "svg.fonttype": "none", "font.family": "sans-serif", "axes.titlesize": 10}
    )
    pyplot.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "xtick.labelsize": 8, "ytick.labelsize": 8})
    for draw in (shift, activation, sqnr, equalization, sweep, held_out):
        path = IMAGES / f"{draw.__name__.replace('_', '-')}.svg"
        draw(pyplot).savefig(path, metadata={"Date": None, "Creator": None})
        path.write_text(
            "\n".join(line.rstrip() for line in path.read_text(encoding="utf-8").splitlines()) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
