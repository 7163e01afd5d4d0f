"""MAEMI against its specification: the paper's sizes, its procedure in NumPy and SciPy, a run on NIfTI files."""

import csv
import gzip
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from drawn import first_state
from patients import AFFINE, COLUMNS, arguments, write_patients, write_rows
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score
from sweeping import sweeper

from jmae import evaluate, passes, recipe, train
from jmae.data import phantoms
from jmae.data.cases import load_rows
from jmae.data.preparation import PLS, case_words, prepared_volume
from jmae.data.volumes import boxes_mask
from jmae.errors import InputError, exit_code
from jmae.fitting import restore_results
from jmae.inference import Scorer
from jmae.masked import training
from jmae.masking import case_keys, order_of
from jmae.patches import patchify, unpatchify
from jmae.run_folder import read_history
from jmae.system import load_system, masked_autoencoder
from jmae.systems.maemi import released_positions

GOLDEN = Path(__file__).parent / "golden"


def config(preset="smoke", **changes):
    c, _ = recipe.parse([f"--config=configs/maemi.py:{preset}"], "")
    c.update_from_flattened_dict(changes)
    return c


# --- the paper's sizes ------------------------------------------------------------------------------------------------


def test_the_paper_preset_has_the_papers_parameter_counts():
    c = config("paper")
    init, _ = masked_autoencoder(c, c.data.channels)
    params = jax.eval_shape(init, jax.random.key(0))[0]
    count = lambda tree: sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    encoder = count([params[name] for name in ("class_token", "patch_embed", "encoder", "encoder_norm")])
    assert encoder == 85_254_144
    assert count(params) - encoder == 7_492_864
    assert count(params["encoder"]) == 12 * 7_087_872 and count(params["decoder"]) == 4 * 1_774_464


def test_the_paper_preset_has_the_papers_schedule():
    c = config("paper")
    (stage,) = load_system(c).stages
    steps = stage.steps(744)
    assert (steps, stage.batch) == (124_000, 6)
    nothing = lambda *_: None
    lr = training(c.train, mae_of=nothing, view=nothing, patch=()).schedule(steps)
    for epoch in (0, 3.5, 7, 500, 1000):
        rising = 1e-3 * epoch / 7
        falling = 1e-4 + 0.9e-3 * 0.5 * (1 + np.cos(np.pi * (epoch - 7) / 993))
        assert lr(jnp.float32(epoch * 124)) == pytest.approx(rising if epoch < 7 else falling, rel=1e-4, abs=1e-9)


