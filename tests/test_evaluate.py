"""What an evaluation writes: against scikit-learn on the written files, for images and volumes, for every kind of
split. Most use a system of one line instead of a trained one: the evaluator knows only its functions."""

import base64
import csv
import io
import json
import os
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image as PIL
from sklearn.metrics import average_precision_score, roc_auc_score

from jmae import evaluate as ev
from jmae import recipe
from jmae.data.cases import load_cases, load_rows
from jmae.data.files import read_image, read_mask
from jmae.data.loader import Images
from jmae.data.manifest import Row
from jmae.data.transforms import central, resize
from jmae.errors import InputError, exit_code
from jmae.fitting import restore_results
from jmae.inference import Scorer, score_rows
from jmae.masking import case_keys
from jmae.run_folder import write_text
from jmae.seen import SeenRows, write_seen
from jmae.system import System, load_system

KEYS = """
system split n n_normal n_abnormal primary image pixel scores subsets per_patient patient_means best_rival baselines
decision chi2 alarms digests mask explained sizes unlike
""".split()
IMAGE = {"auroc", "auroc_ci", "ap", "ap_ci", "n_normal", "n_abnormal"}
PIXEL = {"auroc", "ap", "prevalence", "dice_best", "iou", "aupro", "froc"}
CENTRAL = "central 80%"


def score(results, batch, key, *, chunk=None):
    """Brightness with noise from the case's key as a map; the brightest value as a score without one."""
    image = batch["image"]
    noise = jax.vmap(lambda k: jax.random.uniform(k, image.shape[1:-1]))(case_keys(key, batch["case"]))
    maps = jnp.mean(image, -1) + 0.1 * noise
    axes = tuple(range(1, maps.ndim))
    return {"maps": {"bright": maps}, "scores": {"bright": jnp.mean(maps, axes), "peak": jnp.max(image, (*axes, -1))}}


SYSTEM = System(name="toy", stages=(), score=score, uses=(), primary="bright", masks=4)


def config(manifest: Path, size: tuple[int, ...], channels: int, **changes) -> ConfigDict:
    c, _ = recipe.parse(["--config=configs/amae.py:smoke"], "")
    c.data.manifest, c.data.size, c.data.channels = str(manifest), size, channels
    c.evaluation.subsets, c.evaluation.batch = ("matched",), 5
    c.update_from_flattened_dict(changes)
    return c


def test_cases_of_another_manifest_that_the_run_has_seen_are_refused_or_marked(tools, tmp_path, monkeypatch, capfd):
    counts = {("train", 0): 2, ("val", 0): 2, ("test", 0): 3, ("test", 1): 3}
    own = config(tools.write_set(tmp_path / "own", counts), (16, 16), 1, **{"data.allow_leaks": True})
    workdir = tmp_path / "run"
    write_text(workdir / "config.json", recipe.to_json(own))
    monkeypatch.setattr(ev, "load_system", lambda config: SYSTEM)
    other = tools.write_set(tmp_path / "other", counts, seed=1)
    arguments = [f"--workdir={workdir}", f"--manifest={other}", f"--out={tmp_path / 'out'}"]
    assert exit_code(ev.main, ["--config.data.allow_leaks=True", *arguments[::2]]) == 2
    assert "goes with --manifest" in capfd.readouterr().err
    assert exit_code(ev.main, arguments) == 0  # there is no seen.csv yet
    unchecked = json.loads((tmp_path / "out" / "metrics.json").read_text())["unchecked"]
    assert unchecked == f"{workdir} does not say what it was trained on: not known whether cases of {other} were"
    assert "Perhaps not an independent test.</b> " + unchecked in (tmp_path / "out" / "report.html").read_text()
    shutil.rmtree(tmp_path / "out")
    rows = load_rows(own, str)
    write_seen(workdir, [row for row in rows if row.split in ("train", "val")])
    lines = (other.parent / "manifest.csv").read_text().replace("p-", "q-")
    other.write_text(lines)
    assert exit_code(ev.main, arguments) == 0  # equal ids of other images and patients
    assert "unchecked" not in json.loads((tmp_path / "out" / "metrics.json").read_text())
    shutil.rmtree(tmp_path / "out")

    other.write_text(lines.replace("train-0-0.png", "../own/train-0-0.png"))  # in train again
    assert exit_code(ev.main, arguments) == 0
    shutil.rmtree(tmp_path / "out")
    for change, problem in (
        (lines.replace("q-test-0-0", "p-train-0-0"), "the patient of test-0-0 is that of train-0-0, train of the run"),
        (
            lines.replace("test-1-1.png", "../own/val-0-0.png"),
            "the image of test-1-1 is that of val-0-0, val of the run",
        ),
        (lines.replace("val-0-1.png", "../own/train-0-1.png"), "the image of val-0-1 is that of train-0-1, train of"),
    ):
        other.write_text(change)
        capfd.readouterr()
        assert exit_code(ev.main, arguments) == 2
        said = capfd.readouterr().err.splitlines()[-1]
        assert problem in said and "--config.data.allow_leaks=True marks the report" in said
        split = problem.split()[3].split("-")[0]  # of the case
        assert f": delete such rows of {split} (those of train may stay), or --config" in said
        assert not (tmp_path / "out").exists()
    other.write_text(lines.replace("test-1-1.png", "../own/train-0-0.png"))
    assert exit_code(ev.main, [*arguments, "--config.data.allow_leaks=True"]) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["leaks"] == ["the image of test-1-1 is that of train-0-0, train of the run"]
    assert "NOT AN INDEPENDENT TEST" in capfd.readouterr().err


