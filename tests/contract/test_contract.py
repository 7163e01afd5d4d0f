"""What every system keeps to: rows of its declared splits alone, data options honoured or refused, whole recipes."""

import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmae import recipe, train
from jmae.data import loader
from jmae.data.manifest import Row
from jmae.errors import InputError, exit_code
from jmae.recipe import SYSTEMS
from jmae.seen import read_seen
from jmae.system import chosen_on_val, load_system, network, rows_read, splits_read, stats_of
from jmae.train import main

IMAGE_SYSTEMS = ("amae", "memmc_mae", "ppii", "simsid", "autoencoder")
READ = {  # the splits that training reads
    "amae": {"train", "unlabeled"},
    "maemi": {"train"},
    "memmc_mae": {"train"},
    "ppii": {"train"},
    "simsid": {"train"},
    "autoencoder": {"train", "unlabeled"},  # DDAD
}


def config(system: str, *changes: str, preset: str = "smoke"):
    arguments = [f"--config=configs/{system}.py:{preset}", *(f"--config.{change}" for change in changes)]
    return recipe.parse(arguments, "")[0]


def rows(n: int = 24) -> list[Row]:
    """Rows of all splits in turn, labelled in `val` and `test`."""
    splits = ("unlabeled", "train", "val", "test")
    label = lambda split, i: (i // 4) % 2 if split in ("val", "test") else None
    return [Row(f"c{i}", f"p{i}", splits[i % 4], label(splits[i % 4], i), (f"{i}.png",)) for i in range(n)]


@pytest.mark.parametrize("name", SYSTEMS)
def test_training_reads_the_declared_splits_alone(name):
    system = load_system(config(name, *(["select=last"] if name == "simsid" else [])))
    assert set(splits_read(system)) == READ[name]
    assert {row.split for row in rows_read(system, rows())} == READ[name]


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_stage_trains_on_rows_of_its_own_splits(name):
    system = load_system(config(name))
    read = rows_read(system, rows())
    for stage in system.stages:
        if stage.name in ("module_a", "module_b"):  # these follow the pseudo-labels
            continue
        numbers = stage.rows(read, {})
        assert len(numbers) and {read[i].split for i in numbers} <= set(stage.splits)
        for check in stage.checks:
            assert {read[i].split for i in check.rows(read)} <= set(stage.splits)


@pytest.mark.parametrize("name", ["ppii", "memmc_mae", "simsid"])
def test_rows_that_are_decoded_for_a_choice_are_declared(name):
    system = load_system(config(name, "select=aucp"))
    assert set(splits_read(system)) == {"train", "unlabeled"}


@pytest.mark.parametrize("name", IMAGE_SYSTEMS)
def test_the_rows_of_the_declared_splits_alone_are_written_as_seen(name, small_set, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *_, **__: {})
    monkeypatch.setattr(train, "evaluate", lambda *_, **__: None)
    changes = [f"data.manifest={small_set}", "data.phantom=", *(["select=last"] if name == "simsid" else [])]
    assert train.run(config(name, *changes), tmp_path) == 0
    assert {row.split for row in read_seen(tmp_path)} == READ[name]


def test_labels_of_val_that_choose_the_weights_are_declared():
    own = "evaluation.score=simsid"
    assert chosen_on_val(load_system(config("simsid", "select=auroc", own)))
    assert chosen_on_val(load_system(config("simsid", "select=auroc", "variant=official")))
    # The student's errors do not depend on the discriminator, whose weights alone the labels choose.
    assert not chosen_on_val(load_system(config("simsid", "select=auroc", "evaluation.score=patches")))
    assert not chosen_on_val(load_system(config("simsid", "select=last")))


@pytest.mark.parametrize("name", IMAGE_SYSTEMS)
def test_a_system_of_whole_images_does_not_take_abnormal_ones_as_normals(name, capfd, tmp_path):
    arguments = [
        f"--config=configs/{name}.py:smoke",
        "--config.data.normal_crops_only=true",
        f"--workdir={tmp_path}/run",
    ]
    assert exit_code(main, arguments) == 2
    assert "normal_crops_only" in capfd.readouterr().err and not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_key_of_every_preset_is_declared_and_within_its_bounds(name):
    presets = runpy.run_path(f"configs/{name}.py")["PRESETS"]
    assert {"paper", "small", "phantom", "smoke"} <= set(presets)
    for preset in presets:
        recipe.check(config(name, preset=preset))


@pytest.mark.parametrize("name", SYSTEMS)
def test_an_incomplete_recipe_fails_before_data_are_read(name):
    whole = config(name, "data.manifest=nowhere.csv")
    for key, _ in recipe.keys_of(whole):
        if key == "system":
            continue
        broken = recipe.from_json(recipe.to_json(whole))
        *sections, last = key.split(".")
        place = broken
        for section in sections:
            place = place[section]
        del place[last]
        with pytest.raises(InputError, match=r"lacks|data\.size"):
            load_system(broken)


def test_a_recipe_of_an_earlier_run_gets_the_keys_that_came_since(tmp_path):
    whole = config("amae")
    old = recipe.from_json(recipe.to_json(whole))
    del old.profile, old.evaluation.froc
    old.data.normal_crops_only = False
    (tmp_path / "config.json").write_text(recipe.to_json(old))
    assert dict(recipe.keys_of(recipe.read(tmp_path))) == dict(recipe.keys_of(whole))


def test_host_arrays_are_computed_again_when_code_below_their_function_changes(tmp_path, monkeypatch):
    def doubled(image):
        return 2 * image

    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.eye(8) * (i + 1))
    images = [Row(f"c{i}", f"p{i}", "train", 0, (str(tmp_path / f"{i}.npy"),)) for i in range(3)]
    cached = loader.Images(images, config("amae"), tmp_path / "cache")
    first = cached.host_arrays(np.arange(3), {"doubled": doubled})["doubled"]
    other = lambda image: pytest.fail("computed again")
    other.__module__, other.__qualname__ = doubled.__module__, doubled.__qualname__
    again = cached.host_arrays(np.arange(3), {"doubled": other})["doubled"]
    np.testing.assert_array_equal(first, again)
    monkeypatch.setattr(loader, "code_digest", lambda: "code that was changed")
    changed = lambda image: 3 * image
    changed.__module__, changed.__qualname__ = doubled.__module__, doubled.__qualname__
    np.testing.assert_array_equal(cached.host_arrays(np.arange(3), {"doubled": changed})["doubled"], 1.5 * first)


def test_a_stock_module_with_a_random_stream_trains_and_repeats():
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.layer, self.drop = nnx.Linear(8, 64, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x, train):
            return self.drop(self.layer(x), deterministic=not train)

    init, bind = network(lambda rngs: Net(rngs))
    params, stats = jax.jit(init)(jax.random.key(0))
    assert set(params) == {"layer"} and not jax.tree.leaves(stats)
    x = jnp.ones((2, 8))
    out = jax.jit(lambda key: bind(params, stats, key)(x, True))
    first, again, other = (np.asarray(out(jax.random.key(k))) for k in (1, 1, 2))
    assert (first == again).all() and (first == 0).any() and ((first == 0) != (other == 0)).any()
    net = bind(params, stats)
    assert (np.asarray(net(x, False)) != 0).all() and not jax.tree.leaves(stats_of(net))
