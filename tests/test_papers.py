"""The rows of the papers' tables: what is listed, the steps of a row, one row that is run twice, its figures."""

import json
import shlex
from pathlib import Path

import pytest
from conftest import SMALL, write_set
from test_prepare_chest import nih

from jmae import papers, recipe, train
from jmae.data import prepare
from jmae.errors import exit_code
from jmae.sealed import seal
from jmae.system import load_system

ROWS = {row.name: row for row in papers.rows()}
COUNTS = {("train", 0): 40, ("unlabeled", None): 40, ("val", 0): 6, ("val", 1): 6, ("test", 0): 8, ("test", 1): 8}


def dry(capsys, *words) -> list[str]:
    """The lines of --dry-run."""
    assert exit_code(papers.main, [*words, "--dry-run"]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys, *words) -> str:
    assert exit_code(papers.main, [*words]) == 2
    out, err = capsys.readouterr()
    assert not out and "Traceback" not in err
    return err


def settings(command: str) -> dict[str, str]:
    """The recipe values of a training command."""
    words = [word for word in shlex.split(command) if word.startswith("--config.")]
    return dict(word.removeprefix("--config.").split("=", 1) for word in words)


def test_every_row_is_listed_once_with_the_printed_figures(capsys):
    assert len(ROWS) == len(papers.rows())
    assert exit_code(papers.main, []) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in ROWS)
    assert ROWS["amae.table2.rsna.stage2"].published == {"AUROC": 0.914, "AP": 0.917}
    assert ROWS["amae.table2.nih.stage1"].published == {"AUROC": 0.95, "AP": 0.949}
    assert ROWS["memmc.table2.covidx.memory"].published == {"AUROC": 0.862}
    assert list(ROWS["ppii.table1.jsrt.unet"].published.values()) == [0.90, 0.27, 0.64, 0.94]
    (fpi,) = (line for line in out.splitlines() if line.startswith("  amae.table2.nih.fpi "))
    assert fpi.endswith(" AUROC 0.705, AP not known (not a method of jmae)")
    assert exit_code(papers.main, ["maemi.table2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  maemi")]
    assert [(line[0].rpartition(".")[2], line[-6].rstrip(","), line[-1]) for line in lines] == [
        ("6x6x4", "0.724", "0.0784"), ("8x8x4", "0.712", "0.0777"), ("12x12x4", "0.66", "0.075"),
        ("24x24x4", "0.546", "0.056"),
    ]  # fmt: skip


def test_the_steps_of_a_row_are_commands(tmp_path, capsys):
    head, prepare, *train = dry(capsys, "amae.table2.rsna.stage2", "--root=IN", f"--out={tmp_path}")[1:]
    assert "without --config.model.weights=FILE this is not the paper's run" in head
    assert prepare == f"  jmae prepare rsna --root=IN --out={tmp_path}/data/rsna"
    assert [settings(line)["seed"] for line in train] == ["0", "1", "2", "3"]
    expected = {
        "data.manifest": f"{tmp_path}/data/rsna/manifest.csv",
        "data.unlabeled_labels": f"{tmp_path}/data/rsna/unlabeled_labels.csv",
    }
    assert settings(train[0]) == expected | {"replicates": "1", "seed": "0"} and "--config=amae:paper" in train[0]
    small = dry(capsys, "maemi.table2.duke.6x6x4", "--preset=small", "--seeds", "1", "--config.budget=0.5")
    assert "is not the paper's size (maemi:paper)" in small[1] and len(small) == 4
    assert settings(small[-1])["model.patch"] == "3,3,2" and settings(small[-1])["budget"] == "0.5"


def test_the_set_lies_in_its_own_folder_or_is_the_folder(tmp_path, capsys, monkeypatch):
    assert dry(capsys, "ppii.table1.lidc.unet", f"--root={tmp_path}")[1].startswith(
        f"  jmae prepare lidc --root={tmp_path} "
    )
    (tmp_path / "lidc").mkdir()
    prepare, train = dry(capsys, "ppii.table1.lidc.unet", f"--root={tmp_path}")[1:]
    assert f"--root={tmp_path}/lidc " in prepare and settings(train)["data.window"] == "-1024,3071"
    monkeypatch.setenv("JMAE_DATA", str(tmp_path))
    train = dry(capsys, "amae.packs.cxr_nih", "--seeds=1")[-1]
    assert settings(train)["data.unlabeled_labels"] == f"{tmp_path}/cxr_nih/unlabeled_labels.csv"


def test_rows_that_train_the_same_share_their_runs(capsys):
    folder = lambda name, *more: dry(capsys, name, *more)[-1].rpartition("--workdir=")[2]
    assert folder("memmc.table2.covidx.memmc") == "papers/memmc.table1.covidx.memmc/seed-0"
    assert folder("memmc.table3.kvasir.memmc") == folder("memmc.table1.kvasir.memmc")
    assert folder("maemi.table1.duke.subtraction", "--preset=small") == "papers/maemi.table1.duke.maemi-small/seed-0"
    first = folder("amae.table2.rsna.stage1_imagenet", "--config.model.weights=x", "--seeds=1")
    assert first != folder("amae.table2.rsna.stage1", "--seeds=1")