def test_a_row_that_moved_to_test_after_the_training_is_refused(tools, tmp_path, monkeypatch, capfd):
    manifest = tools.write_set(tmp_path / "own", {("train", 0): 4, ("val", 0): 2, ("test", 0): 2})
    own, workdir = config(manifest, (16, 16), 1), tmp_path / "run"
    write_text(workdir / "config.json", recipe.to_json(own))
    write_seen(workdir, [row for row in load_rows(own, str) if row.split in ("train", "val")])
    monkeypatch.setattr(ev, "load_system", lambda config: SYSTEM)
    assert exit_code(ev.main, [f"--workdir={workdir}"]) == 0
    lines = manifest.read_text().splitlines()
    moved = [line.replace(",train,", ",test,") if "p-train-0-0" in line else line for line in lines]
    manifest.write_text("\n".join(moved))
    shutil.rmtree(workdir / "evaluation")
    assert exit_code(ev.main, [f"--workdir={workdir}"]) == 2
    assert "the patient of train-0-0 is that of train-0-0, train of the run" in capfd.readouterr().err
    assert not (workdir / "evaluation").exists()


def test_a_row_that_the_run_has_seen_in_two_splits_counts_as_trained_on():
    row = lambda name, split: Row(name, "p", split, 0, ())
    seen = SeenRows([row("a", "val"), row("b", "train")])
    assert seen.leak(row("c", "val"), "test") == "the patient of c is that of b, train of the run"
    assert not SeenRows([row("a", "val")]).leak(row("c", "val"), "test")


def test_cases_that_were_trained_on_have_no_p_value_with_other_settings_either(tools, tmp_path, monkeypatch):
    own = config(tools.write_set(tmp_path / "own", {("train", 0): 2, ("val", 0): 2, ("test", 0): 2}), (16, 16), 1)
    workdir = tmp_path / "run"
    write_text(workdir / "config.json", recipe.to_json(own))
    monkeypatch.setattr(ev, "load_system", lambda config: SYSTEM)
    assert exit_code(ev.main, [f"--workdir={workdir}"]) == 0
    for split, any_ in (("test", True), ("train", False)):
        changes = [f"--split={split}", "--config.evaluation.draws=3", f"--out={tmp_path / split}"]
        assert exit_code(ev.main, [f"--workdir={workdir}", *changes]) == 0
        assert {line["p_value"] != "" for line in table_of(tmp_path / split)} == {any_}