def test_the_released_codes_are_those_of_the_released_state():
    with np.load(GOLDEN / "mae3d.npz") as gold:
        grid = tuple((gold["img_size"] // gold["patch_size"]).tolist())
        for name in ("pos_embed", "decoder_pos_embed"):
            code = gold[f"state/{name}"][0, 1:]
            np.testing.assert_allclose(released_positions(grid, code.shape[1]), code, atol=1e-6)


@pytest.mark.parametrize(
    "setting, value, words",
    [
        ("evaluation.stride", (64, 42), "3 values"),
        ("evaluation.stride", (33, 8, 4), "evaluation.stride"),
        ("data.axes", "PLX", "data.axes"),
        ("data.spacing", (2.0, 2.0), "data.spacing"),
        ("compat.averaging", True, "compat.averaging"),
        ("evaluation.mask_ratio", 0.99, "mask ratio"),
        ("model.patch", (7, 8, 2), "not divisible by patch"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(setting, value, words):
    with pytest.raises(InputError, match=words):
        load_system(config(**{setting: value}))


# --- training ---------------------------------------------------------------------------------------------------------


def tiny(**changes):
    small = {"data.size": (8, 12, 4), "model.patch": (4, 4, 2), "model.width": 24, "model.heads": 2, "model.depth": 1}
    small |= {
        "model.decoder_width": 12,
        "model.decoder_heads": 2,
        "evaluation.stride": (4, 6, 2),
        "train.mask_ratio": 0.5,
    }
    small |= {"evaluation.mask_ratio": 0.5, "evaluation.batch": 5, "evaluation.repeats": 2}
    small |= {"evaluation.masks_of": "case", "evaluation.error": "all", "evaluation.filter": (3, 3, 2)}
    c = config(**(small | changes))
    system = load_system(c)
    return c, system, first_state(system.stages[0], {}, 4)


@pytest.mark.long
def test_training_images_are_clipped_and_mirrored_on_the_first_two_axes():
    c, system, state = tiny(**{"data.clip": (0.25, 0.75)})
    step = jax.jit(partial(system.stages[0].step, steps=10))
    batch = lambda image: {"image": image, "index": np.arange(1, dtype=np.int32), "case": np.zeros((1, 2), np.uint32)}
    image = np.random.default_rng(0).uniform(-1, 2, (1, 8, 12, 4, 2)).astype(np.float32)
    loss = lambda image, key: float(step(state, batch(image), key, {})[1]["loss"])
    clipped = np.clip(image, 0.25, 0.75)
    mirrors = {(a, b): clipped[:, :: 1 - 2 * a, :: 1 - 2 * b] for a in (0, 1) for b in (0, 1)}
    plain, seen = jax.jit(partial(plain_loss, c)), set()
    for i in range(12):
        key, found = jax.random.key(i), loss(image, jax.random.key(i))
        assert found == loss(clipped, key)
        # The mirror that the step draws makes a mirrored copy the image itself, and nothing else does.
        values = {m: float(plain(x, state.params, key)) for m, x in mirrors.items()}
        (match,) = [m for m, value in values.items() if abs(value - found) < 1e-6]
        seen.add(match)
    assert seen == set(mirrors)


def plain_loss(c, image, params, key):
    """The masked loss of the image as it is, under the mask of the sample's own key."""
    mask = jax.random.fold_in(jax.random.split(jax.random.fold_in(key, 0))[0], 0)  # sample 0, its mask 0
    patches = patchify(image, (4, 4, 2))
    kept = patches.shape[1] // 2
    keep, restore = order_of(jax.random.uniform(mask, (1, patches.shape[1])), kept)
    error = ((masked_autoencoder(c, 2)[1](params)(patches, keep, restore) - patches) ** 2).mean(-1)[0]
    return jnp.sum(jnp.where(restore[0] >= kept, error, 0)) / kept


# --- the test-time procedure, in plain NumPy and SciPy ----------------------------------------------------------------


def procedure(c, mae, volume, midline, case):
    """Section 5 of the specification for one volume (*size, c) cut at `midline` of its second axis: one window at a
    time, SciPy's filters, in float64; the network and its masks are those of the library."""
    window, stride, repeats = c.data.size, c.evaluation.stride, c.evaluation.repeats
    pad = [[max(0, w - n) // 2, max(0, w - n) - max(0, w - n) // 2] for n, w in zip(volume.shape, window, strict=False)]
    pad[1] = [max(0, window[1] - midline), max(0, window[1] - (volume.shape[1] - midline))]
    padded = np.pad(volume, [*pad, (0, 0)])
    middle = midline + pad[1][0]
    ends = lambda w, n, s: [*range(w, n, s), n]
    total, count = np.zeros(padded.shape), np.zeros((*padded.shape[:3], 1))
    key = case_keys(jax.random.key(c.seed), case_words(case)[None])[0]
    tokens = int(np.prod([w // p for w, p in zip(window, c.model.patch, strict=True)]))
    for sweep in range(repeats):
        number = 0
        for first, last in ((0, middle), (middle, padded.shape[1])):
            for p in ends(window[0], padded.shape[0], stride[0]):
                for l in ends(window[1], last - first, stride[1]):  # noqa: E741
                    for s in ends(window[2], padded.shape[2], stride[2]):
                        at = tuple(slice(e - w, e) for e, w in zip((p, first + l, s), window, strict=True))
                        image = np.clip(padded[at], *c.data.clip)
                        noise = jax.random.uniform(
                            jax.random.fold_in(jax.random.fold_in(key, sweep), number), (1, tokens)
                        )
                        kept = int(tokens * (1 - c.evaluation.mask_ratio))
                        order = np.argsort(np.asarray(noise), 1)
                        patches = patchify(image[None], c.model.patch)
                        prediction = mae(patches, order[:, :kept], np.argsort(order, 1))
                        difference = image - np.asarray(unpatchify(prediction, window, c.model.patch))[0]
                        smallest = partial(ndimage.minimum_filter, size=c.evaluation.filter)
                        error = [smallest(difference[..., k] ** 2) for k in (0, 1)]
                        weight = np.ones((*window, 1))
                        if c.evaluation.error == "hidden":  # the tokens that come behind the kept ones
                            absent = np.argsort(order, 1)[0] >= kept
                            grid = [w // p for w, p in zip(window, c.model.patch, strict=True)]
                            absent = np.kron(absent.reshape(grid), np.ones(c.model.patch)) > 0
                            weight = np.where(absent, 1, 1e-6)[..., None]
                            for k in (0, 1):  # the smallest error of the hidden voxels around a hidden voxel
                                of_hidden = smallest(np.where(absent, difference[..., k] ** 2, np.inf))
                                error[k] = np.where(absent, of_hidden, error[k])
                        total[at] += np.stack(error, -1) * weight
                        count[at] += weight
                        number += 1
    each = total / count
    fused = ndimage.minimum_filter(each.mean(-1), c.evaluation.filter)
    return fused[tuple(slice(low, n - high) for (low, high), n in zip(pad, fused.shape, strict=True))]


@pytest.mark.parametrize("rule", ["all", "hidden"])
@pytest.mark.parametrize("shape, midline", [((13, 27, 7), 14), ((9, 19, 3), 9)])
def test_a_map_is_that_of_the_papers_procedure(rule, shape, midline):
    c, system, state = tiny(**{"evaluation.error": rule})
    _, mae_of = masked_autoencoder(c, c.data.channels)
    array = np.random.default_rng(3).normal(0.5, 0.6, (*shape, 2)).astype(np.float32)
    run = sweeper(c, system.sweep, {"train": {"params": state.params, "stats": {}}})
    found = run(prepared_like(array, midline), "a case")["maps"]["maemi"][0]
    mae = jax.jit(lambda *arguments: mae_of(state.params)(*arguments))
    expected = procedure(c, mae, array, midline, "a case")
    assert found.shape == shape and expected.max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def prepared_like(array, midline):
    """A prepared volume as far as the sweep looks at it."""
    return SimpleNamespace(array=array, side=1, midline=midline)


# --- a run on NIfTI files ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patients")
    return write_patients(folder)


@pytest.fixture(scope="module")
def run(patients, tmp_path_factory):
    """The folder of a run on `patients`."""
    workdir = tmp_path_factory.mktemp("maemi") / "run"
    assert exit_code(train.main, arguments(patients, workdir)) == 0
    return workdir


def result(workdir: Path) -> dict:
    return json.loads((workdir / "evaluation" / "metrics.json").read_text())


def rows_of(run: Path, split: str) -> list:
    return [row for row in load_rows(recipe.read(run), lambda line: None) if row.split == split]


def truth(row) -> tuple[np.ndarray, np.ndarray]:
    """(lesion, region) of a case from its files."""
    load = lambda file: np.asarray(nib.load(file).dataobj) > 0
    region = load(row.region)
    lesion = load(row.mask) if row.mask else np.zeros(region.shape, bool)
    for box in row.boxes:
        lesion[tuple(slice(int(a), int(b)) for a, b in zip(box[:3], box[3:], strict=True))] = True
    return lesion, region


def test_maps_and_reconstructions_lie_on_the_patients_own_grid(run):
    for row in rows_of(run, "test"):
        image = nib.load(row.image[0])
        own = nib.load(run / "evaluation" / "maps" / f"{row.id}_anomaly.nii.gz")
        np.testing.assert_array_equal(own.affine, image.affine)
        assert own.shape == image.shape and own.get_data_dtype() == np.float32
        assert (np.asarray(own.dataobj) >= 0).all() and np.asarray(own.dataobj).any()
        back = nib.load(run / "evaluation" / "maps" / f"{row.id}_recon.nii.gz")
        np.testing.assert_array_equal(back.affine, image.affine)
        assert back.shape == (*image.shape, 2)


def test_voxel_figures_follow_from_the_written_maps_inside_the_region(run):
    found, labels, scores = result(run), [], []
    for row, own in zip(rows_of(run, "test"), found["per_patient"], strict=True):
        lesion, region = truth(row)
        values = np.asarray(nib.load(run / "evaluation" / "maps" / f"{row.id}_anomaly.nii.gz").dataobj)[region]
        labels.append(lesion[region])
        scores.append(values)
        assert own["patient"] == row.patient
        assert own["prevalence"] == pytest.approx(lesion[region].mean())
        if lesion.any():
            assert own["auroc"] == pytest.approx(roc_auc_score(lesion[region], values))
            assert own["ap"] == pytest.approx(average_precision_score(lesion[region], values))
        else:
            assert own["auroc"] is None
    means, with_lesion = found["patient_means"], [p for p in found["per_patient"] if p["auroc"] is not None]
    for name in ("auroc", "ap", "prevalence"):
        low, high = means["maemi"][f"{name}_ci"]
        assert means["maemi"][name] == pytest.approx(np.mean([p[name] for p in with_lesion]))
        assert low <= means["maemi"][name] <= high
    contrasted = [p["baselines"]["subtraction"]["ap"] for p in with_lesion if "subtraction" in p["baselines"]]
    assert means["subtraction"]["n"] == len(contrasted) < means["maemi"]["n"] == 3
    assert means["subtraction"]["ap"] == pytest.approx(np.mean(contrasted))
    everything = np.concatenate(labels), np.concatenate(scores)
    assert found["pixel"]["auroc"] == pytest.approx(roc_auc_score(*everything))
    assert found["pixel"]["ap"] == pytest.approx(average_precision_score(*everything))
    assert found["pixel"]["prevalence"] == pytest.approx(everything[0].mean())
    low = {name.removeprefix("low ") for name in found["baselines"] if ": " not in name}  # but for the rivals
    assert low == {"brightness of channel 0", "brightness of channel 1", "PCA-30 error", "subtraction"}
    standard = lambda x: (x - x.mean()) / x.std()
    brightness = [standard(np.asarray(nib.load(r.image[0]).dataobj))[truth(r)[1]] for r in rows_of(run, "test")]
    auroc = roc_auc_score(everything[0], np.concatenate(brightness))
    (name,) = [name for name in found["baselines"] if name.endswith("channel 0")]
    assert found["baselines"][name]["pixel"]["auroc"] == pytest.approx(max(auroc, 1 - auroc))
    assert name.startswith("low ") == (auroc < 0.5)


def test_the_subtraction_image_is_equation_1_over_the_cases_that_have_its_series(run):
    labels, values = [], []
    standard = lambda x: (x - x.mean()) / x.std() * 0.25
    for row in rows_of(run, "test"):
        if not row.pre:
            continue
        pre, *posts = (np.asarray(nib.load(file).dataobj, np.float64) for file in (*row.pre, *row.post))
        squared = np.mean([(standard(pre) - standard(post)) ** 2 for post in posts], 0)
        working = squared.transpose(2, 0, 1)[::-1]  # to posterior, left, superior
        filtered = ndimage.minimum_filter(working, (3, 3, 2))[::-1].transpose(1, 2, 0)
        lesion, region = truth(row)
        labels.append(lesion[region])
        values.append(filtered[region])
    found = result(run)["baselines"]["subtraction"]["pixel"]
    assert found["auroc"] == pytest.approx(roc_auc_score(np.concatenate(labels), np.concatenate(values)), abs=1e-3)
    assert len(labels) == 4


def test_the_variance_explained_of_held_out_normals_is_logged_and_they_still_calibrate(run):
    lines = [line for line in read_history(run / "metrics.jsonl") if "explained_variance_0" in line]
    assert [line["step"] for line in lines] == [4, 6] and all("explained_variance_1" in line for line in lines)
    assert json.loads((run / "calibration.json").read_text())["n"] == 2
    page = (run / "evaluation" / "report.html").read_text()
    shares = " and ".join(f"{lines[-1][f'explained_variance_{c}']:.2f}" for c in (0, 1))
    assert f"of the variance of hidden voxels at step 6: {shares} (in the order of the channels)." in page


def test_the_report_shows_all_channels_a_masked_window_the_subtraction_and_the_map_within_the_region(run):
    page = (run / "evaluation" / "report.html").read_text()
    names = "channel 1", "the reconstruction of channel 1", "the subtraction image", "Map where it counts"
    for name in (
        *names,
        *(f"{n} window of channel {c}" for n in ("a", "the masked", "the reconstructed") for c in (0, 1)),
    ):
        assert f'alt="{name} of case test11' in page, name


def test_a_picture_of_a_window_is_what_its_mask_left_of_it(run):
    c = recipe.read(run)
    system = load_system(c)
    scorer = Scorer(c, system, restore_results(c, system, run))
    case = scorer.prepare(rows_of(run, "test")[3])
    found = scorer.example(case, (5, 3, 6))
    assert set(found) == {
        f"{n} window of channel {k}" for n in ("a", "the masked", "the reconstructed") for k in (0, 1)
    }
    clipped = np.clip(case.array, *c.data.clip)
    for k in (0, 1):
        window, masked = found[f"a window of channel {k}"][..., 0], found[f"the masked window of channel {k}"][..., 0]
        places = [
            (i, j)
            for i in range(clipped.shape[0] - 7)
            for j in range(clipped.shape[1] - 7)
            if np.array_equal(clipped[i : i + 8, j : j + 8, 6, k], window)
        ]
        ((i, j),) = places
        assert i <= 5 < i + 8 and j <= 3 < j + 8 and j + 8 <= case.volume.midline  # around the voxel, in its half
        absent = masked != window
        assert (masked[absent] == 0).all()
        tokens = absent.reshape(2, 4, 2, 4).mean((1, 3))
        assert set(tokens.ravel()) <= {0, 1}  # whole patches of 4 x 4


def test_a_case_alone_has_the_map_that_it_has_among_others(run, patients, tmp_path):
    with open(patients, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["id"] in ("train00", "test11")]
    manifest = write_rows(patients.with_name("alone.csv"), rows)
    assert exit_code(evaluate.main, [f"--workdir={run}", f"--manifest={manifest}", f"--out={tmp_path}"]) == 0
    one, other = (nib.load(f / "maps" / "test11_anomaly.nii.gz") for f in (tmp_path, run / "evaluation"))
    np.testing.assert_allclose(one.dataobj, other.dataobj, rtol=1e-4, atol=1e-6)


def test_the_prepared_case_and_the_sweep_make_the_written_map_and_reconstruction(run):
    c = recipe.read(run)
    system = load_system(c)
    sweep = sweeper(c, system.sweep, restore_results(c, system, run))
    row = rows_of(run, "test")[3]
    volume = prepared_volume(row, c.data)
    assert volume.side == 1 and volume.midline == 9
    out = sweep(volume, row.id)
    written = nib.load(run / "evaluation" / "maps" / f"{row.id}_anomaly.nii.gz")
    np.testing.assert_allclose(written.dataobj, volume.grid.back(out["maps"]["maemi"][0]), rtol=1e-4, atol=1e-6)
    picture = nib.load(run / "evaluation" / "maps" / f"{row.id}_recon.nii.gz")
    for c, file in enumerate(row.image):  # back in the file's own values
        stored, found = np.asarray(nib.load(file).dataobj, float), np.asarray(picture.dataobj)[..., c]
        normal = volume.grid.back(out["reconstruction"][0, ..., c])
        np.testing.assert_allclose((found - stored.mean()) / stored.std() * 0.25 + 0.5, normal, atol=1e-4)


@pytest.mark.long
def test_an_evaluation_may_have_other_settings_than_the_run_s(run, tmp_path, capfd):
    given = [f"--workdir={run}", f"--out={tmp_path}", "--config.evaluation.repeats=1"]
    assert exit_code(evaluate.main, given) == 0
    one, other = (nib.load(f / "maps" / "test11_anomaly.nii.gz").dataobj for f in (tmp_path, run / "evaluation"))
    assert not np.array_equal(one, other)
    for wrong in ("--config.data.size=4,4,4", "--config.evaluation.repeat=1", "--config=configs/maemi.py"):
        assert exit_code(evaluate.main, [f"--workdir={run}", wrong]) == 2
        assert "config.evaluation." in capfd.readouterr().err.splitlines()[-1]


def test_every_baseline_s_map_gives_its_case_a_score_as_the_system_s_does(run):
    found = result(run)
    baselines = {name.removeprefix("low "): b["image"] for name, b in found["baselines"].items()}
    rivals = {f"{name}: maemi" for name in ("80 components", "blur", "5 nearest normals")}
    cheap = {"brightness of channel 0", "brightness of channel 1", "PCA-30 error", "subtraction"}
    assert set(baselines) == cheap | rivals and all(baselines[name] for name in rivals)
    assert rivals <= set(found["patient_means"]) and all(found["baselines"][name]["pixel"] for name in rivals)
    assert list(found["explained"]) == ["the network", "80 components", "blur", "5 nearest normals"]
    assert baselines.pop("subtraction") is None  # not every case has its series
    scores, labels = {0: [], 1: []}, []
    for row in rows_of(run, "test"):
        labels.append(row.label)
        for c in (0, 1):
            stored = np.asarray(nib.load(row.image[c]).dataobj)
            values = np.sort(((stored - stored.mean()) / stored.std())[truth(row)[1]])
            scores[c].append(values[-max(1, round(0.01 * values.size)) :].mean())
    for c in (0, 1):
        low = f"low brightness of channel {c}" in found["baselines"]
        auroc = roc_auc_score(labels, scores[c])
        if not low:
            assert found["baselines"][f"brightness of channel {c}"]["image"]["auroc"] == pytest.approx(auroc)


def test_two_cases_of_one_bucket_share_a_program_and_little_memory_gives_the_same_map(run, monkeypatch):
    c = recipe.read(run)
    system = load_system(c)
    lowered, real = [], passes.fitting

    def counted(lower, batch, limit=None, **named):
        lowered.append(real(lower, batch, limit, **named)[1])
        return real(lower, batch, limit, **named)

    monkeypatch.setattr(passes, "fitting", counted)
    results = restore_results(c, system, run)
    rng, sweep = np.random.default_rng(0), sweeper(c, system.sweep, results)
    volumes = [
        prepared_like(rng.normal(0.5, 0.3, (*size, 2)).astype(np.float32), 9) for size in ((13, 19, 7), (15, 20, 8))
    ]
    one, _ = (sweep(volume, "x")["maps"]["maemi"][0] for volume in volumes)
    assert lowered == [16]
    small = sweeper(c, system.sweep, results)
    monkeypatch.setattr(passes, "fitting", lambda lower, batch, **_: (lower(2).compile(), 2))
    np.testing.assert_allclose(small(volumes[0], "x")["maps"]["maemi"][0], one, rtol=1e-4, atol=1e-6)


def test_a_region_that_is_derived_counts_in_the_figures_too(run, patients, tmp_path):
    with open(patients, newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] != "val"]
    for row in rows:  # an image with air around it, and no region
        for k, name in enumerate(row["image"].split(";")):
            image = nib.load(patients.with_name(name))
            array = np.asarray(image.dataobj, np.float32) + 1
            array[:4] = 0
            nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / f"{row['id']}-{k}.nii.gz")
        for column in ("mask", "pre", "post"):
            row[column] = ";".join(str(patients.with_name(n)) for n in row[column].split(";") if n)
        row |= {"image": f"{row['id']}-0.nii.gz;{row['id']}-1.nii.gz", "region": ""}
    c = recipe.read(run)
    c.data.manifest, c.data.region = str(write_rows(tmp_path / "manifest.csv", rows)), "nonzero"
    c.data.allow_leaks = True  # noise beside one hard edge of air is like noise beside another
    chosen = load_rows(c, lambda line: None)
    found = evaluate.evaluate(c, load_system(c), chosen, run, split="test", out=tmp_path / "out")
    for row, own in zip([r for r in chosen if r.split == "test"], found["per_patient"], strict=True):
        inside = np.asarray(nib.load(row.image[0]).dataobj) != 0
        lesion = np.zeros(inside.shape, bool)
        if row.mask or row.boxes:
            lesion = np.asarray(nib.load(row.mask).dataobj) > 0 if row.mask else boxes_mask(row.boxes, inside.shape)
        assert own["prevalence"] == pytest.approx(lesion[inside].mean())


def test_what_is_scored_does_not_depend_on_its_lesion_but_as_published(run):
    c = recipe.read(run)
    c.data.crop, c.data.crop_least, c.data.crop_most, c.data.crop_margin = "region", (1.0,) * 3, (12.0,) * 3, 6.0
    row = next(row for row in rows_of(run, "test") if row.mask)
    blank = row._replace(mask=None, label=None)
    with_lesion, without = (prepared_volume(r, c.data).array for r in (row, blank))
    np.testing.assert_array_equal(with_lesion, without)
    c.data.widen_test_crops = True
    assert prepared_volume(row, c.data).array.shape != without.shape


def test_what_is_wrong_with_a_test_case_is_said_before_training(patients, tmp_path, capfd):
    with open(patients, newline="") as file:
        rows = list(csv.DictReader(file))
    next(row for row in rows if row["id"] == "test01")["midline"] = "400"
    manifest = write_rows(patients.with_name("outside.csv"), rows)
    assert exit_code(train.main, arguments(manifest, tmp_path / "run")) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "test01" in said[0] and "midline 400" in said[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.long
def test_a_resumed_run_ends_as_the_uninterrupted_one(run, patients, tmp_path):
    first = arguments(patients, tmp_path / "cut", "data.crops_on=host")
    with pytest.MonkeyPatch.context() as patch:
        real, seen = train.add_history, []

        def stop(*given):
            seen.append(given)
            if len(seen) == 3:
                raise KeyboardInterrupt
            real(*given)

        patch.setattr(train, "add_history", stop)
        assert exit_code(train.main, first) == 130
    assert exit_code(train.main, first) == 0
    assert result(tmp_path / "cut")["pixel"] == result(run)["pixel"]


@pytest.mark.long
def test_the_released_masked_autoencoder_is_what_training_starts_from(patients, tmp_path, capfd):
    with np.load(GOLDEN / "mae3d.npz") as gold:
        sizes = {k: gold[k] for k in ("depth", "decoder_depth", "decoder_num_heads", "num_heads")}
        first = gold["state/blocks.0.mlp.fc1.weight"].T, gold["state/decoder_pred.weight"].T
    sizes = {f"model.{k.replace('num_heads', 'heads')}": v for k, v in sizes.items()}
    sizes |= {"model.width": 36, "model.decoder_width": 24, "data.size": "32,24,4", "model.patch": "8,8,2"}
    sizes |= {"evaluation.stride": "8,8,2", "train.steps": 1, "train.lr": 1e-30, "model.weights": GOLDEN / "mae3d.npz"}
    changes = [f"{k}={v}" for k, v in sizes.items()]
    for part, more in (("blocks", []), ("mae", ["compat.position=true"])):
        workdir = tmp_path / part
        given = arguments(patients, workdir, *changes, f"model.weights_part={part}", *more)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "evaluate", lambda *_, **__: None)
            assert exit_code(train.main, given) == 0
        system = load_system(recipe.read(workdir))
        params = restore_results(recipe.read(workdir), system, workdir)["train"]["params"]
        np.testing.assert_allclose(params["encoder"]["stack"]["fc1"]["kernel"][0], first[0], atol=1e-7)
        same = np.allclose(params["predict"]["kernel"], first[1], atol=1e-7)
        assert same == (part == "mae")
        assert "loaded" in (workdir / "weights.txt").read_text()
    refused = arguments(patients, tmp_path / "no", *changes, "model.weights_part=mae")
    assert exit_code(train.main, refused) == 2
    assert "mae3d.npz" in capfd.readouterr().err.splitlines()[-1]


# --- faults -----------------------------------------------------------------------------------------------------------


def break_file(file: Path, fault: str) -> None:
    image = nib.load(file)
    array = np.asarray(image.dataobj, np.float32)
    if fault == "a NaN voxel":
        array[3, 2, 1] = np.nan
        nib.save(nib.Nifti1Image(array, AFFINE), file)
    elif fault == "a singular affine":
        raw = bytearray(gzip.decompress(file.read_bytes()))
        raw[252:256] = np.array([0, 1], "<i2").tobytes()  # no qform; an sform
        raw[296:312] = raw[280:296]  # whose second row is its first
        file.write_bytes(gzip.compress(bytes(raw)))
    elif fault == "another size":
        nib.save(nib.Nifti1Image(array[:-1], AFFINE), file)
    elif fault == "a lying header":
        raw = bytearray(gzip.decompress(file.read_bytes()))
        raw[42:48] = np.array([32000] * 3, "<i2").tobytes()
        file.write_bytes(gzip.compress(bytes(raw)))
    elif fault == "a cut":
        file.write_bytes(file.read_bytes()[:-200])
    else:
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 4
        file.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    "fault, words",
    [
        ("a NaN voxel", "1 values are not finite"),
        ("a singular affine", "affine is singular"),
        ("another size", "resample"),
        ("a lying header", "32000"),
        ("a cut", ""),
        ("a flipped bit", ""),
        ("a malformed series", "series"),
    ],
)
def test_a_fault_in_a_file_is_one_line_and_nothing_is_trained(fault, words, tmp_path, capfd):
    manifest = write_patients(tmp_path)
    file = tmp_path / "train01-b.nii.gz"
    if fault == "a malformed series":
        file.unlink()
        file.mkdir()  # a folder without one DICOM file
        (file / "notes.txt").write_text("no image")
    else:
        break_file(file, fault)
    assert exit_code(train.main, arguments(manifest, tmp_path / "run")) == 2
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and str(file) in said[0] and words in said[0]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.long
def test_the_paper_preset_takes_two_steps_on_phantoms(tmp_path):
    """Crops of 240 x 168 x 8 at 0.75 x 0.75 x 1 mm in 2520 patches, each in half a chest, from files of 3 mm phantoms.

    The network itself is small: ViT-B differs in its parameters' shapes alone."""
    rows = []
    for i in range(2):
        case = phantoms.draw("breast", "train", i)
        affine = PLS @ np.diag([*case.spacing, 1])
        for part, array in (("a", case.image[..., 0]), ("b", case.image[..., 1]), ("r", case.region)):
            nib.save(nib.Nifti1Image(array.astype(np.float32), affine), tmp_path / f"{i}-{part}.nii.gz")
        row = dict.fromkeys(COLUMNS, "") | {"id": f"case {i}", "split": "train", "label": 0, "midline": "middle"}
        rows.append(row | {"image": f"{i}-a.nii.gz;{i}-b.nii.gz", "region": f"{i}-r.nii.gz"})
    manifest = write_rows(tmp_path / "manifest.csv", rows)
    changes = f"data.manifest={manifest} train.epochs=0 train.steps=2 train.batch=1 log_every=1"
    changes = [*changes.split(), *"model.width=24 model.depth=1 model.heads=2".split()]
    changes += "model.decoder_width=12 model.decoder_depth=1 model.decoder_heads=2".split()
    given = ["--config=configs/maemi.py:paper", f"--workdir={tmp_path / 'run'}", *(f"--config.{c}" for c in changes)]
    assert exit_code(train.main, given) == 0
    losses = [line["loss"] for line in read_history(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 2 and np.isfinite(losses).all()
