"""Times the demo on this machine: AMAE on built-in phantoms, all stages and the evaluation, in a temporary folder.

    python -m benchmarks.demo [--config.KEY=VALUE ...]     (configs/amae.py; --config=FILE:PRESET for another recipe)

The wall seconds are those of the whole process, with imports and with compilation (programs in ~/.cache/jmae are not
compiled again). The steps a second of a stage are counted from its first to its last line in the log, without the
compilation before.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.timing import table, write

ROOT = Path(__file__).parent.parent


def stages(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """(stage, its steps, steps a second) from a run's log; a stage with a single line has no rate."""
    rows = []
    for stage in dict.fromkeys(line["stage"] for line in lines):
        points = [(line["step"], line["time"]) for line in lines if line["stage"] == stage]
        (first, began), (last, ended) = points[0], points[-1]
        rows.append((stage, last, (last - first) / (ended - began) if ended > began else ""))
    return rows


def demo(changes: list[str]) -> dict[str, Any]:
    """Trains and evaluates. Returns the seconds, and the test AUROC with its 95 % interval."""
    config = [] if any(change.startswith("--config=") for change in changes) else [f"--config={ROOT}/configs/amae.py"]
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        command = [sys.executable, "-m", "jmae.train", *config, *changes, f"--workdir={folder}/demo"]
        subprocess.run(command, check=True)
        seconds = time.monotonic() - began
        metrics = json.loads(Path(folder, "demo", "evaluation", "metrics.json").read_text())
        rows = stages([json.loads(line) for line in Path(folder, "demo", "metrics.jsonl").read_text().splitlines()])
    image, head = metrics["image"], ("stage", "steps", "steps/s")
    print(table(head, rows))
    print(f"{seconds:.0f} s, {metrics['seconds']:.0f} of them the evaluation; test AUROC {image['auroc']:.3f}")
    rows += [("all, s", "", seconds), ("evaluation, s", "", metrics["seconds"]), ("AUROC", "", image["auroc"])]
    measured = {"wall_seconds": seconds, "evaluation_seconds": metrics["seconds"]}
    measured |= {name: image[name] for name in ("auroc", "auroc_ci")}
    return measured | {"table": [("stage", "steps", "steps/s, or as named"), rows]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "demo.json")
    options, changes = parser.parse_known_args()
    result = demo(changes)

    from benchmarks.steps import jmae_facts  # this takes the device, so it comes after the training

    device = jmae_facts()["device"]
    write(options.out, f"demo, {'cpu' if device == 'cpu' else 'cuda'}", {"device": device, **result})


if __name__ == "__main__":
    main()