@pytest.fixture(scope="module")
def evaluated(small_set, tmp_path_factory):
    """(rows of the split, folder, what `evaluate` returned) of a set of images. (Volumes: test_maemi.)"""
    folder = tmp_path_factory.mktemp("evaluated")
    c = config(small_set, (24, 20), 1)
    rows = load_rows(c, lambda line: None)
    result = ev.evaluate(c, SYSTEM, rows, folder, split="test", out=folder / "out")
    return [row for row in rows if row.split == "test"], folder / "out", result


def table_of(folder: Path, name: str = "scores.csv") -> list[dict]:
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def written_map(folder: Path, name: str) -> Path:
    (file,) = (folder / "maps").glob(f"{name}_anomaly.*")
    return file


# --- the files --------------------------------------------------------------------------------------------------------


def test_a_trained_and_evaluated_run_has_both_cards(finished):
    card = (finished / "MODEL_CARD.md").read_text()
    metrics = json.loads((finished / "evaluation" / "metrics.json").read_text())
    assert f"{metrics['image']['auroc']:.3f}" in card and metrics["digests"]["rows trained on"] in card
    assert "pretrain 20, proxy 10" in card and metrics["digests"]["recipe"] in card
    assert "| train | normal | 16 |" in (finished / "DATA_CARD.md").read_text()


def test_metrics_json_has_the_keys_of_the_design(finished):
    metrics = json.loads((finished / "evaluation" / "metrics.json").read_text())
    assert set(KEYS) | {
        "maskless",
        "notes",
        "seconds",
        "seconds_per_case",
        "resampled",
        "words",
        "map_words",
        "masked",
        "doubts",
        "training_normals",
    } == set(metrics)
    assert [metrics[k] for k in KEYS[:6]] == ["amae", "test", 12, 6, 6, load_system(recipe.read(finished)).primary]
    assert set(metrics["image"]) == IMAGE and set(metrics["pixel"]) == PIXEL
    assert set(metrics["scores"]) >= {"stage2", "stage1", "mae"}
    assert metrics["scores"][metrics["primary"]] == {"image": metrics["image"], "pixel": metrics["pixel"]}
    assert metrics["scores"]["stage1"]["pixel"] is None
    assert set(metrics["baselines"]) >= {"PCA-30 error", "Mahalanobis", "5-NN"}
    for name in ("mean intensity", "standard deviation"):
        assert len({name, f"low {name}"} & set(metrics["baselines"])) == 1
    for part in [*metrics["scores"].values(), *metrics["baselines"].values()]:
        assert set(part) == {"image", "pixel"}
    for name in ("matched", CENTRAL):
        part = metrics["subsets"][name]
        assert set(part) == {"n", "image", "pixel", "scores", "baselines"}
        assert set(part["image"]) == IMAGE and set(part["scores"]) == set(metrics["scores"]) - (
            {"stage1"} if name == CENTRAL else set()
        )
    assert set(metrics["decision"]) == {
        "accuracy",
        "f1",
        "precision",
        "sensitivity",
        "specificity",
        "threshold",
        "chosen_by",
    }
    assert set(metrics["chi2"]) == {"raw", "normalised"}
    assert 0 < metrics["seconds_per_case"] < metrics["seconds"]


def test_scores_csv_has_a_line_a_case_and_a_column_a_further_score(finished):
    table = table_of(finished / "evaluation")
    assert list(table[0])[:4] == ["id", "label", "score", "p_value"]
    system = load_system(recipe.read(finished))
    assert set(list(table[0])[4:]) >= {"mae", "stage1"} and system.primary not in table[0]
    assert [row["id"] for row in table] == [f"test-{label}-{i}" for label in (0, 1) for i in range(6)]
    assert all(float(row["p_value"]) in (0.25, 0.5, 0.75, 1) for row in table)  # of three held-out normals
    assert all(np.isfinite(float(row["score"])) for row in table)


