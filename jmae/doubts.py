"""What in a training gives reason to doubt its result, from the lines of metrics.jsonl."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jmae.report.words import short_training
from jmae.system import Stage

LINES = 20  # the last lines of a stage are compared with so many lines before
RISE, SPREADS = 0.25, 5.0  # a loss has risen by a quarter of their median and by 5 of their interquartile ranges


def doubts(history: Sequence[Mapping[str, Any]], stages: Sequence[Stage]) -> list[str]:
    """A sentence for each stage that learnt nothing (`Stage.nothing`), or whose loss rose in its last steps."""
    found = []
    for stage in stages:
        lines = [line for line in history if line.get("stage") == stage.name]
        for metric, least in stage.nothing.items():
            looks = [line for line in lines if any(key.startswith(metric) for key in line)]
            line = looks[-1] if looks else {}
            values = [value for key, value in line.items() if key.startswith(metric)]
            bound = line.get(least, -np.inf) if isinstance(least, str) else least  # earlier runs lack some metrics
            if values and max(values) <= bound:
                beside = f", {stage.words.get(least, least)}: {bound:.2g}" if isinstance(least, str) else ""
                what = f"{stage.words.get(metric, metric)}: {max(values):.2g}{beside}"
                found.append(f"the network has learnt little: {what}")
        losses = [line["loss"] for line in lines if isinstance(line.get("loss"), float)]
        if spiked(losses):
            usual = np.median(losses[-LINES - 1 : -1])
            found.append(f"stage {stage.name} ended with a rise of its loss, from {usual:.2g} to {losses[-1]:.2g}")
    return found


def spiked(losses: Sequence[float]) -> bool:
    """Whether the last loss is far above the `LINES` before it. Then the last weights may be bad ones, as where Adam
    takes a step that is too long."""
    if len(losses) <= LINES:
        return False
    before = np.array(losses[-LINES - 1 : -1])
    low, median, high = np.percentile(before, (25, 50, 75))
    return bool(losses[-1] - median > max(RISE * abs(median), SPREADS * (high - low)))


def doubts_line(found: Sequence[str]) -> str:
    """The doubts in one line with the remedy, for a terminal; "" without doubts."""
    if not found:
        return ""
    return f"warning: the training may have failed: {'; '.join(found)}: train longer, or with another --config.seed"


def caveats(config: Mapping[str, Any], found: Sequence[str]) -> list[str]:
    """What a terminal says of a training that was short, or that gives the doubts `found`."""
    short = short_training(config)
    return [*filter(None, (short and f"short training: {short}", doubts_line(found)))]
