"""The report: what it shows, what it must never do, and its words."""

import base64
import functools
import html
import io
import json
import os
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from jmae import metrics, recipe
from jmae.calibration import colours_of
from jmae.console import console_summary
from jmae.data import files
from jmae.data.films import film_of
from jmae.data.manifest import Row
from jmae.data.prepare.overview import too_few_to_learn
from jmae.p_values import Calibration
from jmae.report.cases import (
    SLICE_BYTES,
    SLICES,
    SLIDE_SIDES,
    Case,
    choose_cases,
    one_slice,
    outline,
    shown_voxel,
    slice_side,
    worth_showing,
)
from jmae.report.charts import froc_chart
from jmae.report.page import write_report
from jmae.report.pictures import Scale, case_pictures, colour_scale, slides, spread_scale
from jmae.report.words import (
    comparison_rows,
    few_labels_sentence,
    mask_sentences,
    p_value_sentences,
    patient_rows,
    result_sentences,
    score_meanings,
    short_training,
    stage_losses,
    unlike_sentences,
)
from jmae.scoring import case_score_words
from jmae.system import load_system

EVIL = "<script>alert('x')</script>\" onload=\"a()"


def a_case(name, label, score, size=(40, 36), seed=0):
    rng = np.random.default_rng(seed)
    mask = np.zeros(size, bool)
    heat = rng.gamma(2, 0.1, size).astype(np.float32)
    if label:
        mask[tuple(slice(n // 3, n // 2) for n in size)] = True
        heat[mask] += 2
    return Case(name, label, score, rng.random((*size, 2), np.float32), heat, mask if label else None)


@functools.cache
def metrics_json(n=40):
    """A complete metrics.json of a made-up system that is better than its baselines."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2
    scores = 2.0 * labels + rng.normal(size=n)
    image = metrics.image_metrics(labels, scores, [""] * n, draws=100)
    weak = metrics.image_metrics(labels, labels + 2 * rng.normal(size=n), [""] * n, draws=100)
    pixel = metrics.pixel_metrics([c.mask for c in [a_case("", 1, 0)]], [a_case("", 1, 0).map])
    evaluation = {
        "system": "amae",
        "split": "test",
        "n": n,
        "n_normal": n // 2,
        "n_abnormal": n // 2,
        "primary": "stage2",
        "image": image,
        "pixel": pixel,
        "scores": {"stage2": {"image": image, "pixel": pixel}, "stage1": {"image": weak, "pixel": None}},
        "subsets": {"first hospital": {"image": weak, "pixel": None, "n": 17}},
        "baselines": {"mean intensity": {"image": weak, "pixel": None}},
        "decision": metrics.at_threshold(labels, scores, 1.0),
        "chi2": metrics.chi2_distance(scores[labels == 0], scores[labels == 1]),
        "replicates": {"auroc": metrics.replicate_summary([0.8, 0.9, 1.0])},
        "per_patient": [{"patient": "p", "auroc": 0.75, "ap": 0.5, "prevalence": 0.1}, {"patient": "q", "auroc": None}],
        "patient_means": {"stage2": {"auroc": 0.75, "ap": 0.5, "prevalence": 0.1, "n": 1, "skipped": 1}},
        "seconds": 3.2,
        "table": [
            {"id": f"case{i}", "label": int(y), "score": float(s)}
            for i, (y, s) in enumerate(zip(labels, scores, strict=True))
        ],
    }
    return json.dumps(metrics.json_ready(evaluation), allow_nan=False)


def an_evaluation(**changes):
    return json.loads(metrics_json()) | changes


def unlabelled(n=8):
    table = [{"id": f"scan{i}", "label": None, "score": float(i)} for i in range(n)]
    blank = dict.fromkeys(("image", "pixel", "decision", "chi2", "replicates", "per_patient", "patient_means"))
    named: dict = {"scores": {}, "subsets": {}, "baselines": {}}
    return an_evaluation(**blank, **named, n=n, n_normal=0, n_abnormal=0, table=table)


def cases_of(evaluation, **kwargs):
    table = evaluation["table"]
    groups = choose_cases([r["label"] for r in table], [r["score"] for r in table], len(table))
    kept = [table[i] for i in sorted(i for g in groups.values() for i in g)]
    return [a_case(r["id"], r["label"], r["score"], seed=i, **kwargs) for i, r in enumerate(kept)]


HISTORY = [
    {"stage": stage, "step": k, "loss": 1 / (k + 1), "lr": 1e-3} for stage in ("proxy", "a & b") for k in range(30)
]


def write(path, evaluation, cases=None, history=HISTORY, config=None, environment=None):
    cases = cases_of(evaluation) if cases is None else cases
    write_report(path, evaluation, cases, history, config or {"seed": 0}, environment or {"jax": "0.10"})
    return path.read_text(encoding="utf-8")


class Page(HTMLParser):
    """All tags with their attributes, the ids, the text, and whether every tag that opens closes."""

    void = frozenset({"meta", "link", "img", "br", "input"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if not self.open or self.open[-1] != "style" else ""

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return write(tmp_path_factory.mktemp("report") / "evaluation" / "report.html", an_evaluation())


def test_worst_cases_are_the_most_wrongly_scored_and_no_case_comes_twice():
    labels = [0] * 10 + [1] * 10
    scores = [*range(10), *range(10)]
    groups = choose_cases(labels, scores, 1, 2)
    assert groups == {
        "Abnormal, worst scores": [10, 11],
        "Abnormal, best scores": [19, 18],
        "Abnormal, middle scores": [14, 15],
        "Normal, worst scores": [9, 8],
        "Normal, best scores": [0, 1],
        "Normal, middle scores": [5, 4],
    }


@pytest.mark.parametrize("seed", range(20))
def test_choosing_among_the_chosen_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    labels = rng.choice([0, 1, None], int(rng.integers(0, 30))).tolist()
    scores = np.round(rng.normal(size=len(labels)), 1).tolist()
    n, unlabelled = (int(value) for value in rng.integers(1, 6, 2))
    groups = choose_cases(labels, scores, unlabelled, n)
    chosen = [i for group in groups.values() for i in group]
    assert len(chosen) == len(set(chosen))
    most = {0: 3 * n, 1: 3 * n, None: unlabelled}
    assert all(sum(labels[i] == y for i in chosen) == min(most[y], labels.count(y)) for y in most)
    kept = sorted(chosen)
    again = choose_cases([labels[i] for i in kept], [scores[i] for i in kept], unlabelled, n)
    assert {t: [kept[i] for i in g] for t, g in again.items()} == groups


def test_cases_without_labels_come_before_their_scores_with_the_highest_first(tmp_path):
    words = Page(write(tmp_path / "r.html", unlabelled(30))).text
    places = [words.index(f"scan{i} score") for i in range(29, -1, -1)]  # all have pictures
    assert places == sorted(places) and words.index("the highest scores first") < places[0]
    assert places[-1] < words.index("Distribution of the primary score") < words.index("Loss of stage")
    assert "of 30 cases without a label" not in words


def test_a_page_says_how_many_cases_have_pictures_and_how_more_get_them(tmp_path):
    e = unlabelled(30)
    text = write(tmp_path / "r.html", e, config={"evaluation": {"pictures": 7}})
    shown = re.findall(r'<figure id="case-(\d+)">', text)
    assert len(shown) == 7 and set(shown) == {str(i) for i in range(23, 30)}
    words = " ".join(Page(text).text.split())
    assert "Pictures show the 7 highest scores of 30 cases without a label" in words
    assert words.count("--config.evaluation.pictures=30") == 1


def test_the_first_screen_has_the_worst_cases_before_any_sentence(page, tmp_path):
    e = an_evaluation()
    labels, scores = (np.array([row[key] for row in e["table"]]) for key in ("label", "score"))
    order = np.argsort(scores)
    worst = [*order[labels[order] == 1][:2], *order[labels[order] == 0][:-3:-1]]
    ids = lambda text: re.findall(r"<li><a [^>]*><img [^>]*><b>([^<]*)</b>", text)
    assert ids(page) == [f"case{i}" for i in worst]
    text = write(tmp_path / "r.html", unlabelled())
    assert ids(text) == [f"scan{i}" for i in (7, 6, 5, 4, 3, 2)]
    for each in (page, text):
        assert each.index('<div class="first">') < each.index('<p class="lead">')
        assert set(re.findall(r'<li><a href="#(case-\d+)">', each)) <= set(re.findall(r'<figure id="([^"]*)">', each))


def a_film(size=(700, 560)):
    """A film of stored values with a bright square, and its pixels as they are drawn."""
    array = np.random.default_rng(0).integers(100, 300, size).astype(np.float32)
    array[: size[0] // 4, : size[1] // 4] = 4000
    return film_of(stored(array[..., None]))


def stored(array):
    return files.Image(np.float32(array), None, None, 16)


def test_a_film_is_the_stored_image_with_square_pixels_and_a_bounded_edge():
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 1000, (32, 24))
    fine = np.kron(blocks, np.ones((32, 32)))[..., None]  # 1024 x 768
    small = fine[::2, ::2, 0]  # the means of 2 x 2 equal pixels
    dark, bright = np.percentile(small, (1, 99))
    expected = 255 * np.clip((small - dark) / (bright - dark), 0, 1)
    drawn = np.asarray(Image.open(io.BytesIO(film_of(stored(fine)))), float)
    assert drawn.shape == (512, 384) and abs(drawn - expected).mean() < 3
    assert Image.open(io.BytesIO(film_of(stored(blocks[..., None])))).size == (24, 32)  # never enlarged
    colours = np.stack([small, small[::-1], small[:, ::-1]], -1)
    drawn = np.asarray(Image.open(io.BytesIO(film_of(stored(colours)))), float)
    assert drawn.shape == (512, 384, 3) and np.corrcoef(drawn.ravel(), colours.ravel())[0, 1] > 0.95
    fine[:40] = 1e6  # a marker outside of the window
    clipped = np.asarray(Image.open(io.BytesIO(film_of(stored(fine), (0, 1000)))), float)
    assert np.ptp(clipped[40:]) > 200
    assert film_of(stored(np.full((9, 9, 1), np.nan)))  # one value, none finite


def test_a_case_with_a_film_shows_the_film_and_the_map_over_it(tmp_path):
    e = unlabelled(3)
    heat = np.zeros((16, 16), np.float32)
    heat[8:, 8:] = 1  # opposite to the film's bright square
    cases = [a_case(f"scan{i}", None, float(i), (16, 16))._replace(map=heat, film=a_film()) for i in range(3)]
    text = write(tmp_path / "r.html", e, cases, [])
    panels = re.findall(r'<img src="([^"]*)" style="aspect-ratio: 410 / 512" alt="(\w+)', text)
    assert [name for _, name in panels] == ["Image", "Anomaly", "Map"] * 3
    film, network, overlay = (picture(uri) for uri, _ in panels[:3])
    assert film.size == overlay.size == (410, 512) and network.size == (16, 16)
    film, overlay = np.asarray(film, float), np.asarray(overlay.convert("RGB"), float)
    assert film[:120, :90].min() > 240 and film[140:, 120:].mean() < 200
    colour = np.ptp(overlay, axis=-1)  # grey has none
    assert colour[:240, :190].mean() < 12 and colour[280:, 230:].mean() > 60
    assert "at most 512 pixels along its longer edge" in text and "network’s 16 by 16 pixels" in text
    assert "What the network sees" not in text
    cases[0] = cases[0]._replace(reconstruction=cases[0].image)
    assert write(tmp_path / "r.html", e, cases, []).count('alt="What the network sees of case scan0') == 1


def test_films_shrink_until_a_page_with_many_cases_is_small(tmp_path, monkeypatch):
    monkeypatch.setattr("jmae.report.page.PICTURE_BYTES", 60_000)
    noise = film_of(stored(np.random.default_rng(0).random((512, 512, 1))))
    e = unlabelled(12)
    cases = [case._replace(film=noise) for case in cases_of(e, size=(16, 16))]
    text = write(tmp_path / "r.html", e, cases, [])
    sizes = {picture(uri).size for uri in re.findall(r'src="([^"]*)" style="aspect', text) if "jpeg" in uri}
    assert sizes == {(96, 96)} and "at most 96 pixels" in text


def test_an_evaluator_keeps_some_hundred_cases_with_all_that_the_page_shows():
    rng = np.random.default_rng(0)
    blank = a_case("", None, 0.0, (2, 2))
    labels, scores = rng.choice([0, 1, None], 4000), rng.normal(size=4000)
    cases = []
    for i, (label, score) in enumerate(zip(labels, scores, strict=True)):
        cases = worth_showing([*cases, blank._replace(id=str(i), label=label, score=float(score))], 30)
        assert len(cases) <= 530
    groups = choose_cases([c.label for c in cases], [c.score for c in cases], 30)
    whole = choose_cases(list(labels), scores.tolist(), 30)
    for title, group in groups.items():
        found = [int(cases[i].id) for i in group]
        if "middle" in title:
            share = [(scores[labels == labels[i]] < scores[i]).mean() for i in found]
            assert max(abs(np.array(share) - 0.5)) < 0.1
        else:
            assert found == whole[title]


@pytest.mark.long
def test_each_case_of_the_list_leads_to_its_pictures_and_these_can_be_larger(page):
    ids = {attrs["id"] for _, attrs in Page(page).tags if "id" in attrs}
    links = re.findall(r'<th scope="row"><a href="#(case-\d+)">', page)
    assert len(links) == len(set(links)) == 12 and set(links) <= ids
    assert page.count('class="larger"') == page.count('class="smaller" href="#cases"') == 12 and "cases" in ids


def test_leaks_are_a_warning_above_all_figures_and_without_them_there_is_none(tmp_path):
    leaks = [f"patient '{EVIL}{i}' is in train and test" for i in range(23)]
    for name, evaluation in (("leaky", an_evaluation(leaks=leaks)), ("sound", an_evaluation(leaks=[]))):
        write_report(tmp_path / f"{name}.html", evaluation, [], [], {}, {})
    page = (tmp_path / "leaky.html").read_text()
    assert page.index("Not an independent test.") < page.index("AUROC of the primary score")
    assert page.count("is in train and test") == 20 and "3 more are in metrics.json" in page and "<script" not in page
    assert "Not an independent test." not in (tmp_path / "sound.html").read_text()


def test_the_page_asks_for_nothing_and_runs_nothing(page):
    parsed = Page(page)
    assert not parsed.open and not parsed.of("script")
    for tag, attrs in parsed.tags:
        assert not [name for name in attrs if name.startswith("on")], tag
        for name in ("src", "href", "xlink:href", "data", "action", "poster", "srcset"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), (tag, attrs[name][:60])
    assert not re.search(r"@import|url\((?!#)", page)
    policy = [a["content"] for a in parsed.of("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]


def test_what_comes_from_data_is_harmless(tmp_path):
    evaluation = an_evaluation(system=EVIL, split=EVIL, primary=EVIL)
    evaluation["subsets"] = {EVIL: evaluation["subsets"]["first hospital"]}
    evaluation["baselines"] = {EVIL: evaluation["baselines"]["mean intensity"]}
    evaluation["scores"][EVIL + "1"] = evaluation["scores"]["stage1"]
    evaluation["replicates"] = {EVIL: evaluation["replicates"]["auroc"]}
    evaluation["table"][0]["id"] = EVIL
    cases = [c._replace(id=EVIL) for c in cases_of(evaluation)[:3]]
    history = [{"stage": EVIL + "$x_{", "step": 0, "loss": 1.0}]
    text = write(tmp_path / "r.html", evaluation, cases, history, {EVIL: {EVIL: EVIL}}, {EVIL: [EVIL]})
    parsed = Page(text)
    assert "<script" not in text and not parsed.of("script")
    assert not [a for _, a in parsed.tags if "onload" in a]
    assert EVIL in parsed.text
    assert (
        f"{EVIL}: 8 cases of the split test, most suspicious first"
        in Page(write(tmp_path / "u.html", unlabelled() | {"system": EVIL}, [], [])).text
    )


def test_ids_are_unique_and_every_reference_resolves(page):
    ids = [attrs["id"] for _, attrs in Page(page).tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 10
    assert set(re.findall(r'(?:url\(#|href="#)([^)"]+)', page)) <= set(ids)


def test_every_picture_has_words_and_every_chart_is_well_formed(page):
    parsed = Page(page)
    assert len(parsed.of("img")) == 3 * 12 + 4 and all(a["alt"] for a in parsed.of("img"))  # 4 on the first screen
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        root = ElementTree.fromstring(svg)
        assert root.get("aria-hidden") == "true" or root.get("aria-label")
    assert parsed.of("html") == [{"lang": "en"}]
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in parsed.of("div") if a.get("class") == "scroll")


def test_the_table_comes_first_and_everything_has_its_place(page):
    words = Page(page).text
    place = 0
    for part in (
        "for research, not for clinical use",
        "times in 100",
        "Beside baselines and rivals",
        "mean intensity",
        "chance",
        "first hospital",
        "pixel AUROC",
        "an upper bound",
        "0.900 ± 0.196",
        "As a yes or no",
        "Curves",
        "χ²",
        "Cases",
        "Abnormal, worst scores",
        "Loss of stage proxy",
        "Loss of stage a & b",
        "Recipe",
        "Environment",
    ):
        place = words.index(part, place)
    assert "Of the values of 6 normal maps shown here" in words
    assert "mean over patients" in words and "1 patient without a lesion is left out" in words


def test_the_numbers_are_those_of_the_evaluation(page):
    e, words = an_evaluation(), Page(page).text
    for image in (e["image"], e["baselines"]["mean intensity"]["image"]):
        for name in ("auroc", "ap"):
            lo, hi = image[f"{name}_ci"]
            assert re.search(rf"{image[name]:.3f}\s+{lo:.3f}–{hi:.3f}", words)
    found = round(e["decision"]["sensitivity"] * 20)
    assert f"it finds {found} of 20 abnormal cases" in words


def test_baselines_stand_from_best_to_worst_with_chance_last():
    e = an_evaluation()
    e["baselines"] = {f"b{a}": {"image": {"auroc": a}, "pixel": None} for a in (0.6, 0.9, None, 0.7)}
    rows = comparison_rows(e)
    assert [r.name for r in rows] == ["stage2", "stage1", "b0.9", "b0.7", "b0.6", "bNone", "chance"]
    assert rows[-1].image == {"auroc": 0.5, "ap": 0.5}


@pytest.mark.parametrize(
    ("auroc", "ci", "expected"),
    [
        (0.9, [0.85, 0.95], "90 times in 100 (95 % interval 85 to 95). Chance gives 50."),
        (0.55, [0.45, 0.65], "cannot tell this result from chance"),
        (0.3, [0.2, 0.4], "point the wrong way"),
        (0.9, [None, None], "90 times in 100. Chance gives 50."),
    ],
)
def test_the_headline_says_what_the_interval_allows(auroc, ci, expected):
    e = an_evaluation(image={"auroc": auroc, "auroc_ci": ci, "ap": 0.5, "ap_ci": ci})
    assert expected in " ".join(result_sentences(e))


@pytest.mark.parametrize(
    ("difference", "ci", "expected"),
    [
        (
            0.031,
            [0.01, 0.052],
            "stage2 is better than “edges”, the best of 7 baselines and rivals, by +0.031 [+0.010, ",
        ),
        (
            0.031,
            [-0.01, 0.052],
            "stage2 is not better than “edges”, the best of 7 baselines and rivals: +0.031 [-0.010",
        ),
        (-0.2, [-0.3, -0.1], "stage2 is not better than “edges”, the best of 7 baselines and rivals: -0.200 [-0.300"),
        (0.2, [None, None], "stage2 is not better than “edges”, the best of 7 baselines and rivals: +0.200"),
    ],
)
@pytest.mark.long_but_first
def test_the_first_sentence_compares_with_the_best_of_all_baselines(difference, ci, expected, tmp_path):
    best = {"name": "edges", "of": 7, "auroc": difference, "auroc_ci": ci, "ap": 0.0, "ap_ci": ci}
    e = an_evaluation(best_rival={"image": best, "pixel": None}, explained={"the network": 0.77, "80 components": 0.84})
    first, second, *_ = result_sentences(e)
    assert first.startswith(expected)
    assert second.endswith("of held-out normals: the network 0.77, 80 components 0.84.")
    assert html.escape(expected[:30]) in write(tmp_path / "r.html", e, [])
    e = an_evaluation(best_rival={"image": None, "pixel": best | {"n": 3}}, image=None, n_normal=0)
    assert "(pixel AUROC, mean over 3 patients, 95 % interval)" in result_sentences(e)[0]
    e["best_rival"]["pixel"]["n"] = 1
    assert "(pixel AUROC, mean over 1 patient, 95 % interval)" in result_sentences(e)[0]


def calibrated(labels, p, n, rate=0.05, threshold=0.7):
    rows = enumerate(zip(labels, p, strict=False))  # as many as the shorter
    table = [{"id": f"c{i}", "label": y, "score": 1.0, "p_value": value} for i, (y, value) in rows]
    own = lambda label: [row["p_value"] for row in table if row["label"] == label and row["p_value"] is not None]
    kinds = {"normal": own(0), "abnormal": own(1), "unlabelled": own(None)}
    counts = {kind: [sum(value <= rate for value in values), len(values)] for kind, values in kinds.items()}
    return {"table": table, "alarms": {"n": n, "rate": rate, "threshold": threshold, "counts": counts}}


def test_what_was_promised_stands_beside_what_came_of_it():
    p = [0.01] * 3 + [0.9] * 47 + [0.05] * 20 + [0.06] * 30 + [None]
    words = " ".join(p_value_sentences(calibrated([0] * 50 + [1] * 51, p, 99)))
    assert "of 99 held-out normal cases and the case itself" in words and "at most 5 % have a p-value of 0.05" in words
    assert "above 0.7 is raised here for 3 of 50 normal cases and 20 of 50 abnormal cases." in words
    assert "chance below" not in words
    # 30 of 50 at 5 % promised: not by chance; 1 of 1 says little
    assert (
        "calibrate on normal cases of this kind"
        in p_value_sentences(calibrated([0] * 50, [0.01] * 30 + [1] * 20, 99))[-1]
    )
    assert len(p_value_sentences(calibrated([0], [0.01], 99))) == 3
    unknown = " ".join(p_value_sentences(calibrated([None] * 4, [0.01, 1, 1, 1], 99)))
    assert "here for 1 of 4 unlabelled cases" in unknown
    assert p_value_sentences({"alarms": None, "uncalibrated": "give it normals"}) == ["Give it normals."]


def test_too_few_normals_for_an_alarm_are_said_on_the_first_screen(tmp_path):
    few = an_evaluation(**calibrated([0, 1], [0.5, 0.5], 8, threshold=None))
    few["alarms"] |= {"normal": 0.0, "abnormal": 0.0}
    text = write(tmp_path / "r.html", few)
    assert "at most 5 % have a p-value" not in text, "here no case can have one"
    said = (
        "With 8 held-out normals, the smallest p-value is 1/9 = 0.11. The alarm rate is 0.05. Remedy: give 38 normal "
        "scans or more, and keep half of them from the training (data.calibration=0.5)."
    )
    assert f"<b>No alarm is possible.</b> {said}" in text
    assert text.index(said) < text.index("AUROC of the primary score") < text.index('<div class="first">')
    fact = "no alarm is possible at 0.05: smallest possible p-value 0.11, of 8 held-out normals\n"
    assert fact in f"{console_summary(on_console(few))}\n" and "give " not in console_summary(on_console(few))
    enough = an_evaluation(**calibrated([0, 1], [0.5, 0.5], 19))
    assert "No alarm is possible" not in write(tmp_path / "enough.html", enough)


def on_console(evaluation):
    """An evaluation without what made-up figures lack."""
    return evaluation | {"pixel": None, "image": None, "n_normal": 0, "scores": {}, "baselines": {}}


def test_how_many_cases_have_a_mask_is_said_or_why_none_has_one(tmp_path):
    masked = lambda n, of: an_evaluation(masked={"n": n, "of": of, "threshold": 0.01234567})
    three, one, none = (" ".join(mask_sentences(masked(n, 20))) for n in (3, 1, 0))
    assert three.startswith("3 of 20 cases have a mask. A mask marks where the map lies above 0.01235.")
    assert one.startswith("1 of 20 cases has a mask. ") and none.startswith("None of 20 cases has a mask. ")
    assert "dashed orange line" in three and "dashed orange line" not in none
    promised = "Of normal cases of the same kind, at most 5 % have a mask, on average."
    assert promised in mask_sentences(masked(3, 20) | {"alarms": {"rate": 0.05}}) and promised not in three
    assert all("jmae predict writes them as files, ID_mask." in said for said in (three, one, none))
    assert mask_sentences({"maskless": "no masks: 8 held-out normals, 19 are needed"}) == [
        "No masks: 8 held-out normals, 19 are needed."
    ]
    assert html.escape(three) in write(tmp_path / "r.html", masked(3, 20), [], [])
    assert "3 of 20 cases have a mask." in console_summary(on_console(masked(3, 20) | {"alarms": None}))
    assert mask_sentences({"maskless": None, "masked": None}) == []


def test_the_legend_names_what_the_pictures_have(tmp_path):
    e = an_evaluation(masked={"n": 1, "of": 40, "threshold": 0.5})
    plain = [case._replace(mask=None) for case in cases_of(e)]
    legend = lambda cases: re.search(
        r"Pictures of a case, from left to right:.*?</p>", write(tmp_path / "r", e, cases)
    )[0]
    words = ("cyan line", "dashed orange line", "reconstruction", "spread", "where it counts")
    assert [word for word in words if word in legend(plain)] == []
    mask = np.zeros(plain[3].map.shape, bool)
    mask[4:9, 4:9] = True
    changes = {
        "mask": mask,
        "called": mask,
        "reconstruction": plain[3].image,
        "confidence": plain[3].map,
        "region": mask,
    }
    for word, (name, value) in zip(words, changes.items(), strict=True):
        changed = [*plain[:3], plain[3]._replace(**{name: value}), *plain[4:]]
        assert [each for each in words if each in legend(changed)] == [word]


def test_the_colours_are_explained_beside_the_first_pictures(tmp_path):
    e = an_evaluation(map_words="a probability")
    text = write(tmp_path / "r.html", e)
    first = text[text.index('<div class="first">') : text.index('<p class="lead">')]
    assert (
        "All maps share these colours (a probability). Of the values of 6 normal maps shown here, 1 of 1,000 is higher"
        in first
    )
    assert first.count('class="scale"') == 1
    said = colours_of(Calibration(dict.fromkeys("abc", 1.0), 0.1, 0.7)).source
    assert said.startswith(
        "The bright end is 0.7. Normal maps hardly go beyond it: in 19 of 20 maps of 3 held-out normals, at most 1 of"
    )


def test_figures_of_very_few_labelled_cases_have_a_notice(tmp_path):
    text = write(tmp_path / "r.html", an_evaluation(n_normal=2, n_abnormal=1))
    what = "<b>Very few cases with a label.</b> The figures are of 2 normal and 1 abnormal. So few say little, and the"
    assert what in text and text.index(what) < text.index('<div class="first">')
    for n, k in ((10, 10), (0, 0), (5, 0)):
        assert few_labels_sentence({"n_normal": n, "n_abnormal": k}) == ""


def test_scans_that_could_not_be_read_are_named_on_the_first_screen(tmp_path):
    left = [f"s{i}: /new/s{i}.png: is empty" for i in range(7)]
    text = write(tmp_path / "r.html", an_evaluation(left_out=left))
    assert "<b>7 scans could not be read.</b> This page has no score of: s0: /new/s0.png: is empty; s1:" in text
    assert "s4.png: is empty; and 2 more." in text and text.index("s4.png") < text.index('<div class="first">')
    one = write(tmp_path / "one.html", an_evaluation(left_out=left[:1]))
    assert "<b>1 scan could not be read.</b>" in one and "more." not in one[: one.index('<div class="first">')]
    assert "could not be read" not in write(tmp_path / "none.html", an_evaluation())


def test_a_short_training_is_said_at_the_top_and_names_of_scores_and_pictures_are_explained(tmp_path):
    evaluation = an_evaluation(words={"stage2": "difference of two reconstructions"})
    shown = lambda config: write(tmp_path / "r.html", evaluation, cases_of(evaluation), config=config)
    page = shown({"budget": 0.25})
    assert "<b>Short training.</b> 25 % of the recipe" in page and "--config.budget=1" in page
    evaluation["doubts"] = ["stage a ended with a rise of its loss, from 1 to 2"]
    assert "<b>The training may have failed.</b> Stage a ended with a rise of its loss" in shown({})
    assert short_training({"budget": 0.25}).startswith("25 % of the recipe's steps, so scores and maps")
    best, share = evaluation["pixel"]["dice_best"], evaluation["pixel"]["prevalence"]
    assert (
        f"best Dice of the map is {best:.3f} here. Calling every pixel a lesion gives {2 * share / (1 + share):.3f}."
        in page
    )
    assert page.index("Short training") < page.index("AUROC of the primary score")
    assert "<b>stage2</b> (the primary score): difference of two reconstructions" in page
    for name in ("Image", "Anomaly map", "Map over image"):
        assert f"</i><small>{name}</small></span>" in page
    for config in ({"budget": 1.0}, {"budget": 4.0}, {}):
        assert "Short training" not in shown(config)
    named = {"primary": "b", "scores": {"b": {}, "own": {}}, "table": [{"id": "a", "c": 1.0}]}
    named["words"] = {"a": "not here", "b": "the second", "c": "the third"}
    assert score_meanings(named) == [("b", "the second"), ("c", "the third")]


def test_few_scans_to_learn_from_are_said_on_the_first_screen_as_prepare_says_it(tmp_path):
    prepared = too_few_to_learn([Row(f"{i}", "", "train", 0, ("x",)) for i in range(5)])
    assert prepared.startswith("warning: only 5 normal scans to learn from: so few hardly show ")
    text = write(tmp_path / "r.html", an_evaluation(training_normals=5))
    notice = (
        "<b>Only 5 normal scans to learn from.</b> So few hardly show how much normal scans differ, and a new normal"
    )
    assert notice in text and " one may score high. Remedy: give 20 or more.</p>" in text
    assert text.index(notice) < text.index('<div class="first">')
    for enough in ({"training_normals": 20}, {"training_normals": 0}, {}):
        assert "to learn from" not in write(tmp_path / "r.html", an_evaluation(**enough))


def test_a_score_made_of_its_map_says_how():
    assert case_score_words("top", share=0.01) == "mean of the highest 1 % of the map's values"
    assert case_score_words("mean", share=0.01) == "mean of the map"
    assert case_score_words("part", share=1, above=2.0).endswith("largest connected part of the map above 2")
    words = lambda name: load_system(recipe.parse([f"--config={name}:smoke"], "")[0]).words
    assert words("maemi")["maemi"].startswith("mean of the highest 1 % of the map's values; the map is the squared")
    assert words("ppii")["ppii"] == "mean of the map"


def test_cases_unlike_the_training_are_counted_at_the_top_and_named_at_the_case(tmp_path):
    evaluation = an_evaluation(unlike={"n": 2, "normal": 2, "abnormal": 0, "withheld": 1}) | calibrated([0], [0.5], 99)
    assert "left out for a warning counts as no alarm" in " ".join(p_value_sentences(evaluation))
    said = unlike_sentences(evaluation)
    assert said[0].endswith("cases are unlike the training images (2 normal).")
    assert said[-1].startswith("Such a case has no p-value above 0.05")
    evaluation = an_evaluation(unlike={"n": 12, "normal": 12, "abnormal": 0, "withheld": 0})
    names = [row["id"] for row in evaluation["table"] if row["label"] == 0][:12]
    for row in evaluation["table"]:
        row["warning"] = "darker" * (row["id"] in names)
    text = write(tmp_path / "r.html", evaluation, config={"budget": 0.1})
    (notice,) = re.findall(r'<p class="notice"><b>12 of 40 cases are unlike.*?</p>', text)
    links = dict(re.findall(r'<a href="#([^"]+)">([^<]+)</a>', notice))
    assert len(links) == 10 and set(links.values()) <= set(names) and "and 2 more (column warning of" in notice
    assert all(re.search(rf'id="{place}">.*?{name}', text, re.S) for place, name in links.items())
    assert {place.split("-")[0] for place in links} == {"case", "score"}
    assert text.count('class="notice"') == 2 and 'class="leaks"' not in text  # equally loud
    assert unlike_sentences(an_evaluation(unlike={"n": 0})) == unlike_sentences(an_evaluation()) == []


@pytest.mark.long
def test_the_surprise_at_normal_alarms_is_that_of_drawing_both_sets_alike():
    rng, n, m, rate, seen = np.random.default_rng(0), 19, 40, 0.1, 0
    for _ in range(4000):
        held, new = rng.normal(size=n), rng.normal(size=m)
        p = (1 + (held >= new[:, None]).sum(1)) / (n + 1)
        seen += len(p_value_sentences(calibrated([0] * m, p.tolist(), n, rate))) == 3
    assert 0 < seen / 4000 < 0.01 + 3 * 0.1 / 4000**0.5


def test_the_first_screen_marks_alarms_and_maps_and_scores_are_named_for_what_they_are(tmp_path):
    e = unlabelled() | {
        "map_words": "probability of an anomaly, from 0 to 1",
        "alarms": {"n": 23, "rate": 0.05, "counts": {}},
    }
    for row in e["table"]:
        row["p_value"] = 0.042 if row["id"] == "scan7" else 0.5
    text = write(tmp_path / "r.html", e)
    first = text[text.index('<div class="first">') : text.index('<p class="lead">')]
    said = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", first))
    assert "scan7 7, p-value 0.042 alarm" in said and "scan6 6, p-value 0.5" in said and said.count("alarm") == 2
    assert "one colour scale (probability of an anomaly, from 0 to 1)" in text and text.count("alarm</strong>") == 3


def test_the_smallest_possible_p_value_is_marked_and_a_missing_one_has_its_reason(tmp_path):
    e = unlabelled() | {"alarms": {"n": 11, "rate": 0.05, "counts": {}, "threshold": None}}
    for row, (p, warning) in zip(e["table"][::-1], [(1 / 12, ""), (None, "darker"), (2 / 12, "")], strict=False):
        row |= {"p_value": p, "warning": warning}
    plain = lambda text: re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", text))
    text = write(tmp_path / "r.html", e)
    first = plain(text[text.index('<div class="first">') : text.index('<p class="lead">')])
    assert "scan7 7, p-value 0.083, the smallest possible here scan6 6, no p-value: unlike the training scans" in first
    assert "scan5 5, p-value 0.17 scan4 4 scan3" in first and "alarm : a p-value of 0.05 or less." in first
    assert "score 7, p-value 0.083, the smallest possible here" in plain(text)
    assert "scan7 – 7 0.083, the smallest possible here scan6" in plain(text), "list"
    e["table"][-1]["p_value"], e["alarms"]["n"] = 0.01, 99
    assert "p-value 0.01 alarm , the smallest possible here" in plain(write(tmp_path / "r.html", e))
    del e["alarms"], e["table"][-1]["p_value"], e["table"][-3]["p_value"]
    assert "no p-value" not in write(tmp_path / "r.html", e), "the reason stands below"


def test_how_good_the_training_was_stands_on_the_first_screen_in_one_line(tmp_path):
    look = lambda **figures: [*HISTORY, {"stage": "train", "step": 9, **figures}]
    said = lambda history: write(tmp_path / "r.html", an_evaluation(), history=history).split('<div class="first">')[0]
    dice = (
        "The training: on drawn anomalies the network reaches a Dice of 0.54. A constant map has 0.31. 1 is perfect. "
    )
    usual = "Whole trainings on chest X-rays and colonoscopy reached 0.55 to 0.75. Real anomalies look different."
    assert f"<p>{dice}{usual}</p>" in said(
        [*look(best_dice=0.1, dice=0.1), *look(best_dice=0.54, dice=0.5, dice_of_constant=0.31)]
    )
    shares = "of held-out normals, the network explains this share of the variance of hidden voxels: 0.02"
    assert f"<p>The training: {shares} (0: no better than their mean, 1: perfect).</p>" in said(
        look(explained_variance_0=0.0244)
    )
    two = said(look(explained_variance_0=0.5, explained_variance_1=-2.0))
    assert "of hidden voxels: 0.50 and -2.00 (in the order of the channels) (0: no" in two
    assert "The training:" not in said(HISTORY)


@pytest.mark.long
def test_cases_by_score_have_their_p_values(tmp_path):
    e = an_evaluation()
    e |= calibrated([0, 1, 1], [0.5, 0.024, None], 99)
    text = write(tmp_path / "r.html", e, [], [])
    rows = [re.sub(r"<[^>]*>", " ", row).split() for row in re.findall(r"<tr[^>]*>.*?</tr>", text, re.S)]
    assert "score 1, p-value 0.024" in write(tmp_path / "shown.html", e, [a_case("c1", 1, 1.0)], [])
    assert ["c1", "abnormal", "1", "0.024", "alarm"] in rows and ["c2", "abnormal", "1", "–"] in rows
    assert "p-value</th>" not in write(tmp_path / "plain.html", an_evaluation(), [], [])


def test_unlabelled_data_get_their_scores_and_the_reason(tmp_path):
    parsed = Page(write(tmp_path / "r.html", unlabelled(), history=[]))
    assert "Nothing here shows that this order is better than chance" in parsed.text
    assert "No case of this split has a label" in parsed.text and "no ROC or precision-recall" in parsed.text
    assert parsed.text.index("scan7") < parsed.text.index("scan6") < parsed.text.index("scan0")
    assert "no case is labelled normal" in parsed.text and "AUROC of the primary" not in parsed.text


def test_a_split_of_normals_alone_has_no_curves(tmp_path):
    e = unlabelled()
    e |= {"n_normal": 8, "table": [{**row, "label": 0} for row in e["table"]]}
    text = Page(write(tmp_path / "r.html", e, [], [])).text
    assert "All labelled cases of this split are normal" in text


def test_volumes_that_are_all_abnormal_still_have_their_voxel_figures(tmp_path):
    pixel = {"auroc": 0.91, "ap": 0.3, "prevalence": 0.02, "dice_best": 0.4, "iou": 0.25, "froc": None}
    weak = pixel | {"auroc": 0.62, "ap": 0.05}
    patients = [
        {"patient": "first", "auroc": 0.95, "ap": 0.5, "prevalence": 0.03}
        | {"baselines": {"brightness": {"auroc": 0.61, "ap": 0.1}, "PCA-30 error": {"auroc": 0.72, "ap": 0.1}}},
        {"patient": "none", "auroc": None, "ap": None, "prevalence": 0.0, "baselines": {}},
    ]
    changes = {"n_normal": 0, "n_abnormal": 40, "pixel": pixel, "per_patient": patients, "image": None}
    means = {"auroc": 0.95, "auroc_ci": [0.911, 0.987], "ap": 0.4, "ap_ci": [0.3, 0.5], "prevalence": 0.0123}
    changes["patient_means"] = {"stage2": means | {"n": 1, "skipped": 1}, "subtraction": means | {"n": 7, "skipped": 0}}
    baselines = {"brightness": {"image": None, "pixel": weak}}
    evaluation = an_evaluation(**changes, scores={"stage2": {"image": None, "pixel": pixel}}, baselines=baselines)
    reason, points, baseline = result_sentences(evaluation)
    assert "need both classes" in reason
    assert "91 times in 100." in points and baseline == "The best baseline or rival, “brightness”, reaches 62."
    assert patient_rows(evaluation)[0]["best"] == ("PCA-30 error", 0.72)
    text = write(tmp_path / "r.html", evaluation, cases=[a_case("case0", 1, 2.0)])
    for word in ("0.910", "0.620", "first", "0.950", "PCA-30 error", "0.911–0.987", "subtraction", "0.012"):
        assert word in text
    assert ">none<" not in text


@pytest.mark.long
def test_the_sizes_of_lesions_and_their_overlap_are_shown_where_they_are_known(tmp_path):
    pixel = {"auroc": 0.9, "ap": 0.3, "prevalence": 0.02, "dice_best": 0.4, "iou": 0.25, "aupro": 0.4321, "froc": None}
    image = {"auroc": 0.8123, "auroc_ci": [0.7, 0.9], "ap": 0.5, "ap_ci": [0.4, 0.6], "n_normal": 9, "n_abnormal": 7}
    mask = {"threshold": 1.0, "least": 0, "dice": 0.3, "lesion_recall": 0.5, "false_components": 1.5, "images": 9}
    mask |= {
        "false_alarms": None,
        "lesions": 6,
        "sizes": [{"size": "small", "most": 12.4, "lesions": 2, "recall": 0.25}],
    }
    sizes = [{"size": "medium", "least": 12.6, "most": 99.0} | image]
    text = Page(write(tmp_path / "r.html", an_evaluation(pixel=pixel, sizes=sizes, mask=mask))).text
    for words in ("AUPRO@0.3 0.432", "medium 13 to 99 7 0.812", "of 6; small (up to 12 pixels): 0.250 of 2"):
        assert "".join(words.split()) in "".join(text.split())
    plain = Page(write(tmp_path / "old.html", an_evaluation(pixel=pixel | {"aupro": None}))).text
    assert "AUPRO" not in plain and "size of the lesions" not in plain


def test_a_map_within_its_region_is_black_outside(tmp_path):
    case = a_case("case0", 1, 2.0)
    region = np.zeros(case.map.shape, bool)
    region[: region.shape[0] // 2] = True
    scale = Scale(float(case.map.min()) - 1, float(case.map.max()) + 1, "")
    shown = case_pictures(case._replace(region=region), scale)
    plain, inside = (np.asarray(picture(shown[name]).convert("RGB")) for name in ("map", "inside"))
    half = len(plain) // 2
    np.testing.assert_array_equal(inside[:half], plain[:half])
    assert (inside[half:] == inside[-1, -1]).all() and (plain[half:] != inside[-1, -1]).any()
    assert case_pictures(case, scale)["inside"] is None


def test_a_volume_keeps_its_further_pictures_in_the_slice_that_is_shown():
    case = a_case("v", 1, 1.0, size=(6, 5, 4))
    case.mask[...] = False
    case.mask[2:4, 1:4, 2] = True
    further = {"channel 1": np.arange(120.0).reshape(6, 5, 4, 1), "subtraction": np.arange(120.0).reshape(6, 5, 4)}
    flat = one_slice(case._replace(pictures=further, region=case.mask))
    np.testing.assert_array_equal(flat.pictures["channel 1"], further["channel 1"][:, :, 2])
    np.testing.assert_array_equal(flat.pictures["subtraction"], further["subtraction"][:, :, 2])
    np.testing.assert_array_equal(flat.region, case.mask[:, :, 2])
    assert shown_voxel(case) in [(i, 2, 2) for i in (2, 3)]


def test_a_volume_is_cut_where_its_lesion_is_largest_or_its_map_highest():
    case = a_case("v", 1, 1.0, size=(6, 5, 4))
    case.mask[...] = False
    case.mask[2:4, 1:3, 2] = True
    flat = one_slice(case)
    assert flat.slice == 2 and flat.image.shape == (6, 5, 2) and flat.mask.sum() == 4
    np.testing.assert_array_equal(flat.map, case.map[:, :, 2])
    assert one_slice(flat) == flat
    normal = a_case("n", 0, 1.0, size=(6, 5, 4))
    normal.map[3, 3, 1] = 99
    assert one_slice(normal).slice == 1


def picture(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def decode(uri):
    return np.asarray(picture(uri), int)


@pytest.mark.long
def test_a_volume_can_be_paged_through_from_the_slice_that_is_shown(tmp_path):
    e = an_evaluation()
    cases = cases_of(e, size=(20, 16, 40))
    text = write(tmp_path / "r.html", e, [c._replace(id=EVIL) for c in cases], [])
    page = Page(text)
    radios = page.of("input")
    assert len(radios) == SLICES * len(cases) and not page.open and "<script" not in text
    checked = [r for r in radios if "checked" in r]
    assert {r["name"] for r in checked} == {r["name"] for r in radios} and len(checked) == len(cases)
    shown = sorted(one_slice(case).slice + 1 for case in cases)
    assert sorted(int(re.match(r"Slice (\d+) of 40", r["aria-label"])[1]) for r in checked) == shown
    assert {r["id"] for r in radios} >= {label["for"] for label in page.of("label")}
    marked = [r for r in radios if r.get("class") == "marked"]
    assert marked and all("with lesion" in r["aria-label"] for r in marked)
    assert f"up to {SLICES - 1} more, equally spaced" in page.text
    assert "Slice" not in str(Page(write(tmp_path / "flat.html", e, history=[])).of("input"))


def test_slices_are_equally_spaced_hold_the_one_shown_and_are_what_they_say():
    case = a_case("v", 1, 1.0, (20, 16, 100))
    case.image[...] = np.arange(100)[:, None] / 100  # each slice has the value of its number
    case.mask[...] = False
    case.mask[3:6, 4:7, 10] = True
    slices = one_slice(case, side=10).slices
    assert len(slices.numbers) == SLICES and 10 in slices.numbers and slices.depth == 100
    assert max(np.diff(slices.numbers)) <= 100 / (SLICES - 1) + 4 and slices.numbers[0] == 0
    assert slices.image.shape == slices.map.shape == (SLICES, 10, 8)
    assert [bool(o) for o in slices.outlines] == [n == 10 for n in slices.numbers]
    scale = Scale(0, 1, "")
    (made,) = slides([case._replace(slices=slices)], scale)
    values = [decode(s["image"]).mean() for s in made]
    assert [s["number"] for s in made] == list(slices.numbers) and np.all(np.diff(values) > 0)
    few = one_slice(a_case("v", 0, 1.0, (8, 6, 3)))
    assert few.slices.numbers == (0, 1, 2)


def test_the_overlay_of_a_slice_is_that_slice_s_map():
    case = a_case("v", 0, 1.0, (32, 32, 5))
    case.image[...], case.map[...] = 0, 0
    case.map[:16, :, 3] = 1
    (made,) = slides([one_slice(case)], Scale(0, 1, ""))
    halves = np.array([[decode(s["overlay"])[:12].mean(), decode(s["overlay"])[20:].mean()] for s in made])
    assert halves[3, 0] > 100 and np.delete(halves.ravel(), 6).max() < 10


@pytest.mark.long
def test_slices_of_large_noisy_volumes_keep_the_page_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("jmae.report.pictures.SLIDE_BYTES", 300_000)
    e = an_evaluation()
    write(tmp_path / "r.html", e, cases_of(e, size=(200, 160, 6)), [])
    assert (tmp_path / "r.html").stat().st_size < 3_000_000 + 4 / 3 * 300_000
    volumes = 5000
    assert volumes * 5 * SLICES * slice_side(volumes) ** 2 <= SLICE_BYTES
    assert slice_side(1) == SLIDE_SIDES[0]


def test_a_page_without_cases_history_and_extras_still_stands(tmp_path):
    e = an_evaluation(pixel=None, decision=None, chi2=None, replicates=None, per_patient=None, baselines={}, scores={})
    text = Page(write(tmp_path / "r.html", {**e, "subsets": {}}, [], [])).text
    assert "No baseline was run here" in text and "\nCases\n" not in text and "Training" not in text


def test_volumes_are_shown_where_the_lesion_or_the_map_is_largest():
    volume = a_case("v", 0, 1.0, (20, 16, 9))
    volume.map[3, 4, 6] = 50
    scale = colour_scale([volume])
    assert case_pictures(volume, scale)["slice"] == 6
    mask = np.zeros((20, 16, 9), bool)
    mask[2:5, 3:6, 1], mask[2, 3, 2] = True, True
    pictures = case_pictures(volume._replace(mask=mask), scale)
    assert pictures["slice"] == 1 and (pictures["width"], pictures["height"]) == (16, 20)


def test_the_outline_encloses_the_mask():
    mask = np.zeros((30, 20), bool)
    mask[5:12, 0:4] = True  # it touches the border and must close there
    x, y = (np.array(v, float) for v in zip(*re.findall(r"(-?[\d.]+) (-?[\d.]+)", outline(mask, 256)), strict=True))
    assert abs(x.min() - 0) <= 0.5 and abs(x.max() - 4) <= 0.5
    assert abs(y.min() - 5) <= 0.5 and abs(y.max() - 12) <= 0.5


def test_all_maps_share_the_scale_of_the_normals():
    flat = lambda v: np.full((10, 10), v, np.float32)
    normal = a_case("n", 0, 0.0)._replace(map=np.linspace(0, 1, 1001, dtype=np.float32).reshape(7, 143))
    hot = a_case("a", 1, 1.0, (10, 10))._replace(map=flat(9.0))
    scale = colour_scale([normal, hot])
    assert (scale.low, scale.high) == pytest.approx((0.5, 0.999))
    colours = [
        picture(case_pictures(hot._replace(map=flat(v)), scale)["map"]).convert("RGB").getpixel((5, 5))
        for v in (0.1, 0.5, 0.999, 9.0)
    ]
    assert colours[0] == colours[1] == (0, 0, 4) and colours[2] == colours[3] == (252, 255, 164)  # inferno's ends


def test_a_reconstruction_is_shown_in_the_grey_window_of_its_image():
    case = a_case("a", 1, 1.0)
    scale = colour_scale([case])
    assert case_pictures(case, scale)["reconstruction"] is None
    pictures = case_pictures(case._replace(reconstruction=case.image), scale)
    assert pictures["reconstruction"] == pictures["image"]
    brighter = case_pictures(case._replace(reconstruction=case.image + 0.2), scale)
    image, other = (decode(uri) for uri in (pictures["image"], brighter["reconstruction"]))
    dark, bright = np.percentile(case.image[..., 0], (1, 99))
    inside = (image > 5) & (other < 250)
    assert abs((other - image)[inside] - 255 * 0.2 / (bright - dark)).max() <= 1


def froc_of(sensitivity, curve=((0, 0), (4, 0.5), (12, 0.7))):
    return {"sensitivity": sensitivity, "at": 10.0, "lesions": 20, "images": 40, "curve": [list(p) for p in curve]}


def with_froc(**changes):
    e = an_evaluation(**changes)
    e["pixel"] = e["pixel"] | {"froc": froc_of(0.651)}
    e["scores"]["stage1"]["pixel"] = {"froc": froc_of(0.432)}
    e["baselines"]["mean intensity"]["pixel"] = {"froc": froc_of(0.123)}
    e["subsets"]["first hospital"]["pixel"] = {"froc": froc_of(0.777)}
    return e


@pytest.mark.long
def test_sensitivity_at_ten_false_positives_stands_for_every_score_and_the_curve_for_the_primary(tmp_path):
    parsed = Page(write(tmp_path / "r.html", with_froc()))
    words = " ".join(parsed.text.split())
    assert not parsed.open and re.search("sensitivity at up to 10 false positives per image ?0.651", words)
    assert all(value in words for value in ("0.432", "0.123", "0.777", "20 lesions", "over 40 images"))
    curves = [a["aria-label"] for a in parsed.of("svg") if a.get("aria-label", "").startswith("FROC")]
    assert curves == ["FROC curve; the sensitivity at 10 false positives per image is 0.651."]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", (tmp_path / "r.html").read_text(), re.S)
    heads, *lines = [[re.sub(r"<.*", "", c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", r)] for r in rows[:5]]
    assert [line[-1] for line in lines] == ["0.651", "0.432", "0.123", "–"] and heads[-1] == "FROC "


def test_froc_without_a_sensitivity_says_so_and_without_normals_has_its_curve(tmp_path):
    e = with_froc()
    e["pixel"]["froc"] = froc_of(float("nan"), [])
    parsed = Page(write(tmp_path / "r.html", e, [], []))
    assert "too many pixels" in parsed.text and "FROC curve" not in str(parsed.of("svg"))
    e = with_froc(n_normal=0, n_abnormal=40, image=None)
    assert "FROC curve" in str(Page(write(tmp_path / "r.html", e, [], [])).of("svg"))


def test_no_froc_is_said_as_before(page):
    words = Page(page).text
    assert re.search(r"FROC\s*–\s*not computed", words) and "false positives per image" not in words


@pytest.mark.parametrize("curve", [((0, 0),), ((0, 0), (0, 1)), ((0, 0), (3, 0.2), (2.5, 0.4)), ((0, 0), (10, 0.4))])
def test_short_froc_curves_are_drawn(curve):
    ElementTree.fromstring(froc_chart(froc_of(0.4, curve)))


@pytest.mark.long
def test_spreads_share_one_grey_scale_and_stand_with_their_words(tmp_path):
    flat = lambda v: np.full((10, 10), v, np.float32)
    case = a_case("a", 1, 1.0, (10, 10))
    spread = np.linspace(2, 3, 1001, dtype=np.float32).reshape(7, 143)
    scale, spreads = colour_scale([case]), spread_scale([case, case._replace(confidence=spread)])
    assert (spreads.low, spreads.high) == pytest.approx((2, 2.999))
    assert spread_scale([case]) is None and case_pictures(case, scale, 256, spreads)["spread"] is None
    shown = [case_pictures(case._replace(confidence=flat(v)), scale, 256, spreads) for v in (1, 2.4995, 9)]
    assert [picture(p["spread"]).getpixel((5, 5)) for p in shown] == [0, 128, 255]

    e = an_evaluation()
    cases = [c._replace(confidence=c.map / 2) for c in cases_of(e)]
    cases[0] = cases[0]._replace(confidence=None)
    parsed = Page(write(tmp_path / "r.html", e, cases, []))
    assert sum("Spread of the samples" in a["alt"] for a in parsed.of("img")) == len(cases) - 1
    assert "percentile of the spreads shown here" in parsed.text
    assert "spread of the samples" not in Page(write(tmp_path / "r.html", e, history=[])).text


def test_a_spread_is_cut_where_its_volume_is():
    case = a_case("v", 0, 1.0, (6, 5, 4))
    case.map[3, 3, 1] = 99
    flat = one_slice(case._replace(confidence=case.map + 1))
    np.testing.assert_array_equal(flat.confidence, case.map[:, :, 1] + 1)
    assert one_slice(case).confidence is None


def test_pages_with_spreads_stay_small(tmp_path):
    e = an_evaluation()
    cases = [c._replace(confidence=c.map) for c in cases_of(e, size=(400, 300))]
    write(tmp_path / "r.html", e, cases, [])
    assert (tmp_path / "r.html").stat().st_size < 3_000_000


def test_constant_images_and_maps_are_drawn():
    case = Case("c", 0, 0.0, np.ones((8, 8, 1)), np.zeros((8, 8)), np.zeros((8, 8), bool))
    assert case_pictures(case, colour_scale([case]))["outline"] == ""


def test_pages_stay_small_with_large_noisy_images(tmp_path):
    e = an_evaluation()
    write(tmp_path / "r.html", e, cases_of(e, size=(400, 300)), [])
    assert (tmp_path / "r.html").stat().st_size < 3_000_000


def test_of_a_step_logged_twice_the_later_counts_and_gaps_are_left_out():
    lines = [
        {"stage": "b", "step": 1, "loss": 5.0},
        {"stage": "b", "step": 2, "loss": 4.0},
        {"stage": "b", "step": 2, "loss": 3.0},
        {"stage": "b", "step": 3, "loss": None},
        {"stage": "a", "step": 0, "loss": float("nan")},
        {"stage": "a", "step": 7, "auroc": 1.0},
    ]
    stages = stage_losses(lines)
    assert list(stages) == ["b"] and [v.tolist() for v in stages["b"]] == [[1, 2], [5, 3]]


def test_a_failed_write_leaves_the_old_page_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "r.html"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(path, an_evaluation(), [], [])
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_ids_with_undecodable_bytes_are_written(tmp_path):
    e = unlabelled()
    e["table"][0]["id"] = b"scan\xff".decode(errors="surrogateescape")
    assert r"scan\udcff" in write(tmp_path / "r.html", e, [], [])


def test_the_same_input_gives_the_same_page(tmp_path, page):
    assert write(tmp_path / "again.html", an_evaluation()) == page
