"""One device and eight give the same; a step is the same with jit, without, and under pmap."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import nibabel as nib
import numpy as np
import pytest
from drawn import first_state
from on_8_devices import EIGHT, batch, small_system
from patients import arguments, write_patients

from jmae import train
from jmae.data.files import read_image
from jmae.errors import exit_code
from jmae.run_folder import read_history
from jmae.sharding import device_mesh, place_batch, replicated, split


@pytest.fixture(scope="module")
def on_eight(small_set, tools, tmp_path_factory):
    """(folder of the run on eight virtual devices, what the process said)."""
    folder = tmp_path_factory.mktemp("eight")
    run, volumes, manifest = folder / "run", folder / "volumes", write_patients(folder)
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    script = str(Path(__file__).with_name("on_8_devices.py"))
    command = [sys.executable, script, str(run), str(volumes), str(manifest), *tools.arguments(small_set, run)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return run, json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.long
def test_one_device_and_eight_train_alike(finished, on_eight):
    run, said, _ = on_eight
    assert said["code"] == 0
    one, eight = (read_history(folder / "metrics.jsonl") for folder in (finished, run))
    assert [(h["stage"], h["step"]) for h in one] == [(h["stage"], h["step"]) for h in eight]
    for a, b in zip(one, eight, strict=True):
        for name in a.keys() & {"loss", "accuracy", "abnormal_share"}:
            within = 1e-3 if a["stage"] == "proxy" else 1e-5  # batch norm: its rounding grows tenfold every few steps
            assert b[name] == pytest.approx(a[name], rel=within), (a["stage"], a["step"], name)


@pytest.mark.long
def test_one_device_and_eight_give_the_same_maps_and_scores(finished, on_eight):
    run, _, _ = on_eight
    names = sorted(os.listdir(finished / "evaluation" / "maps"))
    assert names == sorted(os.listdir(run / "evaluation" / "maps")) and len(names) == 12
    for name in names:
        one, eight = (read_image(folder / "evaluation" / "maps" / name).array for folder in (finished, run))
        np.testing.assert_allclose(eight, one, rtol=1e-3, atol=1e-4 * np.abs(one).max())


@pytest.mark.long
def test_a_batch_that_does_not_divide_among_the_devices_is_one_line(on_eight):
    _, said, stderr = on_eight
    assert said["indivisible"] == 2
    assert (
        "stage pretrain: a batch of 12 is not divisible by 8 devices: use a multiple of 8, or fewer devices" in stderr
    )


@pytest.mark.long
def test_parameters_and_optimiser_state_are_split_over_the_devices_of_fsdp(on_eight):
    for fsdp, (own, all_) in on_eight[1]["bytes"].items():
        assert all_ > 50_000 and own == all_ // int(fsdp)


@pytest.mark.long
def test_devices_exchange_weights_and_gradients_and_no_activations(on_eight):
    for stage, (collected, weights) in on_eight[1]["exchanged"].items():
        assert 0 < collected < 5 * weights, stage  # forward, backward, gradients; the samples are many times as much


@pytest.mark.long
def test_an_fsdp_that_does_not_divide_the_devices_is_one_line(on_eight):
    _, said, stderr = on_eight
    assert said["uneven"] == 2
    assert "fsdp=3 does not divide 8 devices: set it to one of their divisors" in stderr


@pytest.mark.long
def test_one_device_and_eight_with_fsdp_train_alike_on_crops_and_give_the_same_volumes_maps(on_eight, tmp_path):
    run, said, _ = on_eight
    volumes, manifest = run.with_name("volumes"), run.with_name("manifest.csv")
    assert said["code"] == 0
    assert exit_code(train.main, arguments(manifest, tmp_path / "one", *EIGHT)) == 0
    one, eight = (read_history(folder / "metrics.jsonl") for folder in (tmp_path / "one", volumes))
    losses = lambda history: [h["loss"] for h in history if "loss" in h]
    assert losses(eight) == pytest.approx(losses(one), rel=1e-5)
    names = sorted(os.listdir(volumes / "evaluation" / "maps"))
    assert names and names == sorted(os.listdir(tmp_path / "one" / "evaluation" / "maps"))
    for name in names:
        a, b = (nib.load(folder / "evaluation" / "maps" / name).dataobj for folder in (tmp_path / "one", volumes))
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * np.abs(a).max())


@pytest.mark.long
@pytest.mark.parametrize("stage", ["pretrain", "labels", "module_a", "module_b", "train", "levels train"])
def test_under_pmap_a_step_equals_the_jitted_one(on_eight, stage):
    for half in (0, 1):
        metrics, moments, shapes, finite = on_eight[1]["mapped"][f"{stage} {half}"]
        assert metrics < 1e-5 and moments < 1e-5 and shapes and finite


@pytest.mark.long
def test_under_pmap_sources_and_batch_statistics_are_those_of_the_whole_batch(on_eight):
    for half in (0, 1):
        metrics, moments, shapes, finite = on_eight[1]["mapped"][f"anomalies train {half}"]
        assert metrics < 1e-4 and moments < 1e-3 and shapes and finite


@pytest.mark.long
@pytest.mark.parametrize("stage", ["report memory", "report calibration", "official calibration"])
def test_under_pmap_the_memory_and_the_calibration_are_those_of_the_whole_batch(on_eight, stage):
    for half in (0, 1):
        metrics, moments, shapes, finite = on_eight[1]["mapped"][f"{stage} {half}"]
        assert metrics < 1e-4 and moments < 1e-3 and shapes and finite


@pytest.mark.long
@pytest.mark.parametrize(
    "stage", ["proxy", "report teacher", "report student", "report discriminator", "official joint"]
)
def test_under_pmap_batch_norm_takes_each_device_s_samples_and_all_devices_agree(on_eight, stage):
    first, second = (on_eight[1]["mapped"][f"{stage} {half}"] for half in (0, 1))
    metrics, _, shapes, finite = first
    assert first == second and metrics < 0.1 and shapes and finite


TRAIN = """
import sys
from jmae import sharding, train
from jmae.errors import exit_code
sharding.SPLIT_FROM = 256  # numbers: the network is small
sys.exit(exit_code(train.main, sys.argv[1:]))
"""


def test_one_device_and_two_with_fsdp_train_alike(tmp_path):
    """The short form of the tests above: no check and no evaluation."""
    manifest, losses = write_patients(tmp_path), []
    header, *rows = manifest.read_text().splitlines()
    manifest.write_text("\n".join([header, *(row for row in rows if ",train," in row)]))
    assert exit_code(train.main, arguments(manifest, tmp_path / "one", *EIGHT)) == 0
    command = [sys.executable, "-c", TRAIN, *arguments(manifest, tmp_path / "two", *EIGHT, "fsdp=2")]
    done = subprocess.run(command, env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("one", "two"):
        losses.append([line["loss"] for line in read_history(tmp_path / name / "metrics.jsonl")])
    assert losses[0] and losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_batches_are_split_over_the_data_axis_and_states_are_whole():
    mesh = device_mesh()
    assert dict(mesh.shape) == {"data": jax.device_count(), "fsdp": 1}
    placed = place_batch({"x": np.zeros((3, 2 * jax.device_count()))}, mesh, axis=1)["x"]
    assert placed.sharding == split(mesh, 1) and replicated(mesh).is_fully_replicated


@pytest.mark.long
def test_a_score_is_the_same_without_jit():
    _, system = small_system("variant=mae", "evaluation.masks=2", "model.depth=1")
    results = {"pretrain": {"params": first_state(system.stages[0], {}, 2).params, "stats": {}}}
    compiled = jax.jit(system.score)(results, batch(2), jax.random.key(1))
    with jax.disable_jit():
        plain = system.score(results, batch(2), jax.random.key(1))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), compiled, plain)


@pytest.mark.long
@pytest.mark.parametrize("program", ["train", "score"])
def test_each_gpu_runs_layer_norm_on_its_own_samples(on_eight, program):
    """The compiler cannot split a kernel that it does not know: outside `shard_map` each GPU would take all rows."""
    one, eight = on_eight[1]["kernels"][program]
    assert one == 8 * eight
