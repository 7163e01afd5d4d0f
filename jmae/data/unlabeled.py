"""An unlabelled set with a known share of abnormal images. The options are `data.anomaly_ratio`, `unlabeled_size` and
`unlabeled_labels`. Any system that trains on the split `unlabeled` may declare them.

Without hidden labels the share is unknown and the set stays as it is; `ratio_note` says so.
"""

import csv
import os
from collections.abc import Sequence

from ml_collections import ConfigDict

from jmae.data import phantoms
from jmae.data.manifest import Row
from jmae.errors import InputError


def labels_given(config: ConfigDict) -> bool:
    """Whether there are hidden labels of the unlabelled rows: those of a file, or of the phantoms."""
    return not config.data.manifest or bool(config.data.unlabeled_labels)


def ratio_note(config: ConfigDict) -> str:
    """The note of a run whose recipe asks for an anomaly ratio without hidden labels; empty for any other run."""
    if config.data.anomaly_ratio < 0 or labels_given(config):
        return ""
    wanted = f"{config.data.anomaly_ratio:.0%} of {config.data.unlabeled_size or 'all'} images"
    return (
        f"the anomaly ratio of the unlabelled images is unknown and all of them are used, where the recipe asks for"
        f" {wanted}: data.unlabeled_labels names no hidden labels"
    )


def unlabeled_labels(config: ConfigDict, rows: Sequence[Row]) -> dict[str, int]:
    """Hidden labels of unlabelled rows, by id: for the sweep over anomaly ratios, for analysis and for a control.

    No method is trained on them. AMAE's variant `b_perfect`, a control, is.

    The file `data.unlabeled_labels` names rows by the column `id`, or by `path`, the image's path relative to the file.

    Raises:
      InputError: the file is no such CSV.
    """
    if not labels_given(config):
        return {}
    if not config.data.manifest:
        return phantoms.unlabeled_labels(config.data.phantom)
    try:
        with open(config.data.unlabeled_labels, newline="", encoding="utf-8-sig") as file:
            lines = list(csv.DictReader(file))
        labels = [int(line["label"]) for line in lines]
        if lines and "id" not in lines[0]:
            folder = os.path.dirname(os.path.abspath(config.data.unlabeled_labels))
            ids = {os.path.normpath(file): row.id for row in rows for file in row.image}
            named = [ids.get(os.path.normpath(os.path.join(folder, line["path"])), "") for line in lines]
        else:
            named = [line["id"] for line in lines]
        return {name: label for name, label in zip(named, labels, strict=True) if name}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{config.data.unlabeled_labels}: not a CSV file with the columns id,label or path,label ({error!r})"
        ) from None


def with_anomaly_ratio(rows: Sequence[Row], config: ConfigDict) -> list[Row]:
    """The rows with an unlabelled set of `data.unlabeled_size` images, a share `data.anomaly_ratio` of them abnormal.

    The set has the first int(size * ratio) abnormal images and the first normal ones (DDAD's rule, spec section 2).

    Raises:
      InputError: a row without a hidden label, or too few images.
    """
    labels, ratio = unlabeled_labels(config, rows), config.data.anomaly_ratio
    pools: dict[int, list[Row]] = {0: [], 1: []}
    for row in rows:
        if row.split == "unlabeled":
            if row.id not in labels:
                raise InputError(f"{row.id}: no hidden label: name them all in data.unlabeled_labels")
            pools[labels[row.id]].append(row)
    size = config.data.unlabeled_size or len(pools[0]) + len(pools[1])
    abnormal = int(round(size * ratio, 9))  # 0.29 * 100 is 28.999... in floats
    wanted = {1: abnormal, 0: size - abnormal}
    for label, word in ((1, "abnormal"), (0, "normal")):
        if wanted[label] > len(pools[label]):
            raise InputError(
                f"anomaly ratio {ratio} of {size} needs {wanted[label]} {word} unlabelled images, there are"
                f" {len(pools[label])}: lower data.unlabeled_size or change data.anomaly_ratio"
            )
    selected = {row.id for label in (0, 1) for row in pools[label][: wanted[label]]}
    return [row for row in rows if row.split != "unlabeled" or row.id in selected]
