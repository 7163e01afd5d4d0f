"""The cards of a run folder, MODEL_CARD.md and DATA_CARD.md: its system, its training, its data and its figures."""

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
from jmae.data.manifest import SPLITS, Row
from jmae.data.opening import WORKERS
from jmae.data.preparation import phantom
from jmae.errors import InputError
from jmae.report import flat_settings, no_curves_reason, result_sentences, system_description
from jmae.run_folder import digest, images_digest, read_environment, recipe_digest, write_text
from jmae.system import System
from jmae.tables import counted

RESEARCH = "For research, not for clinical use."
LABELS = {0: "normal", 1: "abnormal", None: "unknown"}
KINDS = 20  # rows of the table of image kinds, at most


def write_cards(workdir: Path, config: ConfigDict, system: System, rows: Sequence[Row]) -> None:
    """Write both cards, each as a whole or not at all.

    They tell what the recipe, the rows of the data, and the checkpoints, versions and evaluations of the run folder
    contain. Raises InputError where a file cannot be read.
    """
    results = evaluations(workdir)
    write_text(workdir / "MODEL_CARD.md", model_card(workdir, config, system, results))
    write_text(workdir / "DATA_CARD.md", data_card(workdir, config, system, rows, results))


def evaluations(workdir: Path) -> list[dict[str, Any]]:
    """The metrics.json of each evaluation in the run folder, and its folder's name as "folder"."""
    files = sorted(workdir.glob("evaluation*/metrics.json"))
    return [json.loads(file.read_text(encoding="utf-8")) | {"folder": file.parent.name} for file in files]


def last_steps(system: System, workdir: Path) -> dict[str, tuple[int, Mapping[str, Any]]]:
    """Of each stage with a checkpoint: (last saved step, the settings that its checkpoint holds)."""
    steps_of_stages = {}
    for stage in system.stages:
        folder = workdir / "checkpoints" / stage.name
        if steps := checkpoint.steps(folder) if folder.exists() else []:
            steps_of_stages[stage.name] = (
                steps[-1],
                json.loads((folder / str(steps[-1]) / "step.json").read_text())["config"],
            )
    return steps_of_stages


def provenance(
    config: ConfigDict, system: System, rows: Sequence[Row], digests: Sequence[str], workdir: Path
) -> dict[str, Any]:
    """What was resampled for the intervals of an evaluation, and digests of the recipe, the rows trained on and the
    images. `digests` are those of the stored values of each row."""
    return {
        "resampled": "patients" if any(row.patient for row in rows) else "cases",
        "digests": {
            "recipe": recipe_digest(config),
            "rows trained on": rows_digest(system, workdir) or "unknown",
            "images evaluated": hashlib.sha256("\n".join(digests).encode()).hexdigest()[:16],
        },
    }


def rows_digest(system: System, workdir: Path) -> str | None:
    """The digest of the rows that the run was trained on; None where its checkpoint has none.

    Raises KeyError where the last stage has no checkpoint.
    """
    steps = last_steps(system, workdir)
    return steps[system.stages[-1].name][1].get("rows") if system.stages else None


def trained_on(system: System, workdir: Path, rows: Sequence[Row]) -> bool:
    """Whether the run was trained on these rows and images, as far as its checkpoint tells."""
    saved = last_steps(system, workdir)[system.stages[-1].name][1] if system.stages else {}
    now = {"rows": digest(rows), "images": images_digest(rows)}
    return all(saved.get(key, value) == value for key, value in now.items())


def model_card(workdir: Path, config: ConfigDict, system: System, results: Sequence[Mapping[str, Any]]) -> str:
    """MODEL_CARD.md: the system, its training, its figures with intervals, its limits.

    Args:
      results: of `evaluations`.
    """
    what, paper = system_description(system.name)
    data, about = config.data, read_environment(workdir)
    stages = [f"{name} {step}" for name, (step, _) in last_steps(system, workdir).items()]
    unit = "voxels" if recipe.is_volume(config) else "pixels"
    variant = f", variant {config.variant}" if "variant" in config else ""
    lines = [
        f"# Model card: {system.name}{variant}",
        RESEARCH,
        *([what] if what else []),
        *([f"Paper: {paper}"] if paper else []),
        "## Use",
        "Intended: research on anomaly detection in images like those of DATA_CARD.md, with the preparation that it "
        f"describes. The networks receive {' x '.join(map(str, data.size))} {unit}.",
        f"The primary score is `{system.primary}`: higher is more abnormal.",
        "Not intended: decisions about patients. This is not a medical device.",
        "## Training",
        bullets(
            {
                "last steps": ", ".join(stages) or "none saved",
                "seeds": ", ".join(str(config.seed + r) for r in range(config.replicates)),
                "recipe digest": f"{recipe_digest(config)} (of the part of config.json that checkpoints depend on)",
                "digest of the training rows": rows_digest(system, workdir) if stages else None,
                "devices": ", ".join(about.get("devices", [])),
                "python": about.get("python"),
                "versions": ", ".join(f"{name} {number}" for name, number in about.get("versions", {}).items()),
            }
        ),
        "## Figures",
        *([figures_text(e) for e in results] or ["Not evaluated."]),
        "## Limits",
        "The figures are of the cases above and hold for cases of the same kind. No hospital, scanner, protocol or "
        "population was studied except those of the data (DATA_CARD.md).",
        *(f"{e['folder']}: {' '.join(result_sentences(e))}" for e in results),
        *(f"{e['folder']}: {e['uncalibrated']}." for e in results if e.get("uncalibrated")),
        *(
            f"{e['folder']}: not an independent test: {len(e['leaks'])} patients or images are in two splits."
            for e in results
            if e.get("leaks")
        ),
        *(f"{e['folder']}: {e['unchecked']}." for e in results if e.get("unchecked")),
        *(f"{note}." for note in system.notes),
    ]
    return "\n\n".join(lines) + "\n"


