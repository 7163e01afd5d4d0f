"""The cards say what the run knows, once it knows it, and nothing else."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jmae import cards, recipe
from jmae.recipe import SYSTEMS
from jmae.report import system_description, words
from jmae.system import System

TOY = System(name="amae", stages=(), uses=(), primary="bright")


def a_recipe(manifest: Path | None):
    config, _ = recipe.parse(["--config=configs/amae.py:smoke"], "")
    config.data.manifest = str(manifest or "")
    return config


@pytest.fixture(scope="module")
def rows(tools, tmp_path_factory):
    """(manifest with a column licence, its rows)."""
    from jmae.data.manifest import parse_manifest

    folder = tmp_path_factory.mktemp("cards")
    manifest = tools.write_set(folder, {("train", 0): 8, ("unlabeled", None): 3, ("test", 0): 4, ("test", 1): 2})
    with open(manifest, newline="") as file:
        lines = list(csv.DictReader(file))
    for i, line in enumerate(lines):
        line["licence"] = "CC BY 4.0" if i < 10 else ""
        line["patient"] = "" if line["id"] == "train-0-0" else line["patient"]
    with open(manifest, "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return manifest, parse_manifest(manifest)[0]


def test_every_system_names_its_paper():
    for name in SYSTEMS:
        what, paper = system_description(name)
        assert len(what) > 30 and re.search(r"arXiv \d{4}\.\d{5}\.$", paper), name
    assert system_description("toy") == system_description("../train") == ("", "")


def test_a_system_whose_file_names_no_paper_is_described_without_one(tmp_path, monkeypatch):
    (tmp_path / "systems").mkdir()
    monkeypatch.setattr(words, "SYSTEM_FILES", tmp_path / "systems")
    for text, expected in (
        ('"""One\nsentence.\n\nNo number."""', ("One sentence.", "")),
        ('"""One sentence."""', ("One sentence.", "")),
        ("x = 1", ("", "")),
        ('"""One.\n\nA. Name, arXiv 2206.03935, and more."""', ("One.", "A. Name, arXiv 2206.03935.")),
    ):
        (tmp_path / "systems" / "sixth.py").write_text(text)
        assert system_description("sixth") == expected


def test_the_data_card_counts_what_the_manifest_has(rows, tmp_path):
    manifest, read = rows
    cards.write_cards(tmp_path, a_recipe(manifest), TOY, read)
    card = (tmp_path / "DATA_CARD.md").read_text()
    assert "| train | normal | 8 | 4 | 1 | 0 |" in card and "| test | abnormal | 2 | 1 | 0 | 2 |" in card
    assert "| unlabeled | unknown | 3 | 2 | 0 | 0 |" in card
    assert "licence: CC BY 4.0 (10 cases), not stated (7 cases)" in card
    assert "data.size: (64, 64)" in card or "data.size: [64, 64]" in card
    endings = [Path(row.image[0]).name.split(".", 1)[1] for row in read]
    for ending in ("png", "npy", "nii.gz"):
        assert f"| .{ending} | 1 | 40 x 36 | {endings.count(ending)} |" in card, card
    plain = [row._replace(extra={}) for row in read]
    cards.write_cards(tmp_path, a_recipe(manifest), TOY, plain)
    assert "licence: unknown" in (tmp_path / "DATA_CARD.md").read_text()


def test_images_of_other_sizes_are_told_apart(rows, tmp_path):
    _, read = rows
    Image.fromarray(np.zeros((7, 9), np.uint8)).save(tmp_path / "small.png")
    table = cards.image_kinds([*read[:3], read[0]._replace(image=(str(tmp_path / "small.png"),))])
    assert "| .png | 1 | 7 x 9 | 1 |" in table and "| .png | 1 | 40 x 36 | 2 |" in table
    assert "not in one header" in cards.image_kinds([read[0]._replace(image=(str(tmp_path),))])


def test_phantoms_are_of_no_patient(tmp_path):
    from jmae.data import phantoms

    cards.write_cards(tmp_path, a_recipe(None), TOY, phantoms.rows("chest"))
    card = (tmp_path / "DATA_CARD.md").read_text()
    assert "phantoms: chest: drawn by jmae, without patients" in card and "SHA-256" not in card
    assert "Size 128 x 128, 1 channel." in card


def test_the_model_card_has_figures_with_intervals_once_there_are_any(rows, tmp_path):
    manifest, read = rows
    cards.write_cards(tmp_path, a_recipe(manifest), TOY, read)
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "Not evaluated." in card and "not for clinical use" in card and "arXiv 2307.12721" in card
    assert "last steps: none saved" in card
    image = {"auroc": 0.9123, "auroc_ci": [0.85, 0.95], "ap": 0.5, "ap_ci": [None, None]}
    weak = {"auroc": 0.6, "auroc_ci": [0.5, 0.7], "ap": 0.4, "ap_ci": [0.3, 0.5]}
    evaluation = {
        **{"system": "amae", "split": "test", "n": 6, "n_normal": 4, "n_abnormal": 2, "primary": "bright"},
        **{"image": image, "pixel": None, "scores": {"bright": {"image": image, "pixel": {"auroc": 0.7, "ap": 0.1}}}},
        "baselines": {"a | b": {"image": weak, "pixel": None}},
        "alarms": {"rate": 0.05, "n": 40, "normal": 0.25, "abnormal": None},
        "leaks": ["one"],
        "digests": {"images evaluated": "abc"},
    }
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "metrics.json").write_text(json.dumps(evaluation))
    versions = {"python": "3.12.1", "devices": ["cpu:0"], "versions": {"jax": "0.10.1"}}
    (tmp_path / "environment.json").write_text(json.dumps(versions))
    cards.write_cards(tmp_path, a_recipe(manifest), TOY, read)
    card = (tmp_path / "MODEL_CARD.md").read_text()
    assert "evaluation: split test, 6 cases, 4 normal, 2 abnormal." in card
    assert "| bright (primary) | 0.912 (0.850 to 0.950) | 0.500 | 0.700 | 0.100 |" in card
    assert r"| a \| b (baseline) | 0.600 (0.500 to 0.700) | 0.400 (0.300 to 0.500) |  |  |" in card
    assert "from 40 held-out normal cases: 25.0% of normal cases." in card and "Not evaluated" not in card
    assert "not an independent test: 1 patients or images are in two splits" in card and "jax 0.10.1" in card
    assert "digest of the images of evaluation: abc" in (tmp_path / "DATA_CARD.md").read_text()


def test_alarms_of_cases_without_a_label_are_counted():
    counts = {"normal": [0, 0], "abnormal": [0, 0], "unlabelled": [1, 20]}
    alarms = {"rate": 0.05, "n": 23, "normal": None, "abnormal": None, "counts": counts}
    found = {"folder": "evaluation", "split": "test", "n": 20, "n_normal": 0, "n_abnormal": 0, "scores": {}}
    text = cards.figures_text({**found, "baselines": {}, "alarms": alarms})
    assert "from 23 held-out normal cases: 1 of 20 cases without a label." in text
