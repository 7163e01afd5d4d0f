"""MAEMI beside its paper and its released code: what each amendment of the specification asks for."""

import csv
from pathlib import Path

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pytest
from patients import COLUMNS
from scipy import ndimage
from sweeping import sweeper
from test_maemi import config, prepared_like, tiny

from jmae import recipe
from jmae.data.cases import load_cases
from jmae.data.files import read_mask
from jmae.data.manifest import Row
from jmae.data.preparation import case_words, open_case, prepared_volume
from jmae.errors import InputError
from jmae.masking import case_keys
from jmae.nn.mae import float32_product
from jmae.patches import patchify, unpatchify
from jmae.system import masked_autoencoder
from jmae.systems.maemi import released_positions
from jmae.windows import released_room, tile

# --- the released averaging -------------------------------------------------------------------------------------------


def released_pad(img, shape):
    """`zero_pad` of the released inference/mae_predict.py."""
    padw = np.zeros((img.ndim, 2), int)
    for ax in range(img.ndim):
        diff = shape[ax] - img.shape[ax]
        if diff >= 0:
            padw[ax] = int(np.ceil(diff / 2)), diff // 2
    return np.pad(img, padw)


def released_slices(shape, window, stride, offset):
    """`SliceIterator` of the released inference/slices.py."""
    steps = [np.append(np.arange(w, n, s), n) for n, w, s in zip(shape, window, stride, strict=True)]
    for x in steps[0]:
        for y in steps[1]:
            for z in steps[2]:
                ends = [(int(e) + o, w) for e, o, w in zip((x, y, z), offset, window, strict=True)]
                yield tuple(slice(max(e - w, 0), e) for e, w in ends)


def released_map(img, window, stride, repeat, anomaly):
    """`get_anomaly_map` of the released inference/mae_predict.py for `img` (c, *size): (diff, the padded size).

    `anomaly(window (c, *window), repetition, number)` is its `compute_anomaly`.
    """
    img = released_pad(img, [len(img), window[0] + 1, 2 * window[1] + 1, window[2] + 1])
    diff, count = np.zeros(img.shape), np.ones(img.shape)
    for r in range(repeat):
        d, c, number = np.zeros(img.shape), np.ones(img.shape), 0
        half = list(img.shape[-3:])
        half[1] //= 2
        for offset in ([0, 0, 0], [0, half[1], 0]):
            for at in released_slices(half, window, stride, offset):
                d[:, *at] += anomaly(img[:, *at], r, number)
                c[:, *at] += 1
                number += 1
        d /= c
        diff += d
        count += c
    return diff / count, img.shape[1:]