def test_figures_follow_from_the_written_files(evaluated):
    rows, folder, result = evaluated
    table = table_of(folder)
    labels = np.array([row.label for row in rows])
    assert [int(line["label"]) for line in table] == labels.tolist()
    scores = {name: np.array([float(line[name]) for line in table]) for name in ("score", "peak")}
    for name, figures in (("score", result["image"]), ("peak", result["scores"]["peak"]["image"])):
        assert figures["auroc"] == pytest.approx(roc_auc_score(labels, scores[name]))
        assert figures["ap"] == pytest.approx(average_precision_score(labels, scores[name]))
        assert figures["auroc_ci"][0] <= figures["auroc"] <= figures["auroc_ci"][1]
    others = table_of(folder, "baselines.csv")
    assert [line["id"] for line in others] == [line["id"] for line in table]
    images = {name: entry for name, entry in result["baselines"].items() if entry["image"]}
    assert len(images) > 2
    for name, entry in images.items():
        assert entry["image"]["auroc"] == pytest.approx(roc_auc_score(labels, [float(line[name]) for line in others]))
    assert result["n"] == len(rows) == result["n_normal"] + result["n_abnormal"]

    matched = np.array([row.extra["matched"] not in ("0", "") for row in rows])
    part = result["subsets"]["matched"]
    assert part["n"] == matched.sum()
    assert part["image"]["auroc"] == pytest.approx(roc_auc_score(labels[matched], scores["score"][matched]))

    # Pixels: every map as written, on the row's own grid, inside its region; abnormal rows without a mask left out.
    grids = [read_image(row.image) for row in rows]
    maps = [read_image(written_map(folder, row.id)).array[..., 0] for row in rows]
    for row, grid, own in zip(rows, grids, maps, strict=True):
        assert own.shape == grid.array.shape[:-1], row.id
    used = [i for i, row in enumerate(rows) if row.label == 0 or row.mask]
    assert len(used) == len(rows) - sum(row.label == 1 and not row.mask for row in rows) < len(rows)
    masks = {i: read_mask(rows[i].mask) if rows[i].mask else np.zeros(maps[i].shape, bool) for i in used}
    regions = {i: read_mask(rows[i].region) if rows[i].region else np.ones(maps[i].shape, bool) for i in used}
    for figures, view in ((result["pixel"], lambda x: x), (result["subsets"][CENTRAL]["pixel"], central)):
        truth = np.concatenate([view(masks[i])[view(regions[i])] for i in used])
        values = np.concatenate([view(maps[i])[view(regions[i])] for i in used])
        assert figures["auroc"] == pytest.approx(roc_auc_score(truth, values))
        assert figures["ap"] == pytest.approx(average_precision_score(truth, values))
        assert figures["prevalence"] == pytest.approx(truth.mean())
    patients = result["per_patient"]
    assert len(patients) == len({rows[i].patient or rows[i].id for i in used})


def test_maps_are_the_systems_own_enlarged_to_the_image(evaluated):
    rows, folder, _ = evaluated
    images = Images(rows, config(Path("unused"), (24, 20), 1))
    batch = {"image": images.image(np.arange(len(rows))), "case": images.words}
    maps = np.asarray(score({}, batch, jax.random.key(0))["maps"]["bright"])
    for own, row in zip(maps, rows, strict=True):
        file, image = written_map(folder, row.id), read_image(row.image)
        np.testing.assert_allclose(read_image(file).array, resize(own[..., None], image.array.shape[:-1]), atol=2e-6)
        assert file.suffix == ".tif"


def test_the_central_crop_scores_the_middle_of_the_map_and_only_scores_with_a_map(evaluated):
    rows, _, result = evaluated
    part = result["subsets"][CENTRAL]
    assert set(part["scores"]) == {"bright"} and part["n"] == len(rows)
    assert part["image"] == part["scores"]["bright"]["image"]
    assert set(part["baselines"]) >= {"PCA-30 error", "Mahalanobis", "5-NN"}


def test_the_decision_uses_the_threshold_of_val(evaluated):
    rows, folder, result = evaluated
    scores = np.array([float(line["score"]) for line in table_of(folder)])
    labels, at = np.array([row.label for row in rows]), result["decision"]
    called = scores >= at["threshold"]
    assert at["sensitivity"] == pytest.approx(called[labels == 1].mean())
    assert at["specificity"] == pytest.approx(1 - called[labels == 0].mean())
    assert at["accuracy"] == pytest.approx((called == labels).mean())


