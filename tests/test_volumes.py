"""The prepared volume against nibabel's orientation, SciPy's resampling and geometry worked out by hand."""

import contextlib
import gzip
import itertools
import tracemalloc

import nibabel as nib
import numpy as np
import pytest
from ml_collections import ConfigDict
from scipy import ndimage
from scipy.spatial.transform import Rotation

from jmae.data.files import Image, read_image, read_mask
from jmae.data.manifest import Row
from jmae.data.volumes import boxes_mask, chest_box, prepare, read_subtraction, read_volume, subtraction
from jmae.errors import InputError

RNG = np.random.default_rng(0)
ORIENTATIONS = [  # own axis i lies along RAS axis p[i], in the direction s[i]
    (p, s) for p in itertools.permutations(range(3)) for s in itertools.product((1, -1), repeat=3)
]


def config(**changes):
    data = ConfigDict()
    data.axes, data.spacing, data.join, data.crop = "PLS", (), "same", "none"
    data.crop_least, data.crop_most, data.crop_margin = (200.0, 200.0, 50.0), (350.0, 350.0, 100.0), 20.0
    data.region, data.normalise, data.mean, data.std = "", "crop", 0.5, 0.25
    data.window, data.equalise, data.widen_test_crops = (), False, False
    data.update(changes)
    return data


def rotation(degrees=20.0):
    return Rotation.from_euler("xyz", RNG.uniform(-degrees, degrees, 3), degrees=True).as_matrix()


def affine_of(orientation, spacing=(1.0, 1.0, 1.0), oblique=0.0):
    """Voxel -> RAS mm of own axes along `orientation`, about an arbitrary origin."""
    affine = np.eye(4)
    for i, (world, sign) in enumerate(zip(*orientation, strict=True)):
        affine[:3, i] = 0
        affine[world, i] = sign * spacing[i]
    affine[:3, :3] = rotation(oblique) @ affine[:3, :3]
    affine[:3, 3] = RNG.uniform(-50, 50, 3)
    return affine


def image_of(array, affine):
    array = np.ascontiguousarray(array, np.float32)
    array = array if array.ndim == 4 else array[..., None]
    spacing = None if affine is None else tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist())
    return Image(array, spacing, affine, None)


def world(affine, voxel):
    return (affine @ [*voxel, 1])[:3]


@contextlib.contextmanager
def refused(*words, name="case.nii"):
    """The one line with which something is refused: name, what, remedy."""
    with pytest.raises(InputError) as caught:
        yield
    line = str(caught.value)
    assert line.startswith(f"{name}: ") and "\n" not in line and line.count(": ") >= 2, line
    for word in words:
        assert word in line, line


# Grids


