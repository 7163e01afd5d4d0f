"""The score of the nearest normal token in whole runs: trained, evaluated, restored and compared with NumPy."""

import csv
import json
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.metrics import roc_auc_score

from jmae import evaluate, predict, recipe, train
from jmae.data.cases import load_cases
from jmae.errors import InputError, exit_code
from jmae.fitting import restore_results
from jmae.inference import Scorer, score_rows
from jmae.nn.memory import MultiLevelMAE
from jmae.patches import grid_of, patchify
from jmae.system import load_system, masked_autoencoder
from jmae.systems import amae, memmc_mae
from jmae.tokens import inner, neighbours, token_features
from jmae.weights import read_weights

ALL = "evaluation.bank_size=3000"  # more tokens than there are: the bank holds all
RUNS = {
    "amae": ("variant=mae", "evaluation.discrepancy=tokens", "pretrain.batch=8", "proxy.batch=8"),
    "memmc_mae": ("evaluation.score=tokens",),
    "maemi": ("evaluation.bank_size=50", "model.patch=8,8,1"),
}


def arguments(name, folder, manifest, *changes):
    data = [] if name == "maemi" else [f"data.manifest={manifest}", "data.phantom="]
    every = ["evaluation.tokens=position", ALL, *data, *RUNS[name], *changes]
    return [f"--config=configs/{name}.py:smoke", f"--workdir={folder}", *(f"--config.{one}" for one in every)]


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.long) for name in RUNS])
def run(request, small_set, tmp_path_factory):
    """(name, folder, recipe) of a finished run."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    assert exit_code(train.main, arguments(request.param, folder, small_set)) == 0
    return request.param, folder, recipe.read(folder)


def restored(config, folder):
    system = load_system(config)
    return system, restore_results(config, system, folder)


def test_the_score_stands_beside_the_others_in_every_file(run):
    name, folder, _ = run
    figures = json.loads((folder / "evaluation" / "metrics.json").read_text())
    assert figures["primary"] == ("maemi" if name == "maemi" else "tokens")
    assert 0 <= figures["scores"]["tokens"]["image"]["auroc"] <= 1
    with open(folder / "evaluation" / "scores.csv") as file:
        lines = list(csv.DictReader(file))
    column = "tokens" if name == "maemi" else "score"
    assert lines and all(float(line[column]) > 0 for line in lines)
    page = (folder / "evaluation" / "report.html").read_text()
    assert "tokens" in page
    for rival in ("untrained encoder: tokens", "raw patches: tokens"):
        part = figures["baselines"][rival]
        assert part["image"]["auroc"] is not None and part["pixel"]["auroc"] is not None and rival in page


def test_raw_patches_are_scored_by_the_nearest_normal_patch_within_one_place(run):
    name, folder, config = run
    if name == "maemi":
        pytest.skip("volumes: the same function of windows")
    system, cases = load_system(config), load_cases(config)
    patch, rows = tuple(config.model.patch), lambda split: [row for row in cases.rows if row.split == split]
    grid, raw = grid_of(tuple(config.data.size), patch), system.rivals["raw"].system
    read = lambda split: patchify(
        system.prediction.view(cases.images(rows(split)).image(np.arange(len(rows(split))))), patch
    )
    known, new = np.asarray(read("train"), np.float64), np.asarray(read("test"), np.float64)
    positions = inner(grid, config.evaluation.ring)
    apart = np.zeros((len(new), len(positions)))
    for place, (i, near) in enumerate(zip(positions, neighbours(grid, positions), strict=True)):
        bank = known[:, positions[near[near >= 0]]].reshape(-1, known.shape[-1])
        apart[:, place] = cdist(new[:, i], bank).min(1)
    labels = [row.label for row in rows("test")]
    found = json.loads((folder / "evaluation" / "metrics.json").read_text())["baselines"]["raw patches: tokens"][
        "image"
    ]
    assert raw.primary == "tokens" and found["auroc"] == pytest.approx(roc_auc_score(labels, apart.mean(1)))


def test_an_image_s_score_is_the_mean_distance_to_the_nearest_of_all_normals(run):
    name, folder, config = run
    if name == "maemi":
        pytest.skip("volumes: the next test")
    system, results = restored(config, folder)
    cases, patch = load_cases(config), tuple(config.model.patch)
    grid = grid_of(tuple(config.data.size), patch)
    positions, stage = inner(grid, 1), "pretrain" if name == "amae" else "train"
    if name == "amae":
        mae = amae.networks_of(config).mae_of(results[stage]["params"])
        view = lambda image: amae.standardised(image, config)
    else:
        make = partial(MultiLevelMAE, gate=config.model.gate, normed=config.model.mc_norm)
        more = {"memory": config.model.memory, "long_skips": config.model.long_skips}
        mae = masked_autoencoder(config, 1, make, **more)[1](results[stage]["params"])
        view = lambda image: memmc_mae.clean(config, image)

    def tokens(split):
        images = cases.images([row for row in cases.rows if row.split == split])
        patches = patchify(view(jnp.asarray(images.image(np.arange(len(images.rows))))), patch)
        return np.asarray(token_features(mae, patches, positions), np.float64)

    normal, new = tokens("train"), tokens("test")
    near = neighbours(grid, positions)
    bank = lambda i: normal[:, near[i][near[i] >= 0]].reshape(-1, normal.shape[-1])
    apart = np.stack([cdist(new[:, i], bank(i)).min(1) for i in range(len(positions))], 1)
    with open(folder / "evaluation" / "scores.csv") as file:
        scores = [float(line["score"]) for line in csv.DictReader(file)]
    np.testing.assert_allclose(scores, apart.mean(1), rtol=2e-3)

    scorer = Scorer(config, system, results, cases)
    seen = score_rows(scorer, [row for row in cases.rows if row.split == "train"][:3])
    assert all(result.scores["tokens"][0] < 1e-2 * min(scores) for result in seen)  # they are in the bank themselves


def test_a_volume_s_map_is_the_mean_over_the_windows(run):
    name, folder, config = run
    if name != "maemi":
        pytest.skip("images: the test before")
    system, results = restored(config, folder)
    cases = load_cases(config)
    case = cases.case(next(row for row in cases.rows if row.split == "test"))
    (result,) = Scorer(config, system, results, cases).score([case])
    sweep, array = system.sweep, case.array
    tiling = sweep.tile(
        array.shape[:-1], sweep.window, sweep.stride, side=case.volume.side, midline=case.volume.midline
    )
    padded = np.pad(array, [*tiling.pad, (0, 0)])
    total, count = np.zeros(padded.shape[:-1]), np.zeros(padded.shape[:-1])
    for origin in tiling.origins:
        cut = tuple(slice(o, o + w) for o, w in zip(origin, sweep.window, strict=True))
        values, weights = sweep.further(results)(jnp.asarray(padded[cut][None]))
        total[cut] += np.asarray(values * weights)[0, ..., 0]
        count[cut] += np.asarray(weights)[0, ..., 0]
    own = tuple(slice(low, low + n) for (low, _), n in zip(tiling.pad, array.shape, strict=False))
    np.testing.assert_allclose(result.maps["tokens"][0], total[own] / count[own], rtol=1e-3)


def test_an_evaluation_with_other_settings_learns_anew_and_predictions_read_it(run, tmp_path):
    name, folder, config = run
    if name != "amae":
        pytest.skip("alike for all")
    other = [f"--workdir={folder}", "--config.evaluation.tokens=gaussian"]
    image = next(row.image[0] for row in load_cases(config).rows if row.split == "test")
    ask = lambda out: exit_code(predict.main, [*other, f"--out={tmp_path / out}", image])
    assert ask("early") == 2  # nothing has been learned under these settings
    assert exit_code(evaluate.main, [*other, f"--out={tmp_path / 'evaluation'}"]) == 0
    assert ask("late") == 0
    with open(tmp_path / "evaluation" / "scores.csv") as file:
        expected = [float(line["score"]) for line in csv.DictReader(file)]
    with open(tmp_path / "late" / "scores.csv") as file:
        (found,) = [float(line["score"]) for line in csv.DictReader(file)]
    assert min(abs(found / value - 1) for value in expected) < 1e-4
    assert len(list((folder / "fitted").iterdir())) == 2


@pytest.mark.parametrize(
    "changes, words",
    [
        (["evaluation.score=tokens"], "set evaluation.tokens"),
        (["evaluation.tokens=position", "evaluation.ring=9"], "ring 9 leaves no token"),
        (["evaluation.tokens=position", "evaluation.layer=9"], "layer 9: the encoder has 3 blocks"),
        (["evaluation.tokens=position", "evaluation.score=tokens", "select=aucp"], "only after the training"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(changes, words):
    config, _ = recipe.parse(["--config=configs/memmc_mae.py:smoke", *(f"--config.{c}" for c in changes)], "")
    with pytest.raises(InputError, match=words):
        load_system(config)


@pytest.mark.parametrize("name", RUNS)
def test_the_paper_s_presets_have_no_such_score(name):
    config, _ = recipe.parse([f"--config=configs/{name}.py:paper"], "")
    assert config.evaluation.tokens == "none" and not load_system(config).fits


@pytest.mark.long
def test_published_weights_serve_the_score_without_training(small_set, tmp_path):
    file = Path(__file__).parent / "golden" / "mae2d.npz"
    network = read_weights(file).config()
    text = lambda value: ",".join(map(str, value)) if isinstance(value, tuple) else value
    keys = ("channels", "width", "depth", "heads", "decoder_width", "decoder_depth", "decoder_heads")
    sizes = [f"model.{key}={network[key]}" for key in keys]
    sizes += [f"data.size={text(network['size'])}", f"model.patch={text(network['patch'])}", f"model.weights={file}"]
    assert exit_code(train.main, arguments("amae", tmp_path / "run", small_set, *sizes)) == 0
    figures = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert figures["primary"] == "tokens" and figures["image"]["auroc"] is not None
    history = tmp_path / "run" / "metrics.jsonl"
    assert not history.is_file() or not history.read_text()  # no step was taken