def test_the_report_is_one_page_with_the_figures(evaluated):
    _, folder, result = evaluated
    page = (folder / "report.html").read_text()
    assert f"{result['image']['auroc']:.3f}" in page and "5-NN" in page and "matched" in page


def test_the_report_of_scans_without_labels_shows_every_film_as_its_file_has_it(tools, tmp_path):
    counts = {("train", 0): 4, ("test", None): 13}
    c = config(tools.write_set(tmp_path / "set", counts), (16, 16), 1)
    cases = load_cases(c, str, folder=tmp_path / "cache")
    more = {"split": "test", "out": tmp_path / "out", "cases": cases}
    result = ev.evaluate(c, SYSTEM, cases.rows, tmp_path, **more)
    assert result["n"] == 13
    page = (tmp_path / "out" / "report.html").read_text()
    found = re.findall(r'base64,([^"]*)" style="aspect-ratio: 36 / 40" alt="Image of case ([^"]*)"', page)
    assert len(found) == 13
    drawn = {name: np.asarray(PIL.open(io.BytesIO(base64.b64decode(data))), float) for data, name in found}
    for row in [row for row in cases.rows if row.split == "test"]:
        values = read_image(row.image[0]).array[..., 0]
        assert np.corrcoef(drawn[row.id].ravel(), values.ravel())[0, 1] > 0.98
    c.evaluation.pictures = 5
    ev.evaluate(c, SYSTEM, cases.rows, tmp_path, **more)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('alt="Image of case') == 5 and "the 5 highest scores of 13 cases" in page


# --- overlap of maps and masks ----------------------------------------------------------------------------------------


def with_iou(c: ConfigDict, percentile: float = 95.0) -> ConfigDict:
    with c.unlocked():
        c.evaluation.iou = percentile
    return c


def test_overlap_uses_the_percentile_of_the_normals_of_val(tools, tmp_path, capfd):
    """By the written maps of the test, and of val, scored as a split of its own; val needs no abnormal row."""
    counts = {("train", 0): 4, ("val", 0): 3, ("test", 0): 2, ("test", 1): 6}
    c = with_iou(config(tools.write_set(tmp_path / "set", counts), (16, 16), 1), 90.0)
    rows = load_rows(c, lambda line: None)
    result = ev.evaluate(c, SYSTEM, rows, tmp_path, split="test", out=tmp_path / "test")
    said = capfd.readouterr().err
    ev.evaluate(c, SYSTEM, rows, tmp_path, split="val", out=tmp_path / "val")
    read = lambda row: read_image(written_map(tmp_path / row.split, row.id)).array[..., 0]
    known = np.percentile(np.concatenate([read(row).ravel() for row in rows if row.split == "val"]), 90)
    marked = [(read_mask(row.mask), read(row)) for row in rows if row.split == "test" and row.mask]
    iou = lambda t: np.mean([(m & (s >= t)).sum() / (m | (s >= t)).sum() for m, s in marked])

    found = result["pixel"]["localisation"]
    assert (found["n"], found["size"], found["groups"], found["overlap"], found["exact"]) == (5, 5, 1, False, True)
    assert found["normals_threshold"] == pytest.approx(known, rel=1e-6)
    assert found["normals"] == pytest.approx(iou(known), rel=1e-6)
    best = max(iou(t) for _, s in marked for t in s.ravel()[::7])
    assert found["oracle"] == pytest.approx(iou(found["oracle_threshold"])) and found["oracle"] >= best
    assert isinstance(result["pixel"]["iou"], float)  # of the pooled pixels, as ever
    for entry in (result["subsets"]["matched"], result["baselines"]["PCA-30 error"]):
        assert entry["pixel"]["localisation"]["normals"] is not None
    assert "localisation" not in result["subsets"][CENTRAL]["pixel"] and result["decision"] is None
    assert re.search(rf"IoU {found['normals']:.3f} calling \d+% \(oracle {found['oracle']:.3f} calling \d+%; ", said)
    assert "no held-out normals" not in said
    page = (tmp_path / "test" / "report.html").read_text()
    assert "IoU, mean over 5 images" in page and "between groups" not in page
    json.loads((tmp_path / "test" / "metrics.json").read_text(), parse_constant=pytest.fail)