def test_sequences_and_masks_with_their_axes_in_another_order_are_turned_to_the_first(tmp_path):
    rng = np.random.default_rng(0)
    affine = np.array([[-2, 0.1, 0, 60], [0.1, 1.5, 0.2, -20], [0, 0.2, 3, 5], [0, 0, 0, 1]], float)
    first, second = rng.normal(size=(2, 9, 8, 7)).astype(np.float32)
    nib.save(nib.Nifti1Image(first, affine), tmp_path / "first.nii.gz")
    for axes in ("PIR", "LAS", "SAL", "RPI"):
        ornt = nib.orientations.axcodes2ornt(axes)
        other = nib.Nifti1Image(second, affine)
        other = other.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), ornt))
        nib.save(other, tmp_path / "second.nii.gz")
        nib.save(nib.Nifti1Image((other.get_fdata() > 0).astype(np.uint8), other.affine), tmp_path / "mask.nii.gz")
        image = read_image([tmp_path / "first.nii.gz", tmp_path / "second.nii.gz"])
        np.testing.assert_array_equal(image.array[..., 1], second)
        np.testing.assert_allclose(image.affine, affine, atol=1e-5)
        mask = read_mask(tmp_path / "mask.nii.gz", like=image)
        np.testing.assert_array_equal(mask, second > 0)
    moved = affine + np.array([[0, 0, 0, 5]] * 3 + [[0] * 4])
    nib.save(nib.Nifti1Image(second[::-1], moved), tmp_path / "moved.nii.gz")
    with pytest.raises(InputError, match="corners lie up to"):
        read_image([tmp_path / "first.nii.gz", tmp_path / "moved.nii.gz"])


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_reorientation_is_nibabels_and_copies_every_value(orientation):
    array, affine = RNG.normal(size=(4, 5, 6, 2)).astype("f4"), affine_of(orientation, (1, 2, 3), oblique=20)
    ras = nib.as_closest_canonical(nib.Nifti1Image(array, affine))
    grid = prepare(image_of(array, affine), config(), name="case.nii").grid
    np.testing.assert_array_equal(grid.forward(array, 3), ras.get_fdata().transpose(1, 0, 2, 3)[::-1, ::-1])
    np.testing.assert_array_equal(grid.back(grid.forward(array, 3)), array)
    to_ras = np.array([[0, -1, 0, ras.shape[0] - 1], [-1, 0, 0, ras.shape[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(grid.affine, ras.affine @ to_ras, atol=1e-5)
    assert grid.size == grid.forward(array, 3).shape[:3] and grid.inside().all()


def test_any_working_orientation_may_be_asked_for():
    array, affine = RNG.normal(size=(4, 5, 6)).astype("f4"), affine_of(((2, 0, 1), (1, -1, 1)), oblique=10)
    for letters in ("RAS", "LPS", "PLS", "SAR", "IRP"):
        grid = prepare(image_of(array, affine), config(axes=letters), name="case.nii").grid
        assert "".join(nib.aff2axcodes(grid.affine)) == letters
        voxel = np.argwhere(grid.forward(array, 0) == array[1, 4, 2])[0]
        np.testing.assert_allclose(world(grid.affine, voxel), world(affine, (1, 4, 2)), atol=1e-9)


@pytest.mark.parametrize("seed", range(100))
def test_a_marker_stays_where_it_is_in_the_world_forward_and_back(seed):
    rng = np.random.default_rng(seed)
    size, own, new = rng.integers(19, 34, 3), rng.uniform(0.6, 1.7, 3), rng.uniform(0.6, 1.7, 3)
    affine = affine_of(ORIENTATIONS[rng.integers(48)], own, oblique=20)
    seat = rng.uniform(8, size - 9)
    mm = [(np.arange(n) - s) * step for n, s, step in zip(size, seat, own, strict=True)]
    marker = np.exp(-sum(d**2 for d in np.meshgrid(*mm, indexing="ij")) / (2 * 2.0**2)).astype(np.float32)
    grid = prepare(image_of(marker, affine), config(spacing=tuple(new)), name="case.nii").grid
    centre = lambda array: ndimage.center_of_mass(np.maximum(array, 0.02) - 0.02)
    working = grid.forward(marker, 3)
    assert working.shape == grid.size
    np.testing.assert_allclose(world(grid.affine, centre(working)), world(affine, seat), atol=0.1)
    np.testing.assert_allclose(world(affine, centre(grid.back(working))), world(affine, seat), atol=0.1)
    columns = np.linalg.norm(grid.affine[:3, :3], axis=0)
    np.testing.assert_allclose(columns, new, rtol=1e-6)
    np.testing.assert_allclose(grid.spacing, new, rtol=1e-6)
    np.testing.assert_allclose(  # both grids share their centre
        world(grid.affine, (np.array(grid.size) - 1) / 2), world(affine, (size - 1) / 2), atol=1e-6
    )


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize(
    "size, own, new", [((9, 14, 7), (1.5, 0.5, 1.0), (0.7, 0.9, 1.0)), ((1, 6, 5), (1,) * 3, (0.45,) * 3)]
)
def test_resampling_is_scipys_about_the_common_centre(size, own, new, order):
    array = RNG.normal(size=size)
    grid = prepare(image_of(array, np.diag([*own, 1.0])), config(axes="RAS", spacing=new), name="case.nii").grid
    expected = np.maximum(1, np.round(np.array(size) * own / new)).astype(int)
    step = np.array(new) / own
    offset = (np.array(size) - 1) / 2 - step * (expected - 1) / 2
    resampled = ndimage.affine_transform(array, np.diag(step), offset, tuple(expected), order=order, mode="nearest")
    np.testing.assert_allclose(grid.forward(array, order), resampled, atol=2e-6)


def test_masks_stay_masks():
    mask = RNG.random((9, 8, 7)) > 0.5
    grid = prepare(image_of(mask, np.eye(4)), config(spacing=(0.8, 1.3, 1.0)), name="case.nii").grid
    assert grid.forward(mask, 0).dtype == bool


def test_a_spacing_that_moves_no_voxel_is_kept_exactly():
    array = RNG.normal(size=(40, 30, 20)).astype("f4")
    affine = np.diag([0.75000012, 0.7499999, 1.0000001, 1])  # as float32 headers have it
    grid = prepare(image_of(array, affine), config(axes="RAS", spacing=(0.75, 0.75, 1.0)), name="case.nii").grid
    np.testing.assert_array_equal(grid.forward(array, 3), array)
    np.testing.assert_array_equal(grid.back(array), array)
    np.testing.assert_array_equal(grid.affine, affine)


def test_back_is_linear_between_working_voxels_and_0_outside_the_crop():
    array = RNG.normal(size=(8, 6, 5)).astype("f4")
    own, new = 0.5, 1.0
    data = config(axes="RAS", spacing=(new, own, own))
    grid = prepare(image_of(array, np.diag([own] * 3 + [1.0])), data, name="case.nii").grid
    values = RNG.normal(size=(4, 6, 5)).astype("f4")
    at = (np.arange(8) - 3.5) * own / new + 1.5
    expected = np.stack([np.interp(at, range(4), line) for line in values.reshape(4, -1).T], 1).reshape(8, 6, 5)
    np.testing.assert_allclose(grid.back(values), expected, atol=1e-6)
    part = grid.cropped((1, 2, -1), (2, 3, 9))
    inside = np.zeros((8, 6, 5), bool)
    inside[2:6, 2:5] = True
    np.testing.assert_array_equal(part.inside(), inside)
    np.testing.assert_array_equal(part.back(np.ones((2, 3, 9))), inside)
    np.testing.assert_allclose(part.forward(array, 3)[..., 1:6], grid.forward(array, 3)[1:3, 2:5], atol=1e-6)
    assert not part.forward(array, 3)[..., [0, 6, 7, 8]].any()
    np.testing.assert_allclose(world(part.affine, (0, 0, 0)), world(grid.affine, (1, 2, -1)))


@pytest.mark.parametrize("seed", range(20))
def test_two_pieces_have_each_voxel_of_the_image_once(seed):
    rng = np.random.default_rng(seed)
    array = rng.normal(size=rng.integers(5, 30, 3)).astype("f4")
    image = image_of(array, affine_of(ORIENTATIONS[rng.integers(48)], rng.uniform(0.5, 2, 3), oblique=20))
    data = config(spacing=tuple(rng.uniform(0.5, 2, 3)))
    pieces = [prepare(image, data, name="case.nii", midline="middle", half=half) for half in ("first", "second")]
    first, second = (piece.grid.inside() for piece in pieces)
    assert (first ^ second).all() and first.any() and second.any()
    for piece in pieces:
        np.testing.assert_array_equal(piece.grid.back(np.ones(piece.grid.size)), piece.grid.inside())


@pytest.mark.parametrize("spacing", [(), (1.3, 0.9, 2.0)])
def test_how_a_file_stores_its_axes_does_not_change_what_is_prepared(spacing):
    array, affine = (
        RNG.normal(size=(7, 9, 11, 2)).astype("f4"),
        affine_of(((0, 1, 2), (1, 1, 1)), (1, 1.2, 2), oblique=30),
    )
    lesion = RNG.random((7, 9, 11)) > 0.9
    prepared = []
    for axes, signs in ORIENTATIONS:
        move = np.zeros((4, 4))  # voxel of the stored array -> voxel of `array`
        for i, (axis, sign) in enumerate(zip(axes, signs, strict=True)):
            move[axis, i], move[axis, 3] = sign, 0 if sign > 0 else array.shape[axis] - 1
        move[3, 3] = 1
        store = lambda a, axes=axes, signs=signs: a.transpose(*axes, *range(3, a.ndim))[
            tuple(slice(None, None, s) for s in signs)
        ]
        image = image_of(store(array), affine @ move)
        prepared.append(
            prepare(image, config(spacing=spacing), name="case.nii", lesion=store(lesion), midline="middle")
        )
    for volume in prepared[1:]:
        np.testing.assert_allclose(volume.array, prepared[0].array, atol=1e-6)
        np.testing.assert_array_equal(volume.lesion, prepared[0].lesion)
        np.testing.assert_allclose(volume.grid.affine, prepared[0].grid.affine, atol=1e-9)
        assert (volume.side, volume.midline) == (prepared[0].side, prepared[0].midline)


# The crop


def box_mask(size, *ends):
    mask = np.zeros(size, bool)
    mask[tuple(slice(a, b) for a, b in ends)] = True
    return mask


SIZE, MM = (40, 60, 30), (2.0, 1.0, 4.0)


@pytest.mark.parametrize(
    "axes, region, lesion, origin, size",
    [
        # 20 x 20 x 10 voxels of 40 x 20 x 40 mm, between least and most: as it is.
        ("PLS", ((10, 30), (5, 25), (8, 18)), None, (10, 5, 8), (20, 20, 10)),
        # 10 mm along P grow to 24 mm backwards, 8 along L to 16 and 8 along S to 32 mm on both sides.
        ("PLS", ((10, 15), (20, 28), (8, 10)), None, (10, 16, 5), (12, 16, 8)),
        # The same where the first index grows forwards: the anterior end is 15.
        ("ALS", ((10, 15), (20, 28), (8, 10)), None, (3, 16, 5), (12, 16, 8)),
        ("", ((10, 15), (20, 28), (8, 10)), None, (7, 16, 5), (12, 16, 8)),
        # 80, 60 and 120 mm shrink to 60, 30 and 80: P from its posterior end, L and S from both sides.
        ("PLS", ((0, 40), (0, 60), (0, 30)), None, (0, 15, 5), (30, 30, 20)),
        ("ALS", ((0, 40), (0, 60), (0, 30)), None, (10, 15, 5), (30, 30, 20)),
        # At the image's edge the box leaves it.
        ("PLS", ((39, 40), (0, 4), (29, 30)), None, (39, -6, 26), (12, 16, 8)),
        # A lesion inside changes nothing; one that sticks out moves that side alone, to 6 mm beyond it.
        ("PLS", ((10, 30), (5, 25), (8, 18)), ((10, 12), (5, 6), (17, 18)), (10, 5, 8), (20, 20, 10)),
        ("PLS", ((10, 30), (5, 25), (8, 18)), ((28, 33), (3, 9), (9, 12)), (10, -3, 8), (26, 28, 10)),
        # Also beyond `most`, and on both sides.
        ("PLS", ((0, 40), (0, 60), (0, 30)), ((2, 38), (10, 50), (1, 29)), (0, 4, -1), (41, 52, 32)),
    ],
)
def test_the_chest_box_by_hand(axes, region, lesion, origin, size):
    found = None if lesion is None else box_mask(SIZE, *lesion)
    box = chest_box(box_mask(SIZE, *region), MM, (24, 16, 32), (60, 30, 80), found, 6, axes)
    assert box == (origin, size)


def test_a_crop_beyond_the_image_is_padded_with_0_before_it_is_normalised():
    array = RNG.normal(100, 20, (30, 30, 10, 2)).astype("f4")
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])  # own axes L, P, S
    region = box_mask((30, 30, 10), (2, 6), (20, 28), (4, 6))
    lesion = box_mask((30, 30, 10), (6, 9), (18, 22), (5, 6))
    data = config(crop="region", crop_least=(12.0, 10.0, 20.0), crop_most=(40.0, 40.0, 40.0), crop_margin=3.0)
    volume = prepare(image_of(array, affine), data, name="case.nii", region=region, lesion=lesion)
    # P: 20..28 grows to 20..32, the lesion moves its front to 15; L: -1..9 holds the lesion; S: -5..15.
    padded = np.zeros((17, 10, 20, 2), np.float32)
    padded[:15, 1:, 5:15] = array.transpose(1, 0, 2, 3)[15:, :9]
    mean, std = padded.mean((0, 1, 2), dtype=float), padded.std((0, 1, 2), dtype=float)
    np.testing.assert_allclose(volume.array, (padded - mean) / std * 0.25 + 0.5, atol=1e-5)
    np.testing.assert_allclose(volume.array.mean((0, 1, 2), dtype=float), 0.5, atol=1e-5)
    np.testing.assert_allclose(volume.array.std((0, 1, 2), dtype=float), 0.25, atol=1e-5)
    np.testing.assert_allclose((volume.array - 0.5) / 0.25 * volume.std + volume.mean, padded, atol=1e-3)
    np.testing.assert_array_equal(volume.grid.back(padded), array * volume.grid.inside()[..., None])
    np.testing.assert_array_equal(volume.grid.inside(), box_mask((30, 30, 10), (0, 9), (15, 30), (0, 10)))
    np.testing.assert_array_equal(volume.grid.back(volume.lesion), lesion)
    np.testing.assert_array_equal(volume.grid.back(volume.region), region)
    assert volume.array.dtype == np.float32 and volume.array.flags.c_contiguous and volume.lesion.dtype == bool


def test_normalising_by_the_region_and_the_region_of_what_is_not_0():
    array = np.where(RNG.random((9, 8, 7, 2)) > 0.4, RNG.normal(50, 9, (9, 8, 7, 2)), 0).astype("f4")
    volume = prepare(image_of(array, np.eye(4)), config(axes="", region="nonzero", normalise="region"), name="case.nii")
    marked = (array != 0).any(-1)
    np.testing.assert_array_equal(volume.region, marked)
    np.testing.assert_allclose(volume.array[marked].mean(0, dtype=float), 0.5, atol=1e-5)
    np.testing.assert_allclose(volume.array[marked].std(0, dtype=float), 0.25, atol=1e-5)
    given = marked & (RNG.random(marked.shape) > 0.5)
    again = prepare(image_of(array, np.eye(4)), config(axes="", region="nonzero"), name="case.nii", region=given)
    np.testing.assert_array_equal(again.region, given)


# The midline


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_midline_of_the_own_axis_parts_the_same_voxels_on_the_working_grid(orientation):
    array = RNG.normal(size=(9, 10, 11)).astype("f4")
    image = image_of(array, affine_of(orientation, oblique=15))
    own = orientation[0].index(0)  # the own axis along left-right
    n = array.shape[own]
    first = np.moveaxis(np.broadcast_to(np.arange(n)[:, None, None] < 4, (n, *np.delete(array.shape, own))), 0, own)
    for axes, side in (("PLS", 1), ("RAS", 0), ("SAR", 2), ("", own)):
        volume = prepare(image, config(axes=axes), name="case.nii", midline="4")
        assert volume.side == side
        pieces = np.split(volume.grid.forward(first, 0), [volume.midline], side)
        assert (pieces[0].all() and not pieces[1].any()) or (pieces[1].all() and not pieces[0].any())
        halves = [prepare(image, config(axes=axes), name="case.nii", midline="4", half=h) for h in ("first", "second")]
        np.testing.assert_array_equal(halves[0].grid.inside(), first)
        np.testing.assert_array_equal(halves[1].grid.inside(), ~first)
        whole = np.split(volume.array, [volume.midline], side)
        for half in halves:
            assert half.midline is None and any(np.array_equal(half.array, piece) for piece in whole)
            assert (half.mean, half.std) == (volume.mean, volume.std)  # of both halves
        middle = prepare(image, config(axes=axes), name="case.nii", midline="middle")
        assert middle.midline == middle.array.shape[side] // 2


def test_a_midline_is_moved_with_resampling_and_crop():
    image = image_of(RNG.normal(size=(40, 20, 10)), np.diag([-0.5, -1.0, 1.0, 1.0]))  # L, P, S
    assert prepare(image, config(spacing=(1.0, 1.0, 1.0)), name="case.nii", midline="12").midline == 6
    assert prepare(image, config(spacing=(1.0, 0.25, 1.0)), name="case.nii", midline="12.5").midline == 25
    mirrored = image._replace(affine=np.diag([0.5, -1.0, 1.0, 1.0]))
    assert prepare(mirrored, config(spacing=(1.0, 1.0, 1.0)), name="case.nii", midline="12").midline == 14
    data = config(spacing=(1.0, 1.0, 1.0), crop="region", crop_least=(1.0,) * 3, crop_most=(99.0,) * 3)
    region = box_mask((40, 20, 10), (8, 30), (0, 20), (0, 10))
    volume = prepare(image, data, name="case.nii", region=region, midline="12")
    assert volume.array.shape == (20, 11, 10, 1) and volume.midline == 2
    assert prepare(image, data, name="case.nii", region=region, midline="middle").midline == 5


# What is refused


def test_what_cannot_be_prepared_without_doubt_is_one_line():
    array = RNG.normal(size=(6, 5, 4)).astype("f4")
    image = image_of(array, np.eye(4))
    unplaced = image._replace(affine=None)
    bare, flat = image._replace(affine=None, spacing=None), image_of(np.ones((6, 5, 4)) * 1000, np.eye(4))
    picture = Image(array[..., :1], (1.0, 1.0), None, None)
    region, empty = box_mask((6, 5, 4), (0, 3), (0, 5), (0, 4)), np.zeros((6, 5, 4), bool)
    holes = array.copy()
    holes[1, 2, 3] = np.nan
    for stored, changes, options, words in (
        (unplaced, {}, {}, ["no volume with a position", "--config.data.axes="]),
        (picture, {}, {}, ["no volume with a position"]),
        (unplaced, {"axes": ""}, {"midline": "2"}, ["position", "midline"]),
        (picture, {"axes": ""}, {"midline": "middle"}, ["position", "midline"]),
        (bare, {"axes": "", "spacing": (1, 1, 1)}, {}, ["no spacing", "--config.data.spacing="]),
        (bare, {"axes": "", "crop": "region"}, {"region": region}, ["no spacing", "crop"]),
        (image, {"spacing": (1, 1)}, {}, ["3 axes", "(1, 1)"]),
        (image, {"spacing": (1, 0, 1)}, {}, ["3 axes", "(1, 0, 1)"]),
        (image, {}, {"midline": "0"}, ["midline 0 is not inside"]),
        (image, {}, {"midline": "6"}, ["midline 6 is not inside"]),
        (image, {}, {"midline": "99"}, ["midline 99 is not inside"]),
        (image, {}, {"half": "first"}, ["half", "without a midline"]),
        (flat, {}, {}, ["channel 1 is constant"]),
        (flat, {"spacing": (0.7, 0.7, 0.7)}, {}, ["channel 1 is constant"]),
        (image_of(holes, np.eye(4)), {}, {}, ["channel 1", "not finite"]),
        (image, {}, {"region": empty}, ["region marks nothing"]),
        (image, {"crop": "region"}, {"region": empty}, ["region marks nothing"]),
        (image, {"crop": "region"}, {}, ["names no region", "nonzero"]),
        (image, {"normalise": "region"}, {}, ["names no region", "nonzero"]),
        (image, {}, {"region": region, "midline": "3", "half": "second"}, ["marks nothing in the second half"]),
    ):
        with refused(*words):
            prepare(stored, config(**changes), name="case.nii", **options)
    for key, value in (("axes", "PLX"), ("axes", "PAS"), ("crop", "chest"), ("normalise", "image"), ("region", "all")):
        with refused(name=f"--config.data.{key}='{value}'"):
            prepare(image, config(**{key: value}), name="case.nii")


def test_an_image_without_position_keeps_its_own_axes():
    array = RNG.normal(size=(7, 5, 3)).astype("f4")
    for stored in (Image(array, None, None, None), Image(array[..., None], (1.0, 2.0, 3.0), None, None)):
        volume = prepare(stored, config(axes=""), name="case.nii")
        expected = (stored.array - volume.mean) / volume.std * 0.25 + 0.5
        np.testing.assert_allclose(volume.array, expected, atol=1e-6)
        assert volume.side is volume.midline is volume.grid.affine is volume.region is volume.lesion is None
        assert volume.grid.spacing == stored.spacing and volume.grid.inside().all()


# Sequences


def nifti(path, array, affine):
    nib.save(nib.Nifti1Image(np.asarray(array, np.float32), affine), path)
    return str(path)


def test_sequences_are_resampled_onto_the_first_by_their_affines(tmp_path):
    first, second = RNG.normal(size=(12, 10, 8)), RNG.normal(size=(9, 11, 13))
    affine = affine_of(((0, 1, 2), (1, 1, 1)), (1, 1, 1.5), oblique=10)
    other = affine_of(((2, 1, 0), (1, -1, 1)), (1.4, 1.1, 0.9), oblique=10)
    other[:3, 3] += (affine @ [5.5, 4.5, 3.5, 1] - other @ [4, 5, 6, 1])[:3]  # both about one centre
    paths = [nifti(tmp_path / "a.nii.gz", first, affine), nifti(tmp_path / "b.nii.gz", second, other)]
    image = read_volume(paths, config(join="resample"))
    np.testing.assert_array_equal(image.array[..., 0], first.astype("f4"))
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
    voxels = np.stack(np.meshgrid(*map(np.arange, first.shape), indexing="ij")).reshape(3, -1)
    at = np.linalg.inv(other) @ affine @ np.concatenate([voxels, np.ones((1, voxels.shape[1]))])
    expected = ndimage.map_coordinates(second.astype("f4"), at[:3], order=3, mode="nearest")
    outside = ((at[:3] < -0.5) | (at[:3] > np.array(second.shape)[:, None] - 0.5)).any(0)
    assert outside.any() and not outside.all()
    np.testing.assert_allclose(image.array[..., 1].ravel(), np.where(outside, 0, expected), atol=1e-4)
    with pytest.raises(InputError, match=r"b\.nii\.gz: size .* differs"):
        read_volume(paths, config())


def test_a_sequence_on_the_first_grid_is_not_resampled_and_a_shifted_one_keeps_its_border(tmp_path):
    affine = affine_of(((0, 1, 2), (1, 1, 1)), (0.7, 0.9, 1.1), oblique=10).astype(np.float32)
    array = RNG.normal(size=(6, 7, 8)).astype("f4")
    shifted = affine @ np.array([[1, 0, 0, 2], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    paths = [nifti(tmp_path / f"{i}.nii", array, a) for i, a in enumerate((affine, affine, shifted))]
    image = read_volume(paths, config(join="resample"))
    np.testing.assert_array_equal(image.array[..., 1], array)
    np.testing.assert_allclose(image.array[2:, ..., 2], array[:-2], atol=1e-4)
    assert not image.array[:2, ..., 2].any()


def test_sequences_that_cannot_be_joined_are_one_line_with_the_file(tmp_path):
    array = RNG.normal(size=(6, 7, 8)).astype("f4")
    far = np.eye(4)
    far[:3, 3] = 900
    holes = array.copy()
    holes[0, 0, 0] = np.nan
    np.save(tmp_path / "bare.npy", array)
    first = nifti(tmp_path / "first.nii", array, np.eye(4))
    for other, word in (
        (str(tmp_path / "bare.npy"), "tells no position"),
        (nifti(tmp_path / "far.nii", array, far), "is 0 all over the grid"),
        (nifti(tmp_path / "holes.nii", holes, np.diag([1, 1, 1.1, 1])), "1 values are not finite"),
        (nifti(tmp_path / "flat.nii", array[..., 0], np.eye(4)), "no volume"),
    ):
        with refused(word, name=other):
            read_volume([first, other], config(join="resample"))
    with refused("tells no position", name=str(tmp_path / "bare.npy")):
        read_volume([str(tmp_path / "bare.npy"), first], config(join="resample"))
    np.testing.assert_array_equal(
        read_volume([str(tmp_path / "bare.npy")], config(join="resample")).array[..., 0], array
    )
    with refused(name="--config.data.join='both'"):
        read_volume([first], config(join="both"))


@pytest.mark.parametrize("join", ["same", "resample"])
def test_damaged_sequences_are_one_line_with_the_file(tmp_path, join):
    array = RNG.normal(size=(6, 7, 8)).astype("f4")
    first = nifti(tmp_path / "first.nii.gz", array, np.eye(4))
    data = (tmp_path / "first.nii.gz").read_bytes()
    body = bytearray(gzip.decompress(data))
    faults = {"cut": data[:-50], "flipped": bytearray(data), "singular": bytearray(body), "lying": bytearray(body)}
    faults["flipped"][len(data) // 2] ^= 16
    faults["singular"][280:296] = faults["singular"][296:312]  # srow_x is srow_y
    faults["lying"][42:48] = np.array([32000] * 3, "<i2").tobytes()
    for name, damaged in faults.items():
        path = tmp_path / f"{name}.nii.gz"
        path.write_bytes(bytes(damaged) if name in ("cut", "flipped") else gzip.compress(bytes(damaged)))
        tracemalloc.start()
        for paths in ([str(path)], [first, str(path)]):
            with refused("", name=str(path)):
                read_volume(paths, config(join=join))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50e6


# Boxes and contrast


def test_boxes_are_half_open_and_keep_a_voxel_each():
    expected = np.zeros((6, 5, 4), bool)
    expected[1:3, 2:5, 0:4] = True
    np.testing.assert_array_equal(boxes_mask([(1, 2, 0, 3, 5, 4)], (6, 5, 4)), expected)
    np.testing.assert_array_equal(boxes_mask([(1.4, 1.6, -0.0, 2.6, 5, 4)], (6, 5, 4)), expected)
    expected[5, 4, 3] = True
    expected[3, 0, 2] = True
    boxes = [(1, 2, 0, 3, 5, 4), (5.6, 4.8, 3.9, 6, 5, 4), (2.6, 0.1, 1.9, 2.8, 0.2, 2.1)]
    np.testing.assert_array_equal(boxes_mask(boxes, (6, 5, 4)), expected)
    rows_by_columns = np.zeros((7, 5), bool)
    rows_by_columns[4:6, 1:3] = True
    np.testing.assert_array_equal(boxes_mask([(1, 4, 3, 6)], (7, 5)), rows_by_columns)
    assert not boxes_mask([], (7, 5)).any()


def test_the_subtraction_is_the_mean_squared_difference_over_the_phases():
    pre, posts = RNG.normal(size=(4, 3, 2)), [RNG.normal(size=(4, 3, 2)) for _ in range(3)]
    expected = sum((pre - post) ** 2 for post in posts) / 3
    np.testing.assert_allclose(subtraction(pre, posts), expected, rtol=1e-6)


def test_series_of_contrast_are_put_on_the_grid_of_the_volume_and_normalised_alone(tmp_path):
    affine = np.diag([-1.0, -1.0, 1.5, 1.0])
    other = np.array([[0, 0, -1.2, 1.0], [-1.3, 0, 0, 2.0], [0, 1.1, 0, 1.0], [0, 0, 0, 1]])
    plain, pre = RNG.normal(300, 30, (14, 15, 9)), RNG.normal(200, 9, (14, 15, 9))
    posts = [RNG.normal(99, 9, (14, 15, 9)), RNG.normal(500, 50, (12, 16, 13))]
    image = nifti(tmp_path / "image.nii.gz", plain, affine)
    before = nifti(tmp_path / "pre.nii.gz", pre, affine)
    after = (nifti(tmp_path / "p1.nii.gz", posts[0], affine), nifti(tmp_path / "p2.nii.gz", posts[1], other))
    row = Row("case", "", "test", 1, (image,), pre=(before,), post=after)
    region = box_mask((14, 15, 9), (2, 12), (3, 13), (1, 8))
    data = config(spacing=(1.2, 0.9, 1.5), crop="region", crop_least=(5.0,) * 3, crop_most=(99.0,) * 3)
    volume = prepare(read_image(image), data, name="case.nii", region=region)

    voxels = np.stack(np.meshgrid(*map(np.arange, volume.grid.size), indexing="ij")).reshape(3, -1)
    voxels = np.concatenate([voxels, np.ones((1, voxels.shape[1]))])

    def expected(array, own):
        at = (np.linalg.inv(own) @ volume.grid.affine @ voxels)[:3]
        values = ndimage.map_coordinates(array.astype("f4"), at, order=3, mode="nearest").reshape(volume.grid.size)
        outside = ((at < -0.5) | (at > np.array(array.shape)[:, None] - 0.5)).any(0).reshape(volume.grid.size)
        return np.where(outside, 0, values)

    def normal(values, inside):
        return (values - values[inside].mean()) / values[inside].std() * 0.25 + 0.5

    arrays = [expected(pre, affine), expected(posts[0], affine), expected(posts[1], other)]
    for normalise, inside in (("crop", np.ones(volume.grid.size, bool)), ("region", volume.region)):
        data.normalise = normalise
        first, second, third = (normal(array, inside) for array in arrays)
        result = read_subtraction(row, volume, data)
        assert result.dtype == np.float32 and result.shape == volume.grid.size
        np.testing.assert_allclose(result, ((first - second) ** 2 + (first - third) ** 2) / 2, atol=2e-4)

    np.save(tmp_path / "bare.npy", plain[:-1])
    colours = str(tmp_path / "two.npy")
    np.save(colours, np.stack([plain, pre], -1))
    for path, word in ((str(tmp_path / "bare.npy"), "position"), (colours, "2 channels"), ("none.nii", "not found")):
        with refused(word, name=path):
            read_subtraction(row._replace(pre=(path,)), volume, data)
    with refused("fill the columns", name="case"):
        read_subtraction(row._replace(pre=(), post=()), volume, data)
