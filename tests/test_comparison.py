"""Several runs on one page: read from their folders, paired by case, refused where they do not belong together."""

import csv
import html
import json
import re
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from benchmarks import packs
from jmae import metrics
from jmae.errors import InputError, exit_code
from jmae.report import compare
from jmae.report.__main__ import main

IDS = [f"case{i}" for i in range(24)]
LABELS = np.arange(24) % 2


def a_run(folder: Path, noise: float, *, ids=IDS, labels=LABELS, patients=None, **recipe) -> Path:
    """A run folder with an evaluation of `ids`."""
    scores = labels + np.random.default_rng(int(10 * noise)).normal(0, noise, len(ids))
    image = metrics.image_metrics(labels, scores, [""] * len(ids), draws=50)
    evaluation = {
        "system": "memmc_mae",
        "split": "test",
        "primary": "ms_ssim",
        "image": image,
        "pixel": None,
        "subsets": {"central 80%": {"n": len(ids), "image": image, "pixel": None}},
        "digests": {"recipe": f"recipe-{recipe}", "rows trained on": "rows", "images evaluated": "seen"},
        "baselines": {
            "5-NN": {"image": image | {"auroc": 0.61}, "pixel": None},
            "dark": {"image": None, "pixel": None},
        },
        "best_rival": {"image": {"name": "5-NN", "of": 1, "auroc": 0.125, "auroc_ci": [-0.011, 0.251]}, "pixel": None},
        "explained": {"the network": 0.4, "blur": 0.1},
        "seconds_per_case": 0.25,
    }
    (folder / "evaluation").mkdir(parents=True)
    (folder / "evaluation" / "metrics.json").write_text(json.dumps(metrics.json_ready(evaluation)))
    with open(folder / "evaluation" / "scores.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "label", "score", "p_value"])
        writer.writerows([*zip(ids, labels, scores, [""] * len(ids), strict=True), ["unknown", "", 0.5, ""]])
    with open(folder / "evaluation" / "cases.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [["id", "patient", "image"], *([name, (patients or {}).get(name, ""), "d" + name] for name in ids)]
        )
    config = {"system": "memmc_mae", "data": {"manifest": "gone.csv"}, "model": {"memory": 40} | recipe}
    (folder / "evaluation" / "config.json").write_text(json.dumps(config))
    (folder / "environment.json").write_text(json.dumps({"versions": {"jax": f"0.{noise}"}}))
    return folder


@pytest.mark.long
def test_a_difference_is_that_of_the_metrics_and_its_interval_that_of_common_draws():
    rng = np.random.default_rng(0)
    labels, patients = np.arange(60) % 2, rng.integers(0, 25, 60)
    a, b = labels + rng.normal(0, 1, 60), labels + rng.normal(0, 1.5, 60)
    found, (low, high) = metrics.paired_difference(metrics.auroc, labels, a, b, patients, draws=300, seed=4)
    assert found == pytest.approx(roc_auc_score(labels, a) - roc_auc_score(labels, b))
    draws = np.random.default_rng(4)
    groups = [np.flatnonzero(patients == p) for p in dict.fromkeys(patients)]
    each = []
    for _ in range(300):
        cases = np.concatenate([groups[i] for i in draws.integers(len(groups), size=len(groups))])
        if 0 < labels[cases].mean() < 1:
            each.append(roc_auc_score(labels[cases], a[cases]) - roc_auc_score(labels[cases], b[cases]))
    assert (low, high) == pytest.approx(tuple(np.percentile(each, [2.5, 97.5])))
    assert metrics.paired_difference(metrics.auroc, labels, a, a, patients, draws=50) == (0, (0, 0))


def test_scores_of_several_seeds_have_the_mean_of_their_differences():
    rng = np.random.default_rng(1)
    labels = np.arange(30) % 2
    a, b, c = (labels + rng.normal(0, 1, 30) for _ in range(3))
    one = partial(metrics.paired_difference, metrics.auroc, labels, patients=range(30), draws=100)
    (first, _), (second, _) = one(a, c), one(b, c)
    assert one(np.stack([a, b]), c)[0] == pytest.approx((first + second) / 2)
    same, (low, high) = one(np.stack([a, a]), np.stack([c, c, c]))
    assert same == pytest.approx(first) and (low, high) == pytest.approx(one(a, c)[1])


def test_the_page_shows_the_runs_their_differences_and_what_differs(tmp_path, capfd):
    runs = [a_run(tmp_path / "good", 0.3), a_run(tmp_path / "<b>bad", 2.0, memory=0)]
    assert exit_code(main, [*map(str, runs), f"--out={tmp_path / 'page.html'}", "--draws", "100"]) == 0
    page, said = (tmp_path / "page.html").read_text(), capfd.readouterr().err
    scores = [compare.scores_of(compare.read_run(run), IDS) for run in runs]
    expected = roc_auc_score(LABELS, scores[0]) - roc_auc_score(LABELS, scores[1])
    assert f"{expected:+.3f}" in page and f"{expected:+.3f}" in said
    assert "<script" not in page and "&lt;b&gt;bad" in page and "<b>bad" not in page
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    assert "24 cases in common: 12 normal, 12 abnormal" in words
    assert "draws of cases (the patients are not known here)" in words
    assert re.search("model.memory 40 0", words) and "versions.jax 0.0.3 0.2.0" in words
    assert "0.610 5-NN +0.125 -0.011–0.251" in words
    assert "Not better than the best baseline or rival: good, <b>bad." in html.unescape(words)
    assert f"its AUROC differs by {expected:+.3f} from the next run, <b>bad (95 % interval" in html.unescape(words)
    environments = [compare.run_digests(compare.read_run(run))["environment"] for run in runs]
    assert "good recipe-{} rows seen" in words and all(found in words for found in environments)
    assert environments[0] != environments[1]
    assert page.index("good") < page.index("&lt;b&gt;bad")  # the best first


def test_the_first_sentences_say_which_is_better_and_which_does_not_beat_a_baseline():
    more = {"difference": None}  # a run of an earlier version
    line = lambda name, auroc: (
        {"name": name, "system": "s", "image": {"auroc": auroc}, "baseline": ("5-NN", 0.8)} | more
    )
    figures = [line("a", 0.9), line("b", 0.8), line("c", None)]
    settled = compare.Pair("b", "a", -0.1, (-0.2, -0.05), 0, (0, 0))
    words = " ".join(compare.comparison_sentences(figures, [settled]))
    assert "a (s) has the highest AUROC, 0.900. " in words and "Not better than the best baseline or rival: b." in words
    assert "differs by +0.100 from the next run, b (95 % interval +0.050 to +0.200)." in words
    open_ = settled._replace(auroc_ci=(-0.2, 0.05))
    assert "-0.050 to +0.200), which does not show which" in " ".join(compare.comparison_sentences(figures, [open_]))
    contrary = compare.Pair("a", "b", -0.05, (-0.09, -0.01), 0, (0, 0))  # on the cases in common alone
    said = "differs by -0.050 from the next run, b (95 % interval -0.090 to -0.010): on these cases b is better."
    assert said in " ".join(compare.comparison_sentences(figures, [contrary]))
    bare = " ".join(compare.comparison_sentences(figures, [settled._replace(auroc_ci=(np.nan, np.nan))]))
    assert "differs by +0.100 from the next run, b." in bare
    assert "the next run, b, are of one class and show no difference." in " ".join(
        compare.comparison_sentences(figures, [])
    )
    assert compare.comparison_sentences([line("c", None)], []) == ["No AUROC: the cases in common are of one class."]


def test_cases_in_common_of_one_class_tell_no_difference(tmp_path):
    normals = [i for i, label in enumerate(LABELS) if not label]
    more = [i for i, label in enumerate(LABELS) if label]
    ids = [IDS[i] for i in normals] + [f"own{i}" for i in more]
    runs = [a_run(tmp_path / "a", 0.5), a_run(tmp_path / "b", 1.0, ids=ids, labels=LABELS[normals + more])]
    said = compare.write_comparison(tmp_path / "page.html", runs, draws=20)
    page = (tmp_path / "page.html").read_text()
    assert "nan" not in said + page and "are of one class and show no difference" in page


def test_patients_are_resampled_where_they_are_known(tmp_path):
    patients = {name: f"p{i // 4}" for i, name in enumerate(IDS)}
    known = [compare.read_run(a_run(tmp_path / name, 1.0 + len(name), patients=patients)) for name in ("a", "bb")]
    blank = [run._replace(patients=dict.fromkeys(IDS, "")) for run in known]
    (pair,), (other,) = (compare.paired_differences(runs, IDS, draws=200) for runs in (known, blank))
    assert pair.auroc == other.auroc and pair.auroc_ci != other.auroc_ci


def test_runs_of_one_name_are_told_apart_and_cases_in_common_are_compared(tmp_path):
    runs = [a_run(tmp_path / "x" / "run", 1.0), a_run(tmp_path / "y" / "run", 1.0, ids=IDS[:20], labels=LABELS[:20])]
    said = compare.write_comparison(tmp_path / "page.html", [runs[0], runs[1] / "evaluation"], draws=20)
    assert "run - evaluation" in said
    words = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", (tmp_path / "page.html").read_text()))
    assert "20 cases in common" in words and "4 more cases" in words
    compare.write_comparison(tmp_path / "page.html", [runs[0], a_run(tmp_path / "z" / "run", 2.0)], draws=20)
    assert "x/run" in (tmp_path / "page.html").read_text() and "z/run" in (tmp_path / "page.html").read_text()


def test_runs_that_do_not_belong_together_are_refused_in_one_line(tmp_path, capfd):
    good = a_run(tmp_path / "good", 0.5)
    other = a_run(tmp_path / "other", 0.5, ids=[f"other{i}" for i in range(24)])
    contrary = a_run(tmp_path / "contrary", 0.5, labels=1 - LABELS)
    swapped = a_run(tmp_path / "swapped", 0.5)
    cases = swapped / "evaluation" / "cases.csv"
    cases.write_text(cases.read_text().replace("dcase3", "another"))
    (tmp_path / "empty").mkdir()
    torn = a_run(tmp_path / "torn", 0.5)
    (torn / "evaluation" / "metrics.json").write_text('{"image": ')
    out = f"--out={tmp_path / 'page.html'}"
    for folders, message in {
        (good, other): "share no labelled case",
        (good, contrary): "have different labels for 24 of their common cases, such as case0",
        (good, tmp_path / "empty"): "empty: no complete evaluation",
        (good, swapped): "have different images for 1 of their common cases, such as case3",
        (good, good): "one run is named twice",
        (torn,): "torn: no complete evaluation",
        (): "name 1 to 12 run folders and the page",
    }.items():
        assert exit_code(main, [*map(str, folders), out]) == 2
        said = capfd.readouterr().err
        assert message in said and said.count("\n") == 1, said
    assert exit_code(main, [str(good), "--out=page.txt"]) == 2
    assert exit_code(main, [str(good), out, "--draws=0"]) == 2
    assert not (tmp_path / "page.html").exists()


@pytest.fixture
def pack(tmp_path, monkeypatch):
    """Runs of a pack, its test rows, and a folder for what is kept."""
    for row, seeds in (("amae.packs.cxr_peds", 2), ("rivals.packs.cxr_peds.ae", 1), ("amae.packs.cxr_nih", 1)):
        for seed in range(seeds):
            a_run(tmp_path / row / f"seed-{seed}", 0.5 + seed)
    (tmp_path / "ppii.packs.cxr_peds" / "seed-0").mkdir(parents=True)  # not finished
    monkeypatch.setattr(packs, "KEPT", tmp_path / "kept")
    rows = [SimpleNamespace(id=name, label=int(label), patient="") for name, label in zip(IDS, LABELS, strict=True)]
    return SimpleNamespace(folder=tmp_path, rows=rows, cases=packs.cases_digest(rows))


def kept_runs(pack):
    """The runs of `pack` as they come back from the kept file."""
    found = {
        (method, seed): {"method": method, "seed": seed} | packs.entry_of(folder, pack.rows)
        for method, seed, folder in packs.finished(pack.folder, "cxr_peds")
    }
    packs.keep("cxr_peds", found)
    assert packs.read_kept("cxr_peds") == found and packs.read_kept("cxr_nih") == {}
    return packs.methods(packs.read_kept("cxr_peds").values(), pack.cases)


def test_methods_of_a_pack_stand_beside_the_best_closed_form_of_normals_alone(pack):
    """A method's figure is the mean over its seeds. A closed form that learns from unlabelled images is no rival."""
    runs = kept_runs(pack)
    assert {name: len(each) for name, each in runs.items()} == {"amae": 2, "rivals.ae": 1}
    rng = np.random.default_rng(0)
    forms = {"5-NN": LABELS + rng.normal(0, 1, 24), "brightness": rng.normal(0, 1, 24), packs.MIXED: LABELS + 0.0}
    found = packs.compared(runs, forms, pack.rows, {"5-NN": LABELS + 0.0})
    stored = [compare.read_run(pack.folder / "amae.packs.cxr_peds" / f"seed-{seed}") for seed in (0, 1)]
    each = [roc_auc_score(LABELS, compare.scores_of(run, IDS)) for run in stored]
    known = roc_auc_score(LABELS, forms["5-NN"])
    one = found["methods"]["amae"]
    assert found["best_closed_form"] == "5-NN" and (one["seeds"], one["trained"]) == (2, True)
    assert one["auroc"] == pytest.approx(np.mean(each)) and one["difference"][0] == pytest.approx(np.mean(each) - known)
    assert one["auroc_ci"][0] <= one["auroc"] <= one["auroc_ci"][1]
    assert found["methods"]["5-NN"]["difference"] == (0, 0, 0) == found["methods"]["rivals.ae"]["to_trained"]
    assert one["to_trained"][0] == pytest.approx(one["auroc"] - found["methods"]["rivals.ae"]["auroc"])
    assert found["methods"]["5-NN"]["central"] == (1.0, 1) and found["methods"]["brightness"]["central"] is None
    assert "amae, as published" not in found["methods"] and one["explained"] == pytest.approx(0.4)
    reversed_ = [runs["amae"][0] | {"published": [-score for score in runs["amae"][0]["scores"]]}]
    other = packs.compared({"amae": reversed_}, forms, pack.rows)["methods"]["amae, as published"]
    assert other["auroc"] == pytest.approx(1 - each[0]) and other["seeds"] == 1 and other["to_trained"] is None
    assert one["to_mixed"][0] == pytest.approx(np.mean(each) - 1) and one["to_mixed"][1] <= one["to_mixed"][0]
    assert next(packs.rows_of(found))[0] == packs.MIXED


def test_the_best_closed_form_under_a_methods_own_score_is_the_best_mean_over_its_seeds(pack):
    file = pack.folder / "amae.packs.cxr_peds" / "seed-0" / "evaluation" / "metrics.json"
    figures = {"5 nearest normals: ms_ssim": 0.7, "blur: ms_ssim": 0.6, "blur: other": 0.9}
    rivals = {name: {"image": {"auroc": auroc}} for name, auroc in figures.items()}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"baselines": rivals | {"5-NN": {"image": None}}}))
    first = packs.entry_of(file.parents[1], pack.rows)
    assert first["rivals"] == {"5 nearest normals": 0.7, "blur": 0.6}
    assert packs.same_score([first]) == ("5 nearest normals", 0.7) and packs.same_score([]) is None
    assert packs.same_score([first, first | {"rivals": {"blur": 0.9, "5 nearest normals": 0.7}}])[0] == "blur"