def test_the_masks_of_the_report_are_counted_and_drawn(tools, tmp_path, capfd):
    """By the written maps: a case has a mask where its map rises above the threshold of 20 held-out normals."""
    counts = {("train", 0): 4, ("val", 0): 20, ("test", 0): 3, ("test", 1): 8}
    c = config(tools.write_set(tmp_path / "set", counts), (16, 16), 1, budget=0.25, **{"evaluation.alarm_rate": 0.5})
    rows = load_rows(c, lambda line: None)
    found = ev.evaluate(c, SYSTEM, rows, tmp_path, split="test", out=tmp_path / "test")
    maps = [read_image(written_map(tmp_path / "test", row.id)).array for row in rows if row.split == "test"]
    n = sum(bool((values > found["masked"]["threshold"]).any()) for values in maps)
    assert found["masked"] == {"n": n, "of": 11, "threshold": found["mask"]["threshold"]} and 0 < n < 11
    said = capfd.readouterr().err
    assert f"{n} of 11 cases ha" in said and said.count("short training: 0.3 % of the steps of") == 1
    page = (tmp_path / "test" / "report.html").read_text()
    assert f"{n} of 11 cases ha" in page and 0 < page.count('class="called"') <= n
    assert found["mask"]["dice_of_everything"] > 0


def test_overlap_is_averaged_over_replicates_and_has_an_oracle_alone_without_normals(tools, tmp_path, capfd):
    counts = {("train", 0): 4, ("val", 1): 2, ("test", 0): 2, ("test", 1): 4}
    c = with_iou(config(tools.write_set(tmp_path / "set", counts), (16, 16), 1, replicates=2))
    rows, each = load_rows(c, lambda line: None), []
    found = ev.evaluate(c, SYSTEM, rows, tmp_path, split="test", out=tmp_path / "out")["pixel"]["localisation"]
    said = capfd.readouterr().err
    assert "no held-out normals: IoU at the oracle" in said and f"  IoU (oracle {found['oracle']:.3f} calling " in said
    assert found["normals"] is None and found["normals_threshold"] is None
    c.replicates = 1
    for seed in range(2):
        c.seed = seed
        result = ev.evaluate(c, SYSTEM, rows, tmp_path, split="test", out=tmp_path / f"out{seed}")
        each.append(result["pixel"]["localisation"]["oracle"])
    assert found["oracle"] == pytest.approx(np.mean(each)) and each[0] != each[1]


def test_an_overlap_of_volumes_is_refused_before_the_training():
    c = recipe.parse(["--config=configs/maemi.py:smoke"], "")[0]
    c.evaluation.iou = 95.0
    with pytest.raises(InputError, match=r"evaluation.iou is 95.0: volumes have no IoU"):
        load_system(c)


# --- a case is a case -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scorers(finished):
    """(prepared images of the test split, a scorer for batches of 1 and of 16) of the trained run."""
    c = recipe.read(finished)
    rows = [row for row in load_rows(c, lambda line: None) if row.split == "test"]
    system = load_system(c)
    results = restore_results(c, system, finished)
    made = {}
    for batch in (1, 16):
        c.evaluation.batch = batch
        made[batch] = Scorer(c, system, results)
    return [made[1].prepare(row) for row in rows], made


@pytest.mark.long
def test_a_case_scores_the_same_alone_in_a_batch_and_in_another_order(scorers):
    cases, made = scorers
    whole = made[16].score(cases)
    seven = made[16].score(cases[3:10])
    backwards = made[16].score(cases[::-1])[::-1]
    alone = [made[1].score([cases[i]])[0] for i in (0, 5)]
    many = made[1].score(cases)  # more than one pass
    for results, numbers in ((seven, range(3, 10)), (backwards, range(12)), (alone, (0, 5)), (many, range(12))):
        for found, i in zip(results, numbers, strict=True):
            for kind in ("maps", "scores"):
                for name, values in getattr(whole[i], kind).items():
                    np.testing.assert_allclose(getattr(found, kind)[name], values, rtol=1e-5, atol=3e-6)


