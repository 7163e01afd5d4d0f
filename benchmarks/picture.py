"""Draws the README's picture from the run of `make demo`: python -m benchmarks.picture [--workdir runs/demo]

The scores alone choose the cases: the median normal case, and the abnormal cases at the median and at three quarters of
the scores. All maps have the colours of the report and of `jmae predict`, and the run's own scale, which the held-out
normals gave: its bright end is the 95th percentile of the 99.9th percentiles of their maps.
"""

import argparse
import csv
from pathlib import Path

import tifffile
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from jmae.data import phantoms
from jmae.fusion import colours_of_file
from jmae.report.pictures import Scale, blend, palette


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("docs/phantoms.png"))
    options = parser.parse_args()
    evaluation = options.workdir / "evaluation"
    with open(evaluation / "scores.csv", newline="") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: float(row["score"]))
    normal, abnormal = ([row for row in rows if row["label"] == label] for label in "01")
    chosen = [normal[len(normal) // 2], abnormal[len(abnormal) // 2], abnormal[3 * len(abnormal) // 4]]
    ends = colours_of_file(options.workdir)
    assert ends, "the run has no calibration"
    scale = Scale(*ends, "held-out normals")

    figure = Figure(figsize=(9, 1.66), dpi=110, layout="constrained")
    *parts, side = figure.subfigures(1, 4, squeeze=False, width_ratios=(1, 1, 1, 0.17), wspace=0.04)[0]
    for row, part in zip(chosen, parts, strict=True):
        case = phantoms.draw("chest", "test", int(row["id"].rsplit("-", 1)[1]))
        image = case.image[..., 0]
        heat = tifffile.imread(evaluation / "maps" / f"{row['id']}_anomaly.tif")
        left, right = part.subplots(1, 2)
        left.imshow(image, cmap="gray")
        right.imshow(blend(image / image.max(), heat, scale))
        if case.mask.any():
            right.contour(case.mask, [0.5], colors="cyan", linewidths=0.8)
        left.set_title("abnormal" if case.label else "normal", fontsize=9)
        right.set_title(f"score {float(row['score']):.3f}, p = {float(row['p_value']):.2f}", fontsize=9)
        left.set_axis_off()
        right.set_axis_off()
    colours = ScalarMappable(Normalize(scale.low, scale.high), ListedColormap(palette() / 255))
    bar = figure.colorbar(colours, cax=side.add_axes((0.05, 0.04, 0.22, 0.78)), extend="both")
    bar.ax.tick_params(labelsize=8)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