@pytest.mark.parametrize("system", recipe.SYSTEMS)
def test_the_settings_of_every_row_are_a_recipe(system):
    """`plan_of` checks the recipe; rows with other patches are built, too."""
    for row in papers.rows():
        assert not row.data.prepare or row.data.prepare in prepare.DATASETS
        for preset in ("", "small") if row.recipe.startswith(f"{system}:") else ():
            flags = {"preset": preset, "seeds": "1", "dry-run": "true", "config.model.weights": "file"}
            flags = flags if row.needs_weights else {k: v for k, v in flags.items() if "weights" not in k}
            plan = papers.plan_of(row, flags)
            if "model.patch" in row.keys:
                load_system(recipe.parse(plan.commands[-1][1:], "", ["workdir"])[0])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["maemi.table1.dke.maemi"], "maemi.table1.dke.maemi: no row of the papers: did you mean maemi.table1.duke"),
        (["amae.table2.rsna.draem", "--root=x"], "amae.table2.rsna.draem: jmae does not have DRAEM"),
        (["amae.table2.rsna.stage1_imagenet", "--root=x"], "amae.table2.rsna.stage1_imagenet: starts from published"),
        (["amae.table2.rsna", "--root=x"], "amae.table2.rsna: names 20 rows: name one"),
        (["amae.table2.rsna.stage1", "--seeds=1"], "amae.table2.rsna.stage1: name the folder of RSNA"),
        (["amae.table2.rsna.stage1", "--seeds=0", "--root=x"], "--seeds=0: train at least one seed"),
        (["amae.table2.rsna.stage1", "--preset=smal", "--root=x"], "amae: preset 'smal' is unknown"),
        (["amae.table2.rsna.stage1", "--config=amae", "--root=x"], "--config: the row names the recipe"),
        (["amae.table2.rsna.stage1", "--config.budgt=1", "--root=x"], "--config.budgt is unknown: did you mean"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(words, line, capsys):
    said = refused(capsys, *words)
    assert said.startswith(line) and said.count("\n") == 1


@pytest.mark.long
def test_a_row_is_run_and_goes_on_where_it_stopped(tmp_path, capsys):
    write_set(tmp_path / "cxr_peds", COUNTS)
    words = ["amae.packs.cxr_peds.stage1", f"--root={tmp_path}", f"--out={tmp_path}/out", "--preset=smoke"]
    words += [f"--config.{one}" for one in SMALL]
    folder, results = tmp_path / "out" / "amae.packs.cxr_peds.stage1-smoke", tmp_path / "out" / "results.json"
    metrics = lambda seed: folder / f"seed-{seed}" / "evaluation" / "metrics.json"

    assert exit_code(papers.main, [*words, "--seeds=1"]) == 0
    out, said = capsys.readouterr()
    image = json.loads(metrics(0).read_text())["image"]
    (first,) = json.loads(results.read_text()).values()
    assert said.count("$ jmae train") == 1 and "amae:smoke is not the paper's size (amae:small)" in said
    assert first["figures"]["AP"] == {
        "published": None, "ours": image["ap"], "interval": image["ap_ci"], "spread": None,
    }  # fmt: skip
    assert f"{image['auroc']:.3f}" in out and "not known" in out

    assert exit_code(papers.main, [*words, "--seeds=1"]) == 0
    again, said = capsys.readouterr()
    assert again == out and said.count("is there already") == 1 and "$ jmae train" not in said
    assert json.loads(results.read_text()).popitem()[1] == first
    plan = papers.plan_of(ROWS[words[0]], dict(word.removeprefix("--").split("=", 1) for word in words[1:]))
    assert papers.already(plan.commands[0], plan.manifest) == metrics(0)
    assert papers.already(plan.commands[1], plan.manifest) is None  # seed 1
    assert papers.already([*plan.commands[0], "--config.evaluation.draws=10"], plan.manifest) is None
    metrics(0).unlink()
    assert papers.already(plan.commands[0], plan.manifest) is None
    assert exit_code(papers.main, [*words, "--config.proxy.steps=11"]) == 2  # another run than that of the folder
    assert "proxy.steps" in capsys.readouterr().err


def test_the_importer_of_a_row_is_run_once(tmp_path, capsys, monkeypatch):
    """A row of NIH on a small tree; a stand-in for the training."""
    nih(root := tmp_path / "nih")
    (root / "norm_MaleAdultPA_train_curated_list.txt").write_text("00000001_000.png\n")
    (root / "norm_FemaleAdultPA_test_curated_list.txt").write_text("00000004_000.png\n")
    (root / "anomaly_MaleAdultPA_test_curated_list.txt").write_text("00000002_000.png\n")

    def trained(argv):
        config, flags = recipe.parse(argv, "", ["workdir"])
        assert config.variant == "stage1" and config.replicates == 1 and Path(config.data.manifest).is_file()
        (folder := Path(flags["workdir"]) / "evaluation").mkdir(parents=True)
        image = {"auroc": 0.5 + config.seed / 10, "auroc_ci": [0.4, 0.9], "ap": 0.5, "ap_ci": [0.5, 0.5]}
        (folder / "metrics.json").write_text(json.dumps({"image": image, "n_normal": 1, "n_abnormal": 1}))
        (folder / "config.json").write_text(seal(json.loads(recipe.to_json(config))))
        (folder / "report.html").touch()
        return 0

    monkeypatch.setattr(train, "main", trained)
    words = ["amae.table2.nih.stage1", f"--root={tmp_path}", f"--out={tmp_path}/out"]
    assert exit_code(papers.main, words) == 0
    out, said = capsys.readouterr()
    assert said.count("$ jmae prepare nih") == 1 and said.count("$ jmae train") == 4
    assert "not the paper's numbers" in out
    (line,) = (line.split() for line in out.splitlines() if line.startswith("AUROC"))
    assert [line[1], line[-4], *line[-3:]] == ["0.650", "0.950", "-0.300", "[-0.550,", "-0.050]"]
    assert exit_code(papers.main, words) == 0
    assert "$ jmae" not in capsys.readouterr().err


def test_a_set_without_the_regions_of_the_figures_is_refused(tmp_path, capsys):
    write_set(tmp_path / "out" / "data" / "duke", COUNTS)
    line = refused(capsys, "maemi.table1.duke.maemi", f"--root={tmp_path}", f"--out={tmp_path}/out").splitlines()[-1]
    assert "has no region, and the paper's figures count in regions: add Breast_MRI_" in line


def test_ours_stand_beside_the_papers_with_the_difference(tmp_path):
    row = ROWS["maemi.table1.duke.maemi"]
    plan = papers.Plan(row, row.recipe, 1, tmp_path, [["train"]], [tmp_path])
    found = {"auroc": 0.7, "auroc_ci": [0.65, 0.8], "ap": None, "ap_ci": [None, None]}
    evaluation = {"n_normal": 3, "n_abnormal": 4, "primary": "maemi", "patient_means": {"maemi": found}, "leaks": ["a"]}
    other = evaluation | {"patient_means": {"maemi": found | {"auroc": 0.8, "auroc_ci": [0.75, 0.9]}}}
    smoothed = evaluation | {"primary": "smoothed", "patient_means": {"maemi": None, "smoothed": found}}
    assert papers.compared(plan, [smoothed])["figures"]["AUROC, mean of patients"]["ours"] == 0.7
    two = papers.compared(plan, [evaluation, other])["figures"]["AUROC, mean of patients"]
    assert two["ours"] == pytest.approx(0.75) and two["interval"] == pytest.approx([0.7, 0.85])
    assert two["spread"] == pytest.approx(1.96 * 0.1 / 2**0.5)
    result = papers.compared(plan, [evaluation])
    auroc, ap = result["figures"].values()
    assert auroc == {"published": 0.732, "ours": 0.7, "interval": [0.65, 0.8], "spread": None}
    assert ap == {"published": 0.081, "ours": None, "interval": None, "spread": None}
    lines = list(papers.result_lines(plan, result))
    assert lines[1].split()[-8:] == ["0.700", "[0.650,", "0.800]", "-", "0.732", "-0.032", "[-0.082,", "+0.068]"]
    assert lines[2].split()[-6:] == ["-", "-", "-", "0.081", "-", "-"]
    assert lines[-1] == "note: patients or images are in two splits"


def test_places_of_training_values_and_of_figures_that_are_not_there():
    printed = [{"stage": "teacher", "metric": "loss", "epoch": 20, "ours": 0.03, "printed": 0.0323}]
    assert papers.figure({"printed": printed}, "printed.teacher.loss.20") == (0.03, None)
    assert papers.figure({"printed": printed}, "printed.teacher.loss.1000") == (None, None)
    assert papers.figure({"pixel": None}, "pixel.froc.sensitivity") == (None, None)


def test_the_page_has_every_row_and_our_figures(tmp_path):
    kept = tmp_path / "papers.json"
    figures = {"AUROC": {"ours": 0.91234}, "AP": {"ours": None}}
    kept.write_text(json.dumps({"amae.table2.rsna.stage2, amae:small": {"seeds": 2, "figures": figures}}))
    lines = papers.table(kept).splitlines()
    row = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    assert row.keys() == ROWS.keys()
    assert row["amae.table2.rsna.stage2"].endswith("| AUROC 0.914, AP 0.917 | amae:small, 2 seeds: AUROC 0.912 |")
    assert row["amae.table2.vindr.stage2"].endswith("| not run |") and "| rsna |" in papers.table(tmp_path / "none")
