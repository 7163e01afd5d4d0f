"""The way of volumes to the networks' grid and back on the device, against that of the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jmae.data import volumes_on_device as on_device
from jmae.data.files import Image
from jmae.data.manifest import Row
from jmae.data.on_device import equalise as equalise_on_device
from jmae.data.preparation import usable
from jmae.data.transforms import equalise
from jmae.data.volumes import prepare, whole_grid
from jmae.errors import InputError
from jmae.windows import places, tile

AFFINE = np.array([[-3, 0.1, 0.1, 60], [0.1, 0.2, 3, -20], [0, 3.5, -0.2, 5], [0, 0, 0, 1]], float)
SIZE = 23, 9, 14


def data(**changes) -> ConfigDict:
    return ConfigDict(
        {
            **dict(axes="PLS", spacing=(2.0, 2.5, 4.0), crop="region", region="nonzero", normalise="region"),
            **dict(crop_least=(10.0, 20.0, 8.0), crop_most=(30.0, 50.0, 20.0), crop_margin=0.0, window=()),
            **dict(mean=0.5, std=0.25, equalise=False, equalise_exact=False, size=(8, 8, 4), channels=2),
            **changes,
        }
    )


def scan(affine=AFFINE) -> Image:
    """Two sequences that are 0 outside a block."""
    rng = np.random.default_rng(1)
    array = np.zeros((*SIZE, 2), np.float32)
    array[4:20, 1:8, 3:12] = rng.gamma(2, 40, (16, 7, 9, 2))
    return Image(array, tuple(np.linalg.norm(affine[:3, :3], axis=0)), affine, None)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"crop": "none"},
        {"crop": "none", "spacing": (), "axes": "", "normalise": "crop", "region": ""},
        {"axes": "ARI", "crop_least": (60.0, 90.0, 40.0), "crop_most": (70.0, 95.0, 45.0)},
        {"spacing": (), "normalise": "crop"},
        {"window": (10.0, 120.0)},
        {"equalise": True, "window": (0.0, 200.0)},
        {"equalise": True, "equalise_exact": True, "normalise": "crop"},
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_a_volume_goes_to_the_grid_and_back_as_on_the_host(changes, given):
    settings, stored = data(**changes), scan()
    region = np.zeros(SIZE, bool)
    region[6:15, 2:6, 4:13] = given
    expected = prepare(stored, settings, name="scan", region=region if given else None)
    grid = whole_grid(stored, settings, "scan")
    ready = jax.jit(lambda x, r: on_device.prepared(x, r, grid, settings))(stored.array, region)
    within = tuple(map(slice, expected.grid.size))
    assert ready.usable and tuple(ready.size) == expected.grid.size and tuple(ready.origin) == expected.grid.origin
    found = np.array(ready.array)
    np.testing.assert_allclose(found[within], expected.array, atol=1 / 255 + 1e-6 if settings.equalise else 1e-4)
    assert np.mean(np.abs(found[within] - expected.array)) < 1e-5  # levels may differ in ties alone
    found[within] = 0
    assert not found.any()
    whole = np.ones(expected.grid.size, bool)
    np.testing.assert_array_equal(ready.region[within], whole if expected.region is None else expected.region)

    heat = np.random.default_rng(2).normal(size=ready.region.shape).astype(np.float32)
    found = jax.jit(lambda m, o, s: on_device.back(m, grid, o, s))(heat, ready.origin, ready.size)
    np.testing.assert_allclose(found, expected.grid.back(heat[within]), atol=1e-5)


@pytest.mark.parametrize("wrong", ["nan", "constant", "no region", "a constant channel"])
def test_what_the_host_refuses_is_not_usable(wrong):
    settings, array = data(region="" if wrong == "no region" else "nonzero"), scan().array
    if wrong == "nan":
        array[5, 5, 5, 0] = np.nan
    elif wrong == "constant":
        array[:] = 7
    elif wrong == "a constant channel":
        array[..., 1] = 3
    grid, stored = whole_grid(scan(), settings, "scan"), scan()._replace(array=array)
    ready = on_device.prepared(jnp.asarray(array), jnp.zeros(SIZE, bool), grid, settings)
    assert not ready.usable
    row = Row("scan", "", "test", None, ("scan", "scan"))
    with pytest.raises(InputError):
        prepare(stored._replace(array=usable(row, stored, settings)), settings, name="scan")


def test_a_channel_that_is_constant_in_the_window_is_used_as_on_the_host():
    settings, stored = data(window=(10.0, 120.0)), scan()
    stored.array[..., 1] += 500
    expected = prepare(stored, settings, name="scan")
    ready = on_device.prepared(
        jnp.asarray(stored.array), jnp.zeros(SIZE, bool), whole_grid(stored, settings, "scan"), settings
    )
    within = tuple(map(slice, expected.grid.size))
    assert ready.usable and (expected.array[..., 1] == 1).all()
    np.testing.assert_allclose(ready.array[within], expected.array, atol=1e-4)
    stored.array[..., 0] += 500
    ready = on_device.prepared(
        jnp.asarray(stored.array), jnp.zeros(SIZE, bool), whole_grid(stored, settings, "scan"), settings
    )
    assert not ready.usable


def test_only_scans_of_the_grid_are_known():
    settings = data()
    grid = whole_grid(scan(), settings, "scan")
    same = lambda affine, settings=settings: bool(on_device.same_grid(jnp.asarray(affine, jnp.float32), grid, settings))
    moved, rotated = AFFINE.copy(), AFFINE.copy()
    moved[:3, 3] += 40
    angle = np.radians(4)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    rotated[:3, :3] = turn @ AFFINE[:3, :3]
    assert same(AFFINE) and same(moved) and same(rotated)
    flips = AFFINE @ np.diag([-1, 1, 1, 1.0])
    assert not same(flips) and same(flips, data(axes=""))
    assert not same(AFFINE @ np.diag([1.01, 1, 1, 1.0])) and not same(AFFINE[:, [0, 2, 1, 3]])


def test_a_scan_with_an_affine_is_not_of_a_grid_without_one():
    settings = data(axes="", spacing=())
    grid = whole_grid(scan()._replace(affine=None, spacing=None), settings, "scan")
    same = lambda affine: bool(on_device.same_grid(jnp.asarray(affine, jnp.float32), grid, settings))
    assert same(np.eye(4)) and not same(AFFINE) and not same(np.diag([1, 1, 2, 1.0]))


@pytest.mark.parametrize("exact", [False, True])
def test_an_equalised_area_is_that_of_the_host(exact):
    rng = np.random.default_rng(3)
    image, inside = rng.random((9, 8, 7, 2)).astype(np.float32), rng.random((9, 8, 7)) < 0.4
    found = equalise_on_device(jnp.asarray(image), exact, jnp.asarray(inside))
    np.testing.assert_allclose(found, equalise(image, inside, exact=exact), atol=5e-3 if exact else 1e-6)


@pytest.mark.parametrize("size", [(20, 9, 5), (13, 16, 4), (6, 8, 3), (40, 17, 11)])
@pytest.mark.parametrize("stride", [(4, 4, 2), (8, 3, 4)])
def test_windows_are_placed_as_by_the_host(size, stride):
    window, most = (8, 8, 4), (40, 17, 11)
    expected = tile(size, window, stride)
    low, origins, number, coverage = jax.jit(lambda n: places(n, most, window, stride))(np.array(size, np.int32))
    assert tuple(low) == tuple(below for below, _ in expected.pad)
    np.testing.assert_array_equal(origins[:number], expected.origins)
    for found, known in zip(coverage, expected.coverage, strict=True):
        n = min(len(found), len(known))
        np.testing.assert_array_equal(found[:n], known[:n])
        assert not found[n:].any() and not known[n:].any()