def figures_text(evaluation: Mapping[str, Any]) -> str:
    """The scores and baselines of an evaluation as a table with intervals, and its rate of alarms."""
    e = evaluation
    number = lambda value: "" if value is None else f"{value:.3f}"
    measured = lambda of, name: (
        number(of.get(name))
        + (f" ({number(ci[0])} to {number(ci[1])})" if None not in (ci := of.get(f"{name}_ci") or [None]) else "")
    )
    counts = f"{counted(e['n'], 'cases')}, {e['n_normal']} normal, {e['n_abnormal']} abnormal"
    lines = [f"{e['folder']}: split {e['split']}, {counts}."]
    if reason := no_curves_reason(e):
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
        if not share:
            number, of = alarms["counts"]["unlabelled"]
            share = f"{number} of {counted(of, 'cases')} without a label"
        lines.append(f"Alarm at a p-value up to {alarms['rate']:g}, from {alarms['n']} held-out normal cases: {share}.")
    return "\n\n".join(lines)


def data_card(
    workdir: Path, config: ConfigDict, system: System, rows: Sequence[Row], results: Sequence[Mapping[str, Any]]
) -> str:
    """DATA_CARD.md: the source and licence of the data, the numbers of cases, the kinds of images, the preparation."""
    manifest = Path(config.data.manifest) if config.data.manifest else None
    if manifest:
        leaks = "allowed (data.allow_leaks) and reported" if config.data.allow_leaks else "none (refused)"
        source: dict[str, str | None] = {
            "manifest": str(manifest),
            "its SHA-256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
            "licence": licences(rows),
            "patients or images in two splits": leaks,
        }
    else:
        source = {"phantoms": f"{config.data.phantom}: drawn by jmae, without patients", "licence": "that of jmae"}
    source["digest of the training rows"] = rows_digest(system, workdir) if last_steps(system, workdir) else None
    source |= {f"digest of the images of {e['folder']}": e.get("digests", {}).get("images evaluated") for e in results}
    lines = [
        "# Data card",
        RESEARCH,
        bullets(source),
        "## Cases",
        case_counts(rows),
        "The labels of the split `unlabeled` are ignored, so they count as unknown." if manifest else "",
        "## Images",
        image_kinds(rows) if manifest else phantom_size(rows[0]),
        "## Preparation",
        bullets(
            {f"data.{key}": value for key, value in flat_settings(json.loads(recipe.to_json(config))["data"]) if value}
        ),
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def case_counts(rows: Sequence[Row]) -> str:
    """A table of the numbers of cases and patients by split and label."""
    table = [
        "| split | label | cases | patients | without a patient | with mask or boxes |",
        "|---|---|---|---|---|---|",
    ]
    for split in SPLITS:
        for label, word in LABELS.items():
            if group := [row for row in rows if row.split == split and row.label == label]:
                patients, unnamed = {row.patient for row in group if row.patient}, sum(not row.patient for row in group)
                marked = sum(bool(row.mask or row.boxes) for row in group)
                table.append(f"| {split} | {word} | {len(group)} | {len(patients)} | {unnamed} | {marked} |")
    return "\n".join(table)


def licences(rows: Sequence[Row]) -> str:
    """The licences in the manifest's column `licence` or `license`, with their numbers of cases."""
    columns = {name for row in rows for name in row.extra if name.lower() in ("licence", "license")}
    if not columns:
        return "unknown: the manifest has no column `licence`"
    licence = Counter(row.extra.get(name, "").strip() or "not stated" for row in rows for name in columns)
    return ", ".join(f"{text} ({counted(n, 'cases')})" for text, n in licence.most_common())


def image_kinds(rows: Sequence[Row]) -> str:
    """A table of the formats, channels and sizes of the images, from their headers, the most frequent first."""

    def kind(row: Row) -> tuple[str, int, str]:
        path = Path(row.image[0])
        ending = "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix
        try:
            size = " x ".join(map(str, image_size(path)))
        except InputError:
            size = "not in one header"  # such as the size of a DICOM series
        return ("folder" if path.is_dir() else ending or "no ending"), len(row.image), size

    with ThreadPoolExecutor(WORKERS) as pool:
        kinds = Counter(pool.map(kind, rows))
    table = ["| format | files a case | size | cases |", "|---|---|---|---|"]
    table += [f"| {cell(ending)} | {files} | {size} | {n} |" for (ending, files, size), n in kinds.most_common(KINDS)]
    rest = len(kinds) - KINDS
    return "\n".join(table) + (f"\n\n{rest} more kinds are not listed." if rest > 0 else "")


def phantom_size(row: Row) -> str:
    """The size and channels of a set of phantoms. All its rows have the same."""
    *size, channels = phantom(row.image[0]).image.shape
    return f"Size {' x '.join(map(str, size))}, {channels} channel{'s' * (channels > 1)}."


def bullets(facts: Mapping[str, Any]) -> str:
    """A Markdown list of facts, without those that have no value."""
    return "\n".join(f"- {name}: {' '.join(str(value).split())}" for name, value in facts.items() if value)


def cell(text: str) -> str:
    """The text as one cell of a Markdown table."""
    return " ".join(text.replace("|", "\\|").split())