def test_kept_runs_of_other_cases_or_another_recipe_are_refused(pack):
    runs = kept_runs(pack)
    one = runs["amae"][1]
    with pytest.raises(InputError, match="amae, seed 1 has other test cases"):
        packs.methods([one | {"cases": "others"}], pack.cases)
    with pytest.raises(InputError, match="amae, seed 1 has another recipe than seed 0"):
        packs.methods([runs["amae"][0], one | {"settings": "others"}], pack.cases)
    with pytest.raises(InputError, match="no score of 1 cases, such as case0"):
        packs.entry_of(
            pack.folder / "amae.packs.cxr_peds" / "seed-0",
            [SimpleNamespace(id="case0", label=1, patient=""), *pack.rows[1:]],
        )
    config = {"seed": 1, "data": {"manifest": "a.csv", "size": 8}, "steps": 5}
    same = config | {"seed": 2, "data": {"manifest": "b.csv", "size": 8}}
    assert packs.settings(config) == packs.settings(same) != packs.settings(config | {"steps": 6})


def test_further_evaluations_of_a_run_are_methods_of_their_own(pack):
    run = pack.folder / "amae.packs.cxr_peds" / "seed-1"
    shutil.copytree(run / "evaluation", run / "ways" / "tokens")
    assert ("amae, tokens", 1, run / "ways" / "tokens") in list(packs.finished(pack.folder, "cxr_peds"))
    runs = kept_runs(pack)
    assert runs["amae, tokens"][0]["scores"] == runs["amae"][1]["scores"] and len(runs["amae"]) == 2