@pytest.mark.long
def test_an_evaluation_afterwards_repeats_the_one_after_training(finished, tmp_path):
    out = tmp_path / "again"
    assert exit_code(ev.main, [f"--workdir={finished}", f"--out={out}"]) == 0
    first, again = (json.loads((folder / "metrics.json").read_text()) for folder in (finished / "evaluation", out))
    assert {k: first[k] for k in KEYS} == {k: again[k] for k in KEYS}
    assert (finished / "evaluation" / "scores.csv").read_text() == (out / "scores.csv").read_text()
    assert sorted(os.listdir(finished / "evaluation" / "maps")) == sorted(os.listdir(out / "maps"))


# --- other splits, other data -----------------------------------------------------------------------------------------


def toy(tmp_path, tools, counts, capfd=None, split="test", **changes):
    c = config(tools.write_set(tmp_path / "set", counts), (16, 16), 1, **changes)
    return ev.evaluate(c, SYSTEM, load_rows(c, lambda line: None), tmp_path, split=split, out=tmp_path / "out")


def test_an_unlabelled_split_gets_scores_and_no_figures(tools, tmp_path):
    result = toy(tmp_path, tools, {("train", 0): 3, ("unlabeled", None): 4}, split="unlabeled")
    assert (result["n"], result["n_normal"], result["n_abnormal"]) == (4, 0, 0)
    assert [result[k] for k in ("image", "pixel", "per_patient", "decision", "chi2")] == [None] * 5
    assert [result[k] for k in ("scores", "subsets", "baselines")] == [{}] * 3
    table = table_of(tmp_path / "out")
    assert len(table) == 4 and all(line["label"] == "" and float(line["score"]) for line in table)
    assert len(os.listdir(tmp_path / "out" / "maps")) == 4 and (tmp_path / "out" / "report.html").exists()


@pytest.mark.parametrize("label", [0, 1])
def test_a_split_of_one_class_has_nulls_where_nothing_is_defined(tools, tmp_path, label):
    toy(tmp_path, tools, {("train", 0): 8, ("test", label): 3, ("val", 0): 2, ("val", 1): 2})
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result["image"]["auroc"] is None and result["image"]["auroc_ci"] == [None, None]
    assert result["n_normal"] + result["n_abnormal"] == 3
    # The lesions of abnormal images alone still tell pixels apart; normals have none.
    assert (result["pixel"] is None) == (label == 0)
    at = result["decision"]
    assert (at["specificity"] is None, at["sensitivity"] is None) == (label == 1, label == 0)


def test_cases_without_a_label_are_scored_beside_those_with_one(tools, tmp_path):
    result = toy(tmp_path, tools, {("test", 0): 3, ("test", 1): 3, ("test", None): 2})
    assert (result["n"], result["n_normal"], result["n_abnormal"]) == (8, 3, 3)
    assert result["baselines"] == {} and result["decision"] is None, "neither training images nor val are there"
    assert len(table_of(tmp_path / "out")) == 8


def test_replicates_are_averaged_and_summed_up(tools, tmp_path):
    counts = {("train", 0): 8, ("test", 0): 4, ("test", 1): 4, ("val", 0): 2, ("val", 1): 2}
    result = toy(tmp_path, tools, counts, replicates=3)
    c = config(tmp_path / "set" / "manifest.csv", (16, 16), 1)
    rows = [row for row in load_rows(c, lambda line: None) if row.split == "test"]
    labels, each = [row.label for row in rows], []
    for seed in range(3):
        c.seed = seed
        each.append([result.scores["bright"][0] for result in score_rows(Scorer(c, SYSTEM, {}), rows)])
    aurocs = [roc_auc_score(labels, values) for values in each]
    assert result["replicates"]["auroc"]["values"] == pytest.approx(aurocs)
    assert result["image"]["auroc"] == pytest.approx(np.mean(aurocs))
    assert result["replicates"]["auroc"]["half_width"] == pytest.approx(1.96 * np.std(aurocs, ddof=1))
    np.testing.assert_allclose(
        [float(line["score"]) for line in table_of(tmp_path / "out")], np.mean(each, axis=0), rtol=1e-6
    )
    assert isinstance(result["image"]["n_normal"], int)


