"""The page of one evaluation; and how any page is rendered and written."""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray

import jmae.report.charts as charts
import jmae.report.words as words
from jmae import metrics
from jmae.report.cases import SLICES, WORST, Case, choose_cases, one_slice
from jmae.report.pictures import (
    MAX_SIDE,
    Scale,
    case_pictures,
    colour_scale,
    film_pictures,
    films,
    palette,
    slides,
    spread_scale,
)
from jmae.tables import counted

LISTED = 100  # cases in the list of scores, at most
NAMED = 10  # cases that a notice names, at most
PICTURE_BYTES = 1_800_000  # for all pictures of up to 16 cases, before base64 adds a third; as much again for films
PAGED = 24  # volumes that can be paged through, at most
FIRST, FIRST_SIDE = 6, 192  # pictures on the first screen, and their pixels


def write_report(
    path: str | Path,
    evaluation: Mapping[str, Any],
    cases: Sequence[Case],
    history: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    colours: Scale | None = None,
) -> None:
    """Write the page of an evaluation. A reader sees the old file or the new one, never half of one.

    Args:
      path: the HTML file; its folder is made.
      evaluation: the content of `metrics.json`, and `table`, one row {id, label, score, ...} a case.
      cases: the cases worth showing, at least those that `choose_cases` picks from the table.
      history: the lines of `metrics.jsonl`.
      config, environment: the content of `config.json` and `environment.json`.
      colours: the colour scale of maps; by default that of the normal cases that are shown.
    """
    evaluation = metrics.json_ready(evaluation)
    data = config.get("data") or {}
    values = {
        "e": evaluation,
        "data": data.get("manifest") or (f"phantoms: {data['phantom']}" if data.get("phantom") else ""),
        "about": words.system_description(evaluation["system"])[0],
        "results": words.result_sentences(evaluation),
        "promise": words.p_value_sentences(evaluation),
        "masks": words.mask_sentences(evaluation),
        "notices": words.notices(evaluation, config),
        "named": NAMED,
        "dice_of_everything": words.dice_of_everything(evaluation.get("pixel") or {}),
        "meanings": words.score_meanings(evaluation),
        "map_values": evaluation.get("map_words") or "values of the map, without a unit",
        "reason": words.no_curves_reason(evaluation),
        "digests": {**evaluation.get("digests", {}), "environment": settings_digest(environment)},
        "config": words.flat_settings(config),
        "environment": words.flat_settings(environment),
        **table_values(evaluation),
        **score_values(evaluation),
        **case_values(evaluation, cases, colours, config.get("evaluation") or {}),
        **training_values(evaluation, history),
    }
    write_page(Path(path), templates().get_template("report.html.j2").render(values))


# --- what the template shows, part by part ----------------------------------------------------------------------------


