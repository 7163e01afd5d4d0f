"""The commands from Python: `jmae.prepare`, `jmae.train`, `jmae.evaluate` and `jmae.load`, as a notebook uses them."""

import base64
import inspect
import io
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import jmae
from jmae import recipe, train
from jmae.data.files import read_image
from jmae.errors import InputError
from jmae.predict import Prediction

NOTEBOOKS = Path(__file__).parents[1] / "docs" / "notebooks"


def test_the_import_is_quick_and_commands_are_functions_and_modules():
    code = (
        "import jmae, sys; assert not {'jax', 'flax', 'numpy'} & set(sys.modules); from jmae import train, evaluate; "
    )
    code += "assert train is jmae.train and callable(train) and train.main and callable(evaluate) and evaluate.main"
    subprocess.run([sys.executable, "-c", code], check=True)
    names = list(inspect.signature(jmae.train).parameters)
    assert (
        names == ["recipe", "workdir", "manifest", "changes"] and "command `jmae train`" in jmae.train.__call__.__doc__
    )
    with pytest.raises(AttributeError, match="'jmae' has no attribute 'trian'"):
        _ = jmae.trian


@pytest.mark.parametrize(
    "call",
    [
        lambda folder: jmae.train("ameai:small", folder),
        lambda folder: jmae.evaluate(folder),
        lambda folder: jmae.load(folder),
        lambda folder: jmae.Evaluation(folder),
        lambda folder: jmae.prepare("folders", folder / "out", normal=folder),
    ],
)
def test_an_error_has_a_short_traceback(call, tmp_path):
    with pytest.raises(InputError) as raised:
        call(tmp_path)
    assert len(raised.traceback) <= 4  # the test, the lambda, and the public function
    assert raised.value.__cause__ is None and raised.value.__suppress_context__


@pytest.mark.long
def test_train_is_the_command_with_the_same_recipe(finished, small_set, tools, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(train, "run", lambda config, workdir: asked.append((config, workdir)) or 0)
    words = [word.removeprefix("--config.").split("=") for word in tools.arguments(None, tmp_path)[2:]]
    changes = {
        key: int(text) if text.isdecimal() else (text,) if key.endswith("subsets") else text for key, text in words
    }
    assert jmae.train("amae:smoke", tmp_path, manifest=small_set, changes=changes) == tmp_path
    config, workdir = asked[0]
    assert workdir == tmp_path and recipe.to_json(config) == recipe.to_json(recipe.read(finished))
    with pytest.raises(InputError, match=r"adapt\.stepz is unknown: did you mean --config\.adapt\.steps\?"):
        jmae.train("amae:smoke", tmp_path, changes={"adapt.stepz": 3})


def test_evaluate_gives_figures_and_cases(finished, tmp_path):
    found = jmae.evaluate(finished, out=tmp_path / "again", changes={"evaluation.maps": False})
    assert found.folder == tmp_path / "again" and (found.folder / "report.html").exists()
    score = np.array([float(line["score"]) for line in found.cases])
    label = np.array([int(line["label"]) for line in found.cases])
    assert len(score) == 12 and (np.diff(score) <= 0).all()
    pairs = score[label == 1][:, None] - score[label == 0]
    primary = found.metrics["primary"]
    assert found.figures()[primary]["auroc"] == pytest.approx(np.mean((pairs > 0) + (pairs == 0) / 2))
    page = found._repr_html_()
    assert f"<td>{primary}</td><td>{found.figures()[primary]['auroc']:.3f}</td>" in page
    assert page.count("<tr>") == 1 + len(found.figures()) + 1 + 10 and f"<td>{found.cases[0]['id']}</td>" in page
    with pytest.raises(InputError, match=r"no metrics\.json: name the folder of an evaluation"):
        jmae.Evaluation(finished)


@pytest.mark.long
def test_a_prediction_draws_itself(finished, small_set):
    file = next(small_set.parent.glob("test-1-0.png"))
    run = jmae.load(finished)
    assert repr(run) == "<a trained run of amae: call it with an image>"
    one = run(file)
    stored = read_image([str(file)]).array[..., 0]
    dark, bright = np.percentile(stored, (1, 99))
    grey = np.round(255 * np.clip((stored - dark) / (bright - dark), 0, 1))
    picture = one.picture()
    assert picture.shape == (40, 72, 3) and picture.dtype == np.uint8
    np.testing.assert_allclose(picture[:, :36], np.repeat(grey[..., None], 3, -1), atol=1)
    hot = one.map >= np.quantile(one.map, 0.99)
    assert (picture[:, 36:][hot] != picture[:, :36][hot]).any()
    page = one._repr_html_()
    assert f"score {one.score:.4g}, p-value {one.p_value:.3g}" in page and "warning" not in page
    (data,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))), picture)
    bare = Prediction(None, 1.0, None, None, "size <20>")
    assert bare._repr_html_() == "<p>score 1, p-value none</p><p>warning: size &lt;20&gt;</p>"


def test_prepare_writes_the_manifest_of_two_folders(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name in ("normals/a.png", "normals/b.png", "new/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32), np.uint8)).save(tmp_path / name)
    manifest = jmae.prepare(
        "folders", tmp_path / "data", normal=tmp_path / "normals", test=tmp_path / "new", relative=True
    )
    splits = [line.split(",")[2] for line in manifest.read_text().splitlines()[1:]]
    assert splits == ["train", "train", "test"] and "next: jmae train" in capsys.readouterr().out
    assert ",../normals/a.png," in manifest.read_text()


def test_the_notebooks_are_those_of_the_tutorials():
    made = runpy.run_path(str(NOTEBOOKS / "make.py"))
    for name in made["PAGES"]:
        assert made["notebook"](name) == (NOTEBOOKS / f"{name}.ipynb").read_text(), "run docs/notebooks/make.py"
        cells = json.loads(made["notebook"](name))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        assert sum(cell.startswith("%%bash") and "jmae" in cell for cell in code) >= 3
        assert any("draw(" in cell for cell in code) and not any("```python" in "".join(c["source"]) for c in cells)


def test_a_small_p_value_and_a_missing_interval_are_shown(tmp_path):
    image = {"auroc": 0.75, "auroc_ci": [None, None], "ap": 0.5}
    (tmp_path / "metrics.json").write_text(json.dumps({"scores": {"ours": {"image": image}}}))
    (tmp_path / "scores.csv").write_text("id,label,score,p_value\na,1,2.5,4.1e-05\nb,0,3.5,\n")
    page = jmae.Evaluation(tmp_path)._repr_html_()
    assert "<td>ours</td><td>0.750</td><td></td><td>0.500</td>" in page
    assert "<td>3.5</td><td></td>" in page and "<td>2.5</td><td>4.1e-05</td>" in page