@pytest.mark.parametrize("shape", [(8, 26, 5), (9, 19, 3), (13, 27, 7)])
@pytest.mark.long_but_first
def test_the_released_averaging_is_that_of_the_released_code(shape):
    c, system, state = tiny(**{f"compat.{name}": True for name in ("averaging", "clip", "position")})
    _, mae_of = masked_autoencoder(c, c.data.channels, positions=released_positions)
    mae, edges = jax.jit(lambda *given: mae_of(state.params)(*given)), c.evaluation.filter
    array = np.random.default_rng(3).normal(0.5, 0.6, (*shape, 2)).astype(np.float32)
    key, tokens = case_keys(jax.random.key(c.seed), case_words("a case")[None])[0], 2 * 3 * 2

    def anomaly(image, r, number):
        noise = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, r), number), (1, tokens))
        order = np.argsort(np.asarray(noise), 1)
        image = np.moveaxis(image, 0, -1)
        prediction = mae(patchify(image[None], c.model.patch), order[:, : tokens // 2], np.argsort(order, 1))
        difference = image - np.asarray(unpatchify(prediction, c.data.size, c.model.patch))[0]
        return np.stack([ndimage.minimum_filter(difference[..., k] ** 2, edges) for k in (0, 1)])

    given = np.moveaxis(array, -1, 0), c.data.size, c.evaluation.stride, c.evaluation.repeats
    diff, padded = released_map(*given, anomaly)
    fused = ndimage.minimum_filter(diff.mean(0), edges)
    low = [-(-(m - n) // 2) for m, n in zip(padded, shape, strict=True)]
    expected = fused[tuple(slice(a, a + n) for a, n in zip(low, shape, strict=True))]
    run = sweeper(c, system.sweep, {"train": {"params": state.params, "stats": {}}})
    found = run(prepared_like(array, shape[1] // 2), "a case")
    assert expected.max() > 1e-3
    np.testing.assert_allclose(found["maps"]["maemi"][0], expected, rtol=1e-4, atol=1e-7)


def test_the_released_padding_is_one_voxel_more_than_a_window_and_the_odd_one_comes_first():
    pad, middle = released_room((200, 300, 9), (240, 168, 8), 1, 150)
    assert pad == [(21, 20), (19, 18), (0, 0)] and middle == 168  # 337 voxels: the last is in neither half
    tiling = tile((200, 300, 9), (240, 168, 8), (64, 42, 2), side=1, midline=150, bucket=(1, 1, 1), released=True)
    assert tiling.size == (241, 337, 9) and tiling.coverage[1][-1] == 0 and (tiling.coverage[1][:-1] == 1).all()
    with pytest.raises(InputError, match="its midline is 150, not 140"):
        released_room((200, 300, 9), (240, 168, 8), 1, 140)


# --- the error --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_hidden_voxel_s_error_is_the_smallest_of_the_hidden_ones_in_its_box():
    _, system, state = tiny(**{"evaluation.error": "hidden"})
    image = np.random.default_rng(0).uniform(0.1, 1.4, (3, 8, 12, 4, 2)).astype(np.float32)
    keys = jax.random.split(jax.random.key(2), 3)
    values, weights = system.sweep.score({"train": {"params": state.params}}, image, keys, jnp.zeros(3, int))
    error, prediction, absent = values[..., :2], values[..., 2:], np.asarray(weights)[..., 0] == 1
    assert absent.mean() == 0.5
    squared = np.asarray((image - prediction) ** 2)
    for i in range(3):
        for k in range(2):
            of_hidden = ndimage.minimum_filter(np.where(absent[i], squared[i, ..., k], np.inf), (3, 3, 2))
            np.testing.assert_allclose(error[i, ..., k][absent[i]], of_hidden[absent[i]], rtol=1e-5)
            mixed = ndimage.minimum_filter(squared[i, ..., k], (3, 3, 2))
            assert (of_hidden[absent[i]] > mixed[absent[i]] + 1e-6).any()  # a visible neighbour was smaller
    assert np.isfinite(values).all()


@pytest.mark.long
def test_predictions_are_summed_in_float32_whatever_the_arithmetic():
    c, _, state = tiny(**{"model.dtype": "bfloat16"})
    _, mae_of = masked_autoencoder(c, 2)
    patches = np.random.default_rng(0).uniform(size=(2, 12, 64)).astype(np.float32)
    order = np.tile(np.arange(12), (2, 1))
    prediction = np.asarray(mae_of(state.params)(patches, order[:, :6], order))
    rounded = prediction.astype(jnp.bfloat16).astype(np.float32)
    assert prediction.dtype == np.float32 and (prediction != rounded).mean() > 0.9


def test_only_the_result_of_the_last_product_is_wider():
    x, kernel = (jax.random.normal(jax.random.key(i), s).astype(jnp.bfloat16) for i, s in enumerate([(5, 64), (64, 7)]))
    wide = lambda x, kernel: jnp.sum(float32_product(x, kernel) ** 2)
    exact = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64)
    np.testing.assert_allclose(float32_product(x, kernel), exact, rtol=1e-5, atol=1e-5)
    text = jax.jit(jax.grad(wide, (0, 1))).lower(x, kernel).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    operands = [line.split(":")[-1].split("->")[0] for line in products]
    assert len(products) == 3 and all("f32" not in one and "bf16" in one for one in operands)
    gradient = jax.grad(wide, (0, 1))(x, kernel)
    expected = jax.vjp(jnp.matmul, x, kernel)[1]((2 * float32_product(x, kernel)).astype(jnp.bfloat16))
    for got, want in zip(gradient, expected, strict=True):
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


@pytest.mark.long
def test_the_explained_variance_is_that_of_the_hidden_voxels():
    c, system, state = tiny()
    _, mae_of = masked_autoencoder(c, 2)
    image = np.random.default_rng(5).normal(0.5, 0.4, (7, 8, 12, 4, 2)).astype(np.float32)
    batch = {"image": image, "index": np.arange(7)}
    same, found = jax.jit(lambda state: system.stages[0].watch.look(state, batch, {}))(state)
    assert jax.tree.all(jax.tree.map(np.array_equal, same, state))
    clipped, hidden_voxels, errors = np.clip(image, *c.data.clip), [], []
    for i in range(7):
        noise = jax.random.uniform(jax.random.fold_in(jax.random.key(0), i), (1, 12))
        order = np.argsort(np.asarray(noise), 1)
        patches = np.asarray(patchify(clipped[i : i + 1], (4, 4, 2)))
        prediction = np.asarray(mae_of(state.params)(patches, order[:, :6], np.argsort(order, 1)))
        hidden_voxels.append(patches[0, order[0, 6:]].reshape(-1, 2))
        errors.append((prediction - patches)[0, order[0, 6:]].reshape(-1, 2))
    hidden_voxels, errors = np.concatenate(hidden_voxels), np.concatenate(errors)
    for k in (0, 1):
        expected = 1 - (errors[:, k] ** 2).mean() / hidden_voxels[:, k].var()
        assert float(found[f"explained_variance_{k}"]) == pytest.approx(expected, abs=1e-4)


def test_the_paper_s_authors_are_named():
    root = Path(__file__).parents[1]
    names = "Daniel M. Lang, Eli Schwartz, Cosmin I. Bercea, Raja Giryes, Julia A. Schnabel"
    for file in ("docs/explanation/maemi.md", "configs/maemi.py", "jmae/systems/maemi.py", "jmae/data/volumes.py"):
        text = " ".join((root / file).read_text(encoding="utf-8").split())
        assert names in text, file
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    for name in names.split(", "):
        assert f"family-names: {name.split()[-1]}" in citation


# --- the data ---------------------------------------------------------------------------------------------------------

PLS = np.array([[0, -1, 0], [-1, 0, 0], [0, 0, 1.0]])  # axes to posterior, left, superior


def centred(size, spacing, at=(0.0, 0.0, 0.0)):
    """The affine of a grid along P, L and S whose middle lies at `at`, mm along these axes."""
    affine = np.eye(4)
    affine[:3, :3] = PLS @ np.diag(spacing)
    affine[:3, 3] = PLS @ np.array(at) - affine[:3, :3] @ ((np.array(size) - 1) / 2)
    return affine


def nifti(file, array, affine):
    nib.save(nib.Nifti1Image(np.asarray(array, np.float32), affine), file)
    return str(file)


def own_voxels(affine, target, size):
    """Coordinates (3, *size) in the grid of `affine` of the voxels of another grid."""
    voxels = np.stack([*np.meshgrid(*map(np.arange, size), indexing="ij"), np.ones(size)])
    return np.einsum("ij,j...->i...", np.linalg.inv(affine) @ target, voxels)[:3]


def nearest(mask, at):
    """The values of a mask at coordinates, False outside."""
    index = np.floor(at + 0.5).astype(int)
    inside = np.all([(i >= 0) & (i < n) for i, n in zip(index, mask.shape, strict=True)], 0)
    return inside & mask[tuple(np.clip(i, 0, n - 1) for i, n in zip(index, mask.shape, strict=True))]


def paper(**changes):
    """The paper's preset on crops of 8 x 12 x 4 voxels of 1.5 mm."""
    small = {"data.size": (8, 12, 4), "model.patch": (4, 4, 2), "data.spacing": (1.5,) * 3, "data.crop_margin": 3.0}
    small |= {"data.crop_least": (9.0,) * 3, "data.crop_most": (60.0, 60.0, 60.0), "evaluation.stride": (4, 6, 2)}
    return config("paper", **(small | changes))


@pytest.fixture
def duke(tmp_path):
    """(files, grids) of a patient like Duke's: the first sequence has larger voxels; the second, the soft breast mask
    and the boxes share another grid."""
    rng, sizes = np.random.default_rng(0), ((20, 30, 12), (31, 45, 17))
    grids = centred(sizes[0], (2.1, 2.0, 2.2)), centred(sizes[1], (1.3, 1.25, 1.5), (1.0, -0.7, 0.4))
    files = {"nfs": nifti(tmp_path / "nfs.nii.gz", rng.normal(300, 40, sizes[0]), grids[0])}
    files["fs"] = nifti(tmp_path / "fs.nii.gz", rng.normal(100, 9, sizes[1]), grids[1])
    soft = np.full(sizes[1], 0.02)  # a sigmoid is nowhere 0
    soft[4:27, 3:42, 3:14] = 0.97
    files["region"] = nifti(tmp_path / "region.nii.gz", soft, grids[1])
    return files, grids, soft > 0.5


def row_of(files, **cells):
    extra = {"boxes_on": "2", "midline": "middle"} | cells.pop("extra", {})
    image = files["nfs"], files["fs"]
    return Row(
        "p1",
        "p1",
        cells.pop("split", "train"),
        cells.pop("label", 0),
        image,
        region=files["region"],
        boxes=((10, 28, 5, 15, 37, 9),),
        extra=extra,
        **cells,
    )


def test_a_mask_of_probabilities_is_cut_at_the_threshold(tmp_path):
    rng = np.random.default_rng(0)
    soft = 1 / (1 + np.exp(-rng.normal(0, 3, (6, 5, 4))))
    file = nifti(tmp_path / "soft.nii.gz", soft, np.eye(4))
    np.testing.assert_array_equal(read_mask(file), soft > 0.5)
    np.testing.assert_array_equal(read_mask(file, threshold=0.8), soft > 0.8)
    splines = nifti(tmp_path / "splines.nii.gz", 1.2 * soft - 0.1, np.eye(4))
    np.testing.assert_array_equal(read_mask(splines), 1.2 * soft - 0.1 > 0.5)
    for whole in (rng.integers(0, 3, (6, 5, 4)), 255.0 * (soft > 0.9), (soft > 0.5) * (1 - 1e-6)):
        file = nifti(tmp_path / "whole.nii.gz", whole, np.eye(4))
        np.testing.assert_array_equal(read_mask(file), np.asarray(whole) > 0)
    with pytest.raises(InputError, match=r"scaled.nii.gz: has fractional values from 0.*: save it as 0 and 1"):
        read_mask(nifti(tmp_path / "scaled.nii.gz", 255 * soft, np.eye(4)))


def test_that_masks_are_probabilities_is_said_once(duke, tmp_path):
    files, _, _ = duke
    rows = [dict.fromkeys([*COLUMNS, "boxes_on"], "") for _ in range(3)]
    for i, row in enumerate(rows):
        image = nifti(tmp_path / f"{i}.nii.gz", np.random.default_rng(i).normal(9, 2, (20, 30, 12)), duke[1][0])
        row |= {"id": f"p{i}", "patient": f"p{i}", "split": "train", "label": 0, "image": f"{image};{files['fs']}"}
        row |= {"region": files["region"]}
    manifest = tmp_path / "manifest.csv"
    with open(manifest, "w", newline="") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    said = []
    load_cases(paper(**{"data.manifest": str(manifest)}), said.append)
    assert sum("data.mask_threshold=0.5" in line for line in said) == 1
    assert "masks of probabilities in 3 cases" in " ".join(said)


def test_a_run_from_before_the_threshold_reads_masks_as_it_did(tmp_path):
    c = config()
    with c.unlocked():
        del c.data.mask_threshold
    assert recipe.brought_up(c).data.mask_threshold == 0


def test_every_sequence_is_interpolated_once(duke):
    files, grids, _ = duke
    volume = prepared_volume(row_of(files), c := paper().data)
    stored = (volume.array - c.mean) / c.std * volume.std + volume.mean
    for k, (name, grid) in enumerate(zip(("nfs", "fs"), grids, strict=True)):
        own = np.asarray(nib.load(files[name]).dataobj)
        at = own_voxels(grid, volume.grid.affine, volume.grid.size)
        expected = ndimage.map_coordinates(own, at, order=3, mode="nearest")
        outside = np.any([(a < -0.5) | (a > n - 0.5) for a, n in zip(at, own.shape, strict=True)], 0)
        np.testing.assert_allclose(stored[..., k], np.where(outside, 0, expected), atol=0.02)


def test_white_noise_of_a_sequence_on_the_working_grid_keeps_its_deviation(tmp_path):
    """The first sequence lies on another grid. Two interpolations, onto that grid and back, took a sixth and more."""
    size, fine = (20, 24, 16), (40, 48, 32)
    noise = np.random.default_rng(0).normal(100, 10, fine)
    first = nifti(tmp_path / "a.nii.gz", np.random.default_rng(1).normal(50, 9, size), centred(size, (1.5,) * 3))
    second = nifti(tmp_path / "b.nii.gz", noise, centred(fine, (0.75,) * 3))
    row = Row("p", "p", "test", 0, (first, second))
    c = paper(**{"data.crop": "none", "data.spacing": (0.75,) * 3}).data
    volume = prepared_volume(row, c)
    assert volume.grid.size == fine
    assert volume.std[1] == pytest.approx(noise.std(), rel=0.02)
    np.testing.assert_allclose((volume.array[..., 1] - 0.5) / 0.25 * volume.std[1] + volume.mean[1], noise, atol=0.02)
    third = nifti(tmp_path / "c.nii.gz", noise, centred(fine, (0.75,) * 3, (0.3, 0.2, 0.1)))  # between the voxels
    once = ndimage.map_coordinates(
        noise,
        own_voxels(centred(fine, (0.75,) * 3, (0.3, 0.2, 0.1)), volume.grid.affine, fine),
        order=3,
        mode="nearest",
    )
    shifted = prepared_volume(row._replace(image=(first, third)), c)
    assert shifted.std[1] == pytest.approx(once.std(), rel=0.02)


def test_masks_and_boxes_lie_on_their_own_grids(duke):
    files, grids, region = duke
    box = np.zeros(region.shape, bool)
    box[10:15, 28:37, 5:9] = True
    row, c = row_of(files), paper().data
    case = open_case(row, c)
    at = own_voxels(grids[1], grids[0], (20, 30, 12))
    np.testing.assert_array_equal(case.region, nearest(region, at))
    np.testing.assert_array_equal(case.lesion, nearest(box, at))
    volume = prepared_volume(row, c, case)
    at = own_voxels(grids[1], volume.grid.affine, volume.grid.size)
    np.testing.assert_array_equal(volume.region, nearest(region, at))
    assert volume.lesion[nearest(box, at)].all()  # and, as no voxel of a lesion is lost, a border of one voxel
    np.testing.assert_array_equal(volume.lesion, nearest(ndimage.maximum_filter(box, (3, 3, 3)), at))
    with pytest.raises(InputError, match=r"save the mask on the image's grid, or set data\.join=resample"):
        one = row_of(files, extra={"boxes_on": ""})._replace(image=row.image[:1])
        prepared_volume(one, paper(**{"data.join": "same", "data.channels": 1}).data)


def test_the_healthy_half_of_a_patient_with_a_lesion_in_the_other_is_a_training_row(duke, tmp_path):
    files, _, _ = duke
    columns = [*COLUMNS, "boxes_on", "half"]
    cells = dict.fromkeys(columns, "") | {"id": "p1", "patient": "p1", "split": "train", "label": 0, "half": "first"}
    cells |= {"image": f"{files['nfs']};{files['fs']}", "region": files["region"], "midline": "middle"}
    cells |= {"boxes": "10 28 5 15 44 9", "boxes_on": "2"}

    def volumes(**changes):
        with open(tmp_path / "manifest.csv", "w", newline="") as out:
            writer = csv.DictWriter(out, columns)
            writer.writeheader()
            writer.writerow(cells | changes)
        cases = load_cases(paper(**{"data.manifest": str(tmp_path / "manifest.csv")}), lambda line: None)
        return prepared_volume(cases.rows[0], cases.config.data)

    half = volumes()
    assert half.midline is None and not half.lesion.any()
    without = volumes(boxes="", boxes_on="")
    assert half.array.shape[1] > without.array.shape[1]  # the crop of both halves reaches to the lesion and beyond
    with pytest.raises(InputError, match=r"half 'second' has .* lesion voxels and the label 0: name the other half"):
        volumes(half="second")
    with pytest.raises(InputError, match="boxes of lesions and the label 0"):
        volumes(half="")
    with pytest.raises(InputError, match="boxes_on '3': write the number of a file of image"):
        volumes(boxes_on="3")
