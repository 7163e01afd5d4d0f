"""A score is a function of the image: not of its name, folder, command, batch, or its place in the batch."""

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import draw
from drawn import first_state
from PIL import Image

from jmae import recipe
from jmae.data.manifest import parse_manifest
from jmae.inference import Scorer
from jmae.inputs import row_of
from jmae.recipe import SYSTEMS
from jmae.system import load_system

SAMPLES = {"ppii": ["evaluation.samples=3"]}
VOLUME = """
data.size=8,8,4 model.patch=4,4,2 data.channels=1 data.clip=0,1.5 data.crop=none data.spacing= data.region=nonzero
evaluation.stride=8,8,4 evaluation.repeats=2
""".split()


def scorer_of(name: str) -> Scorer:
    """The scorer of a smoke recipe with drawn weights."""
    changes = [*SAMPLES.get(name, []), *(VOLUME if name == "maemi" else [])]
    config, _ = recipe.parse([f"--config=configs/{name}.py:smoke", *(f"--config.{one}" for one in changes)], "")
    config.evaluation.batch = 4
    system, results = load_system(config), {}
    for stage in system.stages:
        results[stage.name] = stage.result(first_state(stage, results, 4))
    return Scorer(config, system, {stage: results[stage] for stage in system.uses})


def written(folder: Path, name: str, seed: int, volume: bool) -> Path:
    """A file with the image of a seed."""
    folder.mkdir(exist_ok=True, parents=True)
    array = draw(np.random.default_rng(seed), (17, 11, 9) if volume else (40, 36), False)[0]
    file = folder / f"{name}.{'nii.gz' if volume else 'png'}"
    if volume:
        nib.save(nib.Nifti1Image(array, np.diag([1.0, 1, 1, 1])), file)
    else:
        Image.fromarray(array).save(file)
    return file


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_score_of_a_file_depends_on_its_image_alone(name, tmp_path):
    volume = name == "maemi"
    files = [written(tmp_path / "set", f"case{i}", i, volume) for i in range(3)]
    with open(tmp_path / "manifest.csv", "w", newline="") as out:
        lines = csv.writer(out)
        lines.writerow("id patient split label image mask region".split())
        lines.writerows([f"e{i}", "", "test", 0, file, "", ""] for i, file in enumerate(files))
    evaluated, *_ = parse_manifest(tmp_path / "manifest.csv")
    copy = written(tmp_path / "elsewhere", "renamed", 0, volume)
    predicted = [row_of(f"new {i}", (str(file),)) for i, file in enumerate([files[2], copy])]
    scorer = scorer_of(name)
    first = scorer.score([scorer.prepare(row) for row in evaluated])
    again = scorer.score([scorer.prepare(row) for row in predicted])
    for one, other in ((first[2], again[0]), (first[0], again[1])):
        assert one.case.row.id != other.case.row.id
        for score, values in one.scores.items():
            np.testing.assert_allclose(values, other.scores[score], rtol=1e-5, atol=1e-7, err_msg=score)
        for kind, values in one.maps.items():
            np.testing.assert_allclose(values, other.maps[kind], rtol=1e-4, atol=1e-6, err_msg=kind)
    assert any(np.any(first[0].scores[score] != first[1].scores[score]) for score in first[0].scores)
    assert set(first[0].scores) <= set(scorer.system.words), "each score has words for the report"
