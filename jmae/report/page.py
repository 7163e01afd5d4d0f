"""The page of an evaluation, and how pages are written."""

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

from jmae import metrics
from jmae.report.cases import SLICES, Case, choose_cases, one_slice
from jmae.report.charts import (
    ABNORMAL,
    NORMAL,
    convergence_chart,
    froc_chart,
    loss_chart,
    pr_chart,
    roc_chart,
    score_chart,
)
from jmae.report.pictures import MAX_SIDE, Scale, case_pictures, colour_scale, palette, slides, spread_scale
from jmae.report.words import (
    comparison_rows,
    convergence_words,
    described,
    flat,
    headline,
    interval,
    named_patients,
    number,
    promise,
    stage_losses,
    without_curves,
)

RANKED = 100  # cases listed by their score, at most
PICTURE_BYTES = 1_800_000  # for all pictures of a page, before base64 adds a third


def _shown_cases(
    cases: Sequence[Case], normals: NDArray, colours: Scale | None, p_values: Mapping[str, float]
) -> tuple[Scale | None, Scale | None, list[dict[str, Any]]]:
    """The scales of maps and spreads, and the groups of cases with pictures and how many normals score lower."""
    groups = choose_cases([c.label for c in cases], [c.score for c in cases])
    shown = [i for group in groups.values() for i in group]
    if not shown:
        return None, None, []
    scale, spread = colours or colour_scale([cases[i] for i in shown]), spread_scale([cases[i] for i in shown])
    pictures = sum(4 + (spread is not None) + len(cases[i].pictures) for i in shown)
    side = min(MAX_SIDE, int(math.sqrt(PICTURE_BYTES / pictures)))  # palette PNG: at most a byte a pixel

    flat = {i: one_slice(cases[i]) for i in shown}
    paged = dict(zip(shown, slides([flat[i] for i in shown], scale), strict=True))

    def entry(i: int) -> dict[str, Any]:
        case = flat[i]
        below = f"above {np.sum(normals < case.score)} of {normals.size} normals" if normals.size else ""
        more = {
            "p": p_values.get(case.id),
            "slides": paged[i],
            "number": i,
            "depth": case.slices.depth if case.slices else None,
        }
        return {"case": case, "below": below, **case_pictures(case, scale, side, spread), **more}

    return scale, spread, [{"title": t, "cases": [entry(i) for i in group]} for t, group in groups.items()]


def write_report(
    path: str | Path,
    evaluation: Mapping[str, Any],
    cases: Sequence[Case],
    history: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    environment: Mapping[str, Any],
    colours: Scale | None = None,
) -> None:
    """Writes the page in one piece: a reader sees the old file or the new one, never half of one.

    Args:
      path: the HTML file; its folder is made.
      evaluation: the content of `metrics.json`, with `table`, a row {id, label, score, ...} a case.
      cases: those worth showing, at least what `choose_cases` picks of the table.
      history: the lines of `metrics.jsonl`.
      config, environment: the content of `config.json` and `environment.json`.
      colours: the scale of maps; that of the normals among the shown cases where there is none.
    """
    evaluation = metrics.json_ready(evaluation)
    table = evaluation.get("table") or []
    known = [row for row in table if row.get("label") is not None and row.get("score") is not None]
    labels = np.array([row["label"] for row in known], bool)
    scores = np.array([row["score"] for row in known], float)
    every = np.array([row["score"] for row in table if row.get("score") is not None], float)
    threshold = (evaluation.get("decision") or {}).get("threshold")
    p_values = {row["id"]: row["p_value"] for row in table if row.get("p_value") is not None}
    reason = without_curves(evaluation)
    curves = bool(known) and labels.any() and not labels.all()
    scale, spread, groups = _shown_cases(cases, scores[~labels], colours, p_values)
    rows = comparison_rows(evaluation)
    frocs = [r.pixel["froc"] for r in rows if r.pixel.get("froc")]
    froc = (evaluation.get("pixel") or {}).get("froc")
    bounds = [v for r in rows for v in (r.image.get("auroc"), *(r.image.get("auroc_ci") or ())) if v is not None]
    stages = stage_losses(history)
    patients = evaluation.get("per_patient")
    converged = evaluation.get("convergence")
    source = config.get("data") or {}
    phantom = f"phantoms: {source['phantom']}" if source.get("phantom") else ""
    by_score = sorted(table, key=lambda row: -math.inf if row["score"] is None else row["score"], reverse=True)

    page = (
        templates()
        .get_template("report.html.j2")
        .render(
            e=evaluation,
            data=source.get("manifest") or phantom,
            about=described(evaluation["system"])[0],
            headline=headline(evaluation),
            promise=promise(evaluation),
            reason=reason,
            rows=rows,
            axis=min(0.4, math.floor(10 * min(bounds)) / 10) if bounds else 0.4,
            pixels=any(r.pixel for r in rows),
            patient_mean=metrics.patient_mean(patients) if patients else None,
            named=named_patients(evaluation),
            roc=roc_chart(labels, scores, threshold) if curves else None,
            pr=pr_chart(labels, scores, threshold) if curves else None,
            froc_at=frocs[0]["at"] if frocs else None,
            ious=any(r.pixel.get("localisation") for r in rows),
            froc=froc_chart(froc) if froc and froc["curve"] else None,
            histogram=score_chart(labels if curves else None, scores if curves else every, threshold)
            if every.size
            else None,
            ranked=by_score[:RANKED],
            calibrated=bool(p_values),
            digests={**evaluation.get("digests", {}), "environment": digest(environment)},
            scale=scale,
            spread=spread,
            slides_most=SLICES,
            groups=groups,
            convergence=convergence_words(converged) if converged else [],
            convergence_chart=convergence_chart(converged) if converged else None,
            losses=[(stage, loss_chart(i, *xy)) for i, (stage, xy) in enumerate(stages.items())],
            printed=evaluation.get("printed") or [],
            config=flat(config),
            environment=flat(environment),
        )
    )
    write_page(Path(path), page)


def digest(settings: Mapping[str, Any]) -> str:
    """Equal for equal settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@lru_cache(1)
def templates() -> jinja2.Environment:
    """The pages' templates; what they write is escaped."""
    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"number": number, "interval": interval}
    gradient = ", ".join(f"rgb({r} {g} {b})" for r, g, b in palette()[np.linspace(0, 255, 9).round().astype(int)])
    found.globals |= {"normal": NORMAL, "abnormal": ABNORMAL, "gradient": gradient}
    return found


def write_page(path: Path, page: str) -> None:
    """Writes a page whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        half.write_text(page, encoding="utf-8", errors="backslashreplace")  # ids may hold undecodable bytes
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)
