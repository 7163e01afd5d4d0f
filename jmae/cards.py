"""MODEL_CARD.md and DATA_CARD.md of a run folder: what the run knows of its system, its data and its figures."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from jmae import checkpoint, recipe
from jmae.data.files import image_size
from jmae.data.loader import WORKERS, phantom
from jmae.data.manifest import SPLITS, Row
from jmae.errors import InputError
from jmae.report import described, flat, headline, without_curves
from jmae.run_folder import recipe_digest, write_text
from jmae.system import System

RESEARCH = "For research, not for clinical use."
LABELS = {0: "normal", 1: "abnormal", None: "unknown"}
KINDS = 20  # kinds of images that are listed


def write_cards(workdir: Path, config: ConfigDict, system: System, rows: Sequence[Row]) -> None:
    """Writes both cards, each whole or not at all: from the recipe, the rows of the data, and what the run folder holds
    of checkpoints, versions and evaluations. Raises InputError where that fails."""
    found = evaluations(workdir)
    write_text(workdir / "MODEL_CARD.md", model_card(workdir, config, system, found))
    write_text(workdir / "DATA_CARD.md", data_card(workdir, config, system, rows, found))


def evaluations(workdir: Path) -> list[dict[str, Any]]:
    """The metrics.json of each evaluation in the run folder, with the name of its "folder"."""
    files = sorted(workdir.glob("evaluation*/metrics.json"))
    return [json.loads(file.read_text(encoding="utf-8")) | {"folder": file.parent.name} for file in files]


def last_steps(system: System, workdir: Path) -> dict[str, tuple[int, Mapping[str, Any]]]:
    """(last step saved, what it was trained with) of each stage that has a checkpoint."""
    out = {}
    for stage in system.stages:
        folder = workdir / "checkpoints" / stage.name
        if steps := checkpoint.steps(folder) if folder.exists() else []:
            out[stage.name] = steps[-1], json.loads((folder / str(steps[-1]) / "step.json").read_text())["config"]
    return out


def rows_of(system: System, workdir: Path) -> str | None:
    """The digest of the rows that a run was trained on; None where it tells none."""
    each = last_steps(system, workdir)
    return each[system.stages[-1].name][1].get("rows") if system.stages else None


def model_card(workdir: Path, config: ConfigDict, system: System, found: Sequence[Mapping[str, Any]]) -> str:
    """The system, how it was trained, its figures with intervals, its limits."""
    what, paper = described(system.name)
    data, environment = config.data, workdir / "environment.json"
    about = json.loads(environment.read_text(encoding="utf-8")) if environment.exists() else {}
    stages = [f"{name} {step}" for name, (step, _) in last_steps(system, workdir).items()]
    variant = f", variant {config.variant}" if "variant" in config else ""
    lines = [
        f"# Model card: {system.name}{variant}",
        RESEARCH,
        *([what] if what else []),
        *([f"Paper: {paper}"] if paper else []),
        "## Use",
        f"Intended: research on anomaly detection in images of the kind that DATA_CARD.md tells, prepared as it tells; "
        f"the networks see {' x '.join(map(str, data.size))} {'voxels' if len(data.size) == 3 else 'pixels'}.",
        f"The primary score is `{system.primary}`: higher is more abnormal.",
        "Not intended: any decision on a patient. It is no medical device.",
        "## Training",
        bullets(
            {
                "last steps": ", ".join(stages) or "none saved",
                "seeds": ", ".join(str(config.seed + r) for r in range(config.replicates)),
                "recipe digest": f"{recipe_digest(config)} (config.json, without what a checkpoint does not depend on)",
                "digest of the rows trained on": rows_of(system, workdir) if stages else None,
                "devices": ", ".join(about.get("devices", [])),
                "python": about.get("python"),
                "versions": ", ".join(f"{name} {number}" for name, number in about.get("versions", {}).items()),
            }
        ),
        "## Figures",
        *([figures_of(e) for e in found] or ["Not evaluated."]),
        "## Limits",
        "Figures are of the cases named above and hold for cases of their kind: no hospital, scanner, protocol or "
        "population was looked at but those of the data (DATA_CARD.md).",
        *(f"{e['folder']}: {' '.join(headline(e))}" for e in found),
        *(f"{e['folder']}: {e['uncalibrated']}." for e in found if e.get("uncalibrated")),
        *(f"{e['folder']}: not an independent test: {len(e['leaks'])} leaks." for e in found if e.get("leaks")),
        *(f"{e['folder']}: {e['unchecked']}." for e in found if e.get("unchecked")),
    ]
    return "\n\n".join(lines) + "\n"


def figures_of(evaluation: Mapping[str, Any]) -> str:
    """A table of an evaluation's scores and baselines with their intervals, and its alarms."""
    e = evaluation
    number = lambda value: "" if value is None else f"{value:.3f}"
    measured = lambda of, name: (
        number(of.get(name))
        + (f" ({number(ci[0])} to {number(ci[1])})" if None not in (ci := of.get(f"{name}_ci") or [None]) else "")
    )
    lines = [f"{e['folder']}: split {e['split']}, {e['n']} cases, {e['n_normal']} normal, {e['n_abnormal']} abnormal."]
    if reason := without_curves(e):
        lines.append(reason)
    each = [(f"{name}{' (primary)' * (name == e['primary'])}", of) for name, of in e["scores"].items()]
    each += [(f"{name} (baseline)", of) for name, of in e["baselines"].items()]
    if each:
        table = ["| score | AUROC (95 %) | AP (95 %) | pixel AUROC | pixel AP |", "|---|---|---|---|---|"]
        for name, of in each:
            image, pixel = of["image"] or {}, of["pixel"] or {}
            cells = measured(image, "auroc"), measured(image, "ap"), number(pixel.get("auroc")), number(pixel.get("ap"))
            table.append(f"| {' | '.join([cell(name), *cells])} |")
        lines.append("\n".join(table))
    if alarms := e.get("alarms"):
        share = ", ".join(f"{alarms[k]:.1%} of {k} cases" for k in ("normal", "abnormal") if alarms[k] is not None)
        lines.append(f"Alarm at a p-value up to {alarms['rate']:g}, of {alarms['n']} held-out normals: {share}.")
    return "\n\n".join(lines)