def table_values(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the tables of scores, baselines and patients."""
    rows = words.comparison_rows(evaluation)
    frocs = [r.pixel["froc"] for r in rows if r.pixel.get("froc")]
    return {
        "rows": rows,
        "axis": auroc_axis_start([row.image for row in rows]),
        "pixels": any(r.pixel for r in rows),
        "froc_at": frocs[0]["at"] if frocs else None,
        "ious": any(r.pixel.get("localisation") for r in rows),
        "patient_means": evaluation.get("patient_means") or {},
        "patients": words.patient_rows(evaluation),
    }


def auroc_axis_start(figures: Sequence[Mapping[str, Any]]) -> float:
    """Where the axis of AUROC begins: at 0.4, or below the lowest AUROC or end of an interval."""
    bounds = [v for f in figures for v in (f.get("auroc"), *(f.get("auroc_ci") or ())) if v is not None]
    return min(0.4, math.floor(10 * min(bounds)) / 10) if bounds else 0.4


def score_values(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The curves, the histogram, and the list of cases by score."""
    table, alarms = evaluation.get("table") or [], evaluation.get("alarms") or {}
    labels, scores = labelled_scores(table)
    both_classes = labels.any() and not labels.all()
    all_scores = np.array([row["score"] for row in table if row.get("score") is not None], float)
    threshold = (evaluation.get("decision") or {}).get("threshold")
    froc = (evaluation.get("pixel") or {}).get("froc")
    histogram = None
    if all_scores.size:
        histogram = charts.score_chart(
            labels if both_classes else None, scores if both_classes else all_scores, threshold
        )
    by_score = sorted(table, key=lambda row: -math.inf if row["score"] is None else row["score"], reverse=True)
    return {
        "roc": charts.roc_chart(labels, scores, threshold) if both_classes else None,
        "pr": charts.pr_chart(labels, scores, threshold) if both_classes else None,
        "froc": charts.froc_chart(froc) if froc and froc["curve"] else None,
        "histogram": histogram,
        "ranked": by_score[:LISTED],
        "listed": {row["id"]: place for place, row in enumerate(by_score[:LISTED], 1)},
        "calibrated": any(row.get("p_value") is not None for row in table),
        "alarm_rate": alarms.get("rate", 0),
        "smallest": 1 / (alarms["n"] + 1) if alarms else 0,
    }


def labelled_scores(table: Sequence[Mapping[str, Any]]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Labels and scores of the rows that have both, (n,) each."""
    rows = [row for row in table if row.get("label") is not None and row.get("score") is not None]
    return np.array([row["label"] for row in rows], bool), np.array([row["score"] for row in rows], float)


def case_values(
    evaluation: Mapping[str, Any], cases: Sequence[Case], colours: Scale | None, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The scales of maps and spreads, and the groups of cases with their pictures."""
    groups = choose_cases([c.label for c in cases], [c.score for c in cases], settings.get("pictures", len(cases)))
    shown = [i for group in groups.values() for i in group]
    table = evaluation.get("table") or []
    values: dict[str, Any] = {"scale": None, "spread": None, "groups": [], "slices_most": SLICES, "pictured": {}}
    values |= {
        "drawn": set(),
        "first": [],
        "film_side": None,
        "paged": PAGED,
        "unlabelled": sum(row["label"] is None for row in table),
    }
    if not shown:
        return values
    labels, scores = labelled_scores(table)
    normals = scores[~labels]
    lines = {row["id"]: row for row in table}
    own = ("id", "label", "score", "p_value", "score_error")
    others = {row["id"]: {k: v for k, v in row.items() if k not in own} for row in table}
    scale, spread = colours or colour_scale([cases[i] for i in shown]), spread_scale([cases[i] for i in shown])
    flat = [one_slice(cases[i]) for i in shown]
    flat[PAGED:] = [case._replace(pictures={}, slices=None) for case in flat[PAGED:]]
    n_pictures = sum(
        (3 if case.film else 4) + (spread is not None) + (case.region is not None) + len(case.pictures) for case in flat
    )
    factor = max(1.0, len(flat) / 16)
    # A PNG with a palette has at most a byte a pixel.
    side = min(MAX_SIDE, int(math.sqrt(PICTURE_BYTES * min(4, factor) / n_pictures)))
    film_side, film_views = films(flat, scale, PICTURE_BYTES * min(8, factor))
    paged = slides(flat, scale)

    def entry(k: int) -> dict[str, Any]:
        case = flat[k]
        of = counted(normals.size, "normal cases")
        below = f"above {np.sum(normals < case.score)} of {of}" if normals.size else ""
        pictures = case_pictures(case, scale, side, spread)
        return {
            "seen": pictures["image"] if case.film else None,
            "aspect": None,
            **pictures,
            **film_views[k],
            "case": case,
            "below": below,
            "p": lines.get(case.id, {}).get("p_value"),
            "warning": lines.get(case.id, {}).get("warning"),
            "others": {name: v for name, v in others.get(case.id, {}).items() if isinstance(v, float)},
            "slides": paged[k],
            "number": shown[k],
            "depth": case.slices.depth if case.slices else None,
        }

    place = {i: k for k, i in enumerate(shown)}
    entries: list[dict[str, Any]] = [
        {"title": title, "cases": [entry(place[i]) for i in group]} for title, group in groups.items()
    ]
    worst = [one for group in entries if group["title"] in WORST for one in group["cases"]][:FIRST]
    small = lambda one: film_pictures(one["case"], scale, FIRST_SIDE) if one["case"].film else {}
    return values | {
        "scale": scale,
        "spread": spread,
        "groups": entries,
        "drawn": {name for group in entries for one in group["cases"] for name, what in one.items() if what},
        "first": [one | small(one) for one in worst],
        "film_side": film_side if any(film_views) else None,
        "pictured": {cases[i].id: i for i in shown},
    }


def training_values(evaluation: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The training losses, the values of the paper beside them, and the study of convergence."""
    study = evaluation.get("convergence")
    return {
        "losses": [
            (stage, charts.loss_chart(i, *xy)) for i, (stage, xy) in enumerate(words.stage_losses(history).items())
        ],
        "learnt": words.learnt_sentence(history),
        "explained": words.explained_sentences(history),
        "printed": evaluation.get("printed") or [],
        "convergence": words.convergence_sentences(study) if study else [],
        "convergence_chart": charts.convergence_chart(study) if study else None,
    }


def settings_digest(settings: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that are equal for equal settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


# --- rendering and writing --------------------------------------------------------------------------------------------


@lru_cache(1)
def templates() -> jinja2.Environment:
    """The templates of all pages. Jinja escapes every value that they write."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": words.number_text, "interval": words.interval_text, "counted": counted}
    colours = palette()[np.linspace(0, 255, 9).round().astype(int)]
    gradient = ", ".join(f"rgb({r} {g} {b})" for r, g, b in colours)
    environment.globals |= {"normal": charts.NORMAL, "abnormal": charts.ABNORMAL, "gradient": gradient}
    return environment


def write_page(path: Path, page: str) -> None:
    """Write a page as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(page, encoding="utf-8", errors="backslashreplace")  # ids may hold undecodable bytes
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