def test_a_subset_that_the_manifest_does_not_know_is_said(tools, tmp_path, capfd):
    counts = {("train", 0): 4, ("test", 0): 2, ("test", 1): 2}
    result = toy(tmp_path, tools, counts, **{"evaluation.subsets": ("ward",)})
    assert set(result["subsets"]) == {CENTRAL}
    assert "warning: no column 'ward' in the manifest" in capfd.readouterr().err


@pytest.mark.long
def test_other_data_go_into_a_folder_of_their_own(finished, tools, tmp_path):
    manifest = tools.write_set(tmp_path / "set", {("val", 0): 1, ("new", 1): 1, ("test", 0): 2, ("test", 1): 2}, seed=7)
    run = shutil.copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*.json*")}
    arguments = [f"--workdir={run}", f"--manifest={manifest}", "--out", str(tmp_path / "out")]
    assert exit_code(ev.main, arguments) == 0
    result = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert result["n"] == 4 and result["baselines"] == {}
    assert before == {path: path.read_bytes() for path in run.rglob("*.json*")}


@pytest.mark.long
def test_no_evaluation_overwrites_the_one_of_the_test_split(finished, small_set, tmp_path, capfd):
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "evaluation" / "metrics.json").read_bytes()
    assert exit_code(ev.main, [f"--workdir={run}", f"--manifest={small_set}"]) == 2
    assert "--manifest goes with --out=DIR" in capfd.readouterr().err
    assert exit_code(ev.main, [f"--workdir={run}", f"--out={small_set}"]) == 2
    assert capfd.readouterr().err.splitlines() == [f"--out={small_set} is a file: name a folder"]
    assert exit_code(ev.main, [f"--workdir={run}", "--split=val"]) == 0
    result = json.loads((run / "evaluation-val" / "metrics.json").read_text())
    assert result["decision"] is None, "val chose the threshold: it cannot judge it"
    assert exit_code(ev.main, [f"--workdir={run}", "--split=unlabeled"]) == 0
    said = capfd.readouterr().err
    assert "of unknown label" in said and "nan" not in said
    assert (run / "evaluation" / "metrics.json").read_bytes() == before


def test_what_is_missing_is_one_line(finished, small_set, tmp_path, capfd):
    assert exit_code(ev.main, [f"--workdir={finished}", "--split=exam"]) == 2
    assert "split 'exam' has no rows: one of test, train, unlabeled, val" in capfd.readouterr().err
    run = tmp_path / "run"
    shutil.copytree(finished, run, ignore=shutil.ignore_patterns("module_b", "evaluation"))
    assert exit_code(ev.main, [f"--workdir={run}"]) == 2
    assert f"{run}: stage module_b has no checkpoint: train it: jmae train --workdir {run}" in capfd.readouterr().err
    c = config(small_set, (16, 16), 1)
    with pytest.raises(InputError, match="split 'test' has no rows: one of"):
        ev.evaluate(c, SYSTEM, [], tmp_path, split="test", out=tmp_path / "out")


def test_figures_of_leaking_rows_carry_what_leaks_everywhere(small_set, tmp_path, capfd):
    text = small_set.read_text().replace("p-test-0-0", "p-train-0-0")
    (leaky := small_set.with_name("leaky.csv")).write_text(text)
    c = config(leaky, (16, 16), 1, **{"data.allow_leaks": True})
    metrics = ev.evaluate(c, SYSTEM, load_rows(c), tmp_path, split="test", out=tmp_path / "out")
    (line,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["leaks"]
    assert line.startswith("patient 'p-train-0-0' is in train and test") and metrics["leaks"] == [line]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Not an independent test." in page and "p-train-0-0" in page
    assert "NOT AN INDEPENDENT TEST" in capfd.readouterr().err