def data_card(
    workdir: Path, config: ConfigDict, system: System, rows: Sequence[Row], found: Sequence[Mapping[str, Any]]
) -> str:
    """Where the data come from, under which licence, how many of what, and how they are prepared."""
    manifest = Path(config.data.manifest) if config.data.manifest else None
    if manifest:
        checked = "told, not refused (data.allow_leaks)" if config.data.get("allow_leaks") else "none: it is refused"
        source: dict[str, str | None] = {
            "manifest": str(manifest),
            "its SHA-256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
            "licence": licences(rows),
            "a patient or an image in two splits": checked,
        }
    else:
        source = {"phantoms": f"{config.data.phantom}: drawn by jmae, of no patient", "licence": "that of jmae"}
    source["digest of the rows trained on"] = rows_of(system, workdir) if last_steps(system, workdir) else None
    source |= {f"digest of the images of {e['folder']}": e.get("digests", {}).get("images evaluated") for e in found}
    lines = [
        "# Data card",
        RESEARCH,
        bullets(source),
        "## Cases",
        counts(rows),
        "Rows of `unlabeled` have no label here, whatever the manifest says." if manifest else "",
        "## Images",
        kinds(rows) if manifest else drawn_at(rows[0]),
        "## Preparation",
        bullets({f"data.{key}": value for key, value in flat(json.loads(recipe.to_json(config))["data"]) if value}),
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def counts(rows: Sequence[Row]) -> str:
    """A table of cases and patients by split and label."""
    table = [
        "| split | label | cases | patients | without a patient | with mask or boxes |",
        "|---|---|---|---|---|---|",
    ]
    for split in SPLITS:
        for label, word in LABELS.items():
            if mine := [row for row in rows if row.split == split and row.label == label]:
                patients, unnamed = {row.patient for row in mine if row.patient}, sum(not row.patient for row in mine)
                marked = sum(bool(row.mask or row.boxes) for row in mine)
                table.append(f"| {split} | {word} | {len(mine)} | {len(patients)} | {unnamed} | {marked} |")
    return "\n".join(table)


def licences(rows: Sequence[Row]) -> str:
    """What the manifest's column `licence` or `license` says."""
    columns = {name for row in rows for name in row.extra if name.lower() in ("licence", "license")}
    if not columns:
        return "unknown: the manifest has no column `licence`"
    said = Counter(row.extra.get(name, "").strip() or "not stated" for row in rows for name in columns)
    return ", ".join(f"{text} ({n} cases)" for text, n in said.most_common())


def kinds(rows: Sequence[Row]) -> str:
    """A table of the images' formats, channels and sizes, the most frequent first, from their headers."""

    def kind(row: Row) -> tuple[str, int, str]:
        path = Path(row.image[0])
        ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
        try:
            size = " x ".join(map(str, image_size(path)))
        except InputError:
            size = "not in one header"  # as of a series
        return ("folder" if path.is_dir() else ending or "no ending"), len(row.image), size

    with ThreadPoolExecutor(WORKERS) as pool:
        found = Counter(pool.map(kind, rows))
    table = ["| format | files a case | size | cases |", "|---|---|---|---|"]
    table += [f"| {cell(ending)} | {files} | {size} | {n} |" for (ending, files, size), n in found.most_common(KINDS)]
    rest = len(found) - KINDS
    return "\n".join(table) + (f"\n\nAnd {rest} more kinds." if rest > 0 else "")


def drawn_at(row: Row) -> str:
    """The size and channels of a phantom set, which its rows have in common."""
    *size, channels = phantom(row.image[0]).image.shape
    return f"Drawn at {' x '.join(map(str, size))}, {channels} channel{'s' * (channels > 1)}."


def bullets(facts: Mapping[str, Any]) -> str:
    """A list of what is known; what is not is left out."""
    return "\n".join(f"- {name}: {' '.join(str(value).split())}" for name, value in facts.items() if value)


def cell(text: str) -> str:
    """Text that is one cell of a table."""
    return " ".join(text.replace("|", "\\|").split())