def test_a_subset_has_the_scores_of_its_cases_alone(pack):
    runs = kept_runs(pack)
    marked = [SimpleNamespace(**vars(row), extra={"matched": "01"[i % 3 > 0]}) for i, row in enumerate(pack.rows)]
    some, rows = packs.of_subset(runs, marked, "matched")
    assert [row.id for row in rows] == [IDS[i] for i in range(24) if i % 3]
    inside = [i for i in range(24) if i % 3]
    for name, each in runs.items():
        for whole, part in zip(each, some[name], strict=True):
            assert part["scores"] == [whole["scores"][i] for i in inside] and part["published"] is None
    for column in ("nothing", "id"):
        with pytest.raises(InputError, match=f"--subset {column}: the manifest marks no test case"):
            packs.of_subset(runs, marked, column)


def test_runs_of_a_part_of_the_steps_are_left_out(pack):
    run = pack.folder / "amae.packs.cxr_peds" / "seed-0"
    config = json.loads((run / "evaluation" / "config.json").read_text())
    for budget, kept in ((1.0, True), (0.1, False)):
        (run / "evaluation" / "config.json").write_text(json.dumps(config | {"budget": budget}))
        assert bool(packs.entry_of(run, pack.rows)) == kept


def test_figures_of_the_central_crop_stand_beside_each_method():
    """A mean over the seeds that have one; a figure of another score than the primary one is the published score's."""
    own = {"primary": "own"}
    runs = [own | {"central": {"paper": 0.5, "own": 0.8}}, own | {"central": {"own": 0.9, "paper": None}}, own]
    assert packs.of_crop(runs, published=False) == (pytest.approx(0.85), 2)
    assert packs.of_crop(runs, published=True) == (0.5, 1)
    assert packs.of_crop([own | {"central": {"own": 0.8}}], published=True) is None
    assert packs.of_crop([own], published=False) is None
