"""Draws the README's picture from the run of `make demo`: python -m benchmarks.picture [--workdir runs/demo]

The scores alone choose the cases: the median normal case, and the abnormal cases at the median and at three quarters of
the scores. All maps have the same colour scale, from 0 to twice the 99.5th percentile of the normals' maps.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import tifffile
from matplotlib.figure import Figure
from scipy.ndimage import gaussian_filter

from jmae.data import phantoms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--out", type=Path, default=Path("docs/phantoms.png"))
    options = parser.parse_args()
    evaluation = options.workdir / "evaluation"
    with open(evaluation / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rows.sort(key=lambda row: float(row["score"]))
    normal = [row for row in rows if row["label"] == "0"]
    abnormal = [row for row in rows if row["label"] == "1"]
    chosen = [normal[len(normal) // 2], abnormal[len(abnormal) // 2], abnormal[3 * len(abnormal) // 4]]
    maps = {row["id"]: tifffile.imread(evaluation / "maps" / f"{row['id']}_anomaly.tif") for row in [*normal, *chosen]}
    smooth = {name: np.maximum(gaussian_filter(m, 3), 0) for name, m in maps.items()}
    top = 2 * np.percentile(np.stack([smooth[row["id"]] for row in normal]), 99.5)

    figure = Figure(figsize=(9, 1.85), dpi=110, layout="constrained")
    for part, row in zip(figure.subfigures(1, 3, wspace=0.03), chosen, strict=True):
        case = phantoms.draw("chest", "test", int(row["id"].rsplit("-", 1)[1]))
        kind = "abnormal" if case.label else "normal"
        part.suptitle(f"{kind}, score {float(row['score']):.3g}", fontsize=9)
        left, right = part.subplots(1, 2)
        left.imshow(case.image[..., 0], cmap="gray")
        right.imshow(case.image[..., 0], cmap="gray")
        right.imshow(smooth[row["id"]], cmap="inferno", vmin=0, vmax=top, alpha=0.6)
        if case.mask.any():
            right.contour(case.mask, [0.5], colors="cyan", linewidths=0.8)
        for axes in (left, right):
            axes.set_axis_off()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out)


if __name__ == "__main__":
    main()
