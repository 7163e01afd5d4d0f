"""Charts of a page, as SVG elements."""

import io
import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from jmae import metrics

if TYPE_CHECKING:  # plotting libraries are imported where they are needed, as every command imports this module
    from matplotlib.axes import Axes

NORMAL, ABNORMAL, INK, FAINT = "#2f6690", "#b4491f", "#1c1c1c", "#8a8a8a"

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, read aloud, in the page's own face
    "font.size": 10,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.6,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


def chart(name: str, alt: str, draw: Callable[["Axes"], None], size: tuple[float, float] = (4.6, 3.7)) -> Markup:
    """An inline SVG that `draw(axes)` draws.

    Args:
      name: the prefix of the ids in the SVG, which must be unique on the page.
      alt: the description for screen readers.
      draw: draws on the axes.
      size: width and height in inches.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    opening = Markup('<svg {} role="img" aria-label="{}" xmlns:xlink="http://www.w3.org/1999/xlink">')
    return opening.format(Markup(view[0]), alt) + Markup(svg[svg.index(">") + 1 :])


def roc_chart(labels: NDArray, scores: NDArray, threshold: float | None = None) -> Markup:
    """The ROC curve with the line of chance and, if there is a validation threshold, its point."""
    fpr, tpr, _ = metrics.roc_curve(labels, scores)
    auroc = metrics.auroc(labels, scores)

    def draw(ax: "Axes") -> None:
        ax.plot([0, 1], [0, 1], color=FAINT, lw=0.8, ls=(0, (4, 3)))
        ax.plot(fpr, tpr, color=INK, clip_on=False)
        if threshold is not None:
            at = metrics.at_threshold(labels, scores, threshold)
            ax.plot(1 - at["specificity"], at["sensitivity"], "o", ms=7, color=INK, clip_on=False)
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="1 - specificity", ylabel="sensitivity", aspect="equal")
        ax.text(0.97, 0.06, f"AUROC {auroc:.3f}", ha="right", color=INK)

    return chart("roc", f"ROC curve; the area under it is {auroc:.3f}, chance is 0.5.", draw)


def pr_chart(labels: NDArray, scores: NDArray, threshold: float | None = None) -> Markup:
    """The precision-recall curve as the steps that AP sums, with the line of chance (the share of abnormal cases)."""
    recall, precision, _ = metrics.pr_curve(labels, scores)
    ap, share = metrics.average_precision(labels, scores), float(np.mean(labels))

    def draw(ax: "Axes") -> None:
        ax.axhline(share, color=FAINT, lw=0.8, ls=(0, (4, 3)))
        ax.plot(np.r_[0, recall], np.r_[precision[0], precision], color=INK, ds="steps-pre", clip_on=False)
        if threshold is not None and np.any(called := scores >= threshold):
            at = np.mean(called[labels]), np.mean(labels[called])
            ax.plot(*at, "o", ms=7, color=INK, clip_on=False)
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall (sensitivity)", ylabel="precision", aspect="equal")
        ax.text(0.03, 0.06, f"AP {ap:.3f}", color=INK)

    return chart("pr", f"Precision-recall curve; average precision {ap:.3f}, chance is {share:.3f}.", draw)


def froc_chart(froc: Mapping[str, Any]) -> Markup:
    """The curve of `lesions.Froc` up to its false positives `at`, with a point at `at` if the curve reaches it."""
    fp, found = np.transpose(froc["curve"])
    at, value = froc["at"], froc["sensitivity"]

    def draw(ax: "Axes") -> None:
        ax.plot(fp, found, color=INK)
        if fp[-1] >= at:
            ax.plot(at, value, "o", ms=7, color=INK, clip_on=False)
        ax.set(xlim=(0, min(at, 1.02 * fp.max()) or 1), ylim=(0, 1))
        ax.set(xlabel="false positives per image", ylabel="sensitivity for lesions")
        ax.text(0.97, 0.06, f"{value:.3f} at {at:g}", ha="right", color=INK, transform=ax.transAxes)

    return chart("froc", f"FROC curve; the sensitivity at {at:g} false positives per image is {value:.3f}.", draw)


def score_chart(labels: NDArray | None, scores: NDArray, threshold: float | None = None) -> Markup:
    """Histograms of the scores of each class in common bins, as shares of the class.

    Without labels there is one histogram of all scores.
    """
    bins = np.histogram_bin_edges(scores, min(40, 2 + int(2 * math.sqrt(scores.size))))
    parts: list[tuple[NDArray, str, str, Any]] = [(scores, INK, "all", "-")]
    if labels is not None:
        parts = [(scores[~labels], NORMAL, "normal", "-"), (scores[labels], ABNORMAL, "abnormal", (0, (5, 1.5)))]

    def draw(ax: "Axes") -> None:
        for values, colour, word, line in parts:
            if values.size:
                heights = np.histogram(values, bins)[0] / values.size
                ax.stairs(heights, bins, color=colour, fill=True, alpha=0.18)
                ax.stairs(heights, bins, color=colour, lw=1.4, ls=line, label=f"{word} ({values.size})")
        if threshold is not None:
            ax.axvline(threshold, color=INK, lw=1, label="threshold")
        ax.set(xlabel="score", ylabel="share of the cases" if labels is None else "share of the class", ylim=(0, None))
        ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1), ncols=3, handlelength=1.6)

    middles = ", ".join(f"median {np.median(v):.3g} of {v.size} {w}" for v, _, w, _ in parts if v.size)
    return chart("scores", f"Histogram of the scores: {middles}.", draw, (6, 3.1))


def convergence_chart(study: Mapping[str, Any]) -> Markup:
    """The mean AUROC of `jmae.convergence` against the number of masks or samples, with its standard errors."""
    steps, what = study["steps"], study["what"]
    x, y, se = ([step[name] for step in steps] for name in ("number", "auroc", "se"))

    def draw(ax: "Axes") -> None:
        ax.axhspan(y[-1] - study["close"], y[-1] + study["close"], color=NORMAL, alpha=0.1, lw=0)
        ax.errorbar(x, y, se, color=INK, fmt="o-", ms=4, lw=1.2, capsize=3)
        ax.set_xscale("log", base=2)
        ax.set(xlabel=what, ylabel="AUROC", xticks=x, xticklabels=map(str, x))
        ax.minorticks_off()

    points = ", ".join(f"{v:.3f} ± {e:.3f} at {n}" for n, v, e in zip(x, y, se, strict=True))
    return chart("convergence", f"AUROC and its standard error by the number of {what}: {points}.", draw, (6, 3.1))


def loss_chart(number: int, steps: NDArray, losses: NDArray) -> Markup:
    """The training loss of a stage against the step, with a running mean over a fiftieth of the points."""
    thin = np.unique(np.linspace(0, steps.size - 1, min(steps.size, 500)).astype(int))
    width = max(1, steps.size // 50)
    total = np.cumsum(np.r_[0, losses])
    first = np.maximum(np.arange(steps.size) - width + 1, 0)
    running = (total[1:] - total[first]) / (np.arange(steps.size) - first + 1)

    def draw(ax: "Axes") -> None:
        ax.plot(steps[thin], losses[thin], color=NORMAL, lw=0.7, alpha=0.4)
        ax.plot(steps[thin], running[thin], color=NORMAL, marker="o" if steps.size == 1 else None)
        if losses.min() > 0 and losses.max() > 20 * losses.min():
            ax.set_yscale("log")
        ax.set(xlabel="step", ylabel="loss")

    alt = f"Training loss from {losses[0]:.4g} at step {steps[0]:.0f} to {running[-1]:.4g} at step {steps[-1]:.0f}."
    return chart(f"loss{number}", alt, draw, (4.6, 2.7))
