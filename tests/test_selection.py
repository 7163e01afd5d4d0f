"""The step whose weights are scored, chosen by the AUROC of unlabelled rows against known normals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import memmc_mae as recipe
from jmae import checkpoint, metrics, train
from jmae.data.cases import load_rows
from jmae.data.loader import Images
from jmae.errors import InputError, NonFiniteLoss, exit_code
from jmae.fitting import restore_results
from jmae.recipe import load, override
from jmae.run_folder import read_history
from jmae.selection import by_pseudo_auc, crop_scores
from jmae.system import Stage, State, Sweep, System, load_system

BEST = 4


def config(manifest, *changes: str, preset: str = "smoke"):
    c = recipe.get_config(preset)
    own = [f"data.manifest={manifest}", "data.phantom=", "data.size=8,8", "select=aucp", "select_every=2"]
    given = [*own, "checkpoint_every=3", "log_every=2", "evaluation.batch=4", *changes]
    override(c, {f"config.{key}": value for key, _, value in (change.partition("=") for change in given)})
    return c


def toy(broken: bool = False) -> System:
    """Counts its steps; scores by brightness, and at one step by darkness, which tells more here."""

    def init(key, results, n):
        return State(params={"w": jnp.float32(0)}, opt={}, stats={"seen": jnp.float32(0)}, step=jnp.int32(0))

    def step(state, batch, key, results, *, steps):
        stats = {"seen": state.stats["seen"] + jnp.mean(batch["image"])}
        new = state.replace(params={"w": state.params["w"] + 1}, stats=stats, step=state.step + 1)
        return new, {"loss": stats["seen"]}

    def score(results, batch, key, *, chunk=None):
        sign = jnp.where(results["train"]["params"]["w"] == BEST, -1, 1)
        value = sign * jnp.mean(batch["image"], (1, 2, 3)) / (0 if broken else 1)
        return {"maps": {}, "scores": {"toy": value}}

    rows = lambda rows, results: np.flatnonzero([row.split == "train" for row in rows])
    stage = Stage(name="train", batch=4, rows=rows, steps=lambda n: 7, init=init, step=step)
    return System(name="toy", stages=(stage,), score=score, uses=("train",), primary="toy")


def run(c, workdir, system):
    images = Images([row for row in load_rows(c) if row.split in ("train", "unlabeled")], c)
    return images, train.train(c, system, images, workdir)


@pytest.mark.parametrize("replicates", [1, 2])
@pytest.mark.long_but_first
def test_the_best_step_is_kept_scored_and_found_again_after_an_interruption(
    small_set, tmp_path, monkeypatch, replicates
):
    c = config(small_set, f"replicates={replicates}", "select_samples=12")
    images, results = run(c, tmp_path / "whole", system := by_pseudo_auc(c, toy()))
    assert np.all(results["train"]["params"]["w"] == BEST)
    history = [line for line in read_history(tmp_path / "whole" / "metrics.jsonl") if "aucp" in line]
    assert [line["step"] for line in history] == [2, 4, 6, 7] and history[-1]["best_step"] == BEST
    chosen = system.stages[0].checks[-1].rows(images.rows)
    assert len(set(chosen)) == 24
    truth = [images.rows[i].split == "unlabeled" for i in chosen]
    expected = metrics.auroc(truth, -images.image(chosen).mean((1, 2, 3)))
    np.testing.assert_allclose([line["aucp"] for line in history], [1 - expected, expected] + 2 * [1 - expected], 1e-6)

    real, count = checkpoint.save, []

    def save(*args, **kwargs):
        real(*args, **kwargs)
        count.append(args[1])
        if len(count) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        run(c, tmp_path / "cut", by_pseudo_auc(c, toy()))
    assert count == [3, 6]
    monkeypatch.setattr(checkpoint, "save", real)
    again = run(c, tmp_path / "cut", system)[1]
    found = restore_results(c, system, tmp_path / "cut")
    for other in (again, found):
        jax.tree.map(np.testing.assert_array_equal, other, results)


def test_scores_that_are_not_finite_choose_nothing(small_set, tmp_path):
    c = config(small_set)
    with pytest.raises(NonFiniteLoss, match="stage train, step 2: scores not finite"):
        run(c, tmp_path, by_pseudo_auc(c, toy(broken=True)))


def test_what_cannot_be_chosen_from_is_one_line_before_training(tools, tmp_path, capfd):
    manifest = tools.write_set(tmp_path / "set", {("train", 0): 4, ("test", 0): 2, ("test", 1): 2})
    c = config(manifest)
    with pytest.raises(InputError, match="select=aucp compares rows of split 'unlabeled' with rows of 'train'"):
        run(c, tmp_path / "run", by_pseudo_auc(c, toy()))
    assert not (tmp_path / "run").exists()
    for change, line in [
        ("select=dice", "select is 'dice': one of last, aucp"),
    ]:
        with pytest.raises(InputError, match=line):
            load_system(config(manifest, "data.size=32,32", change))
    c = load("configs/amae.py:smoke")
    c.variant, c.select, c.model.weights = "mae", "aucp", "runs/earlier"
    with pytest.raises(InputError, match=r"model\.weights stands for stage pretrain"):
        load_system(c)


@pytest.mark.parametrize(("variant", "score", "stage"), [
    ("report", "simsid", "discriminator"), ("report", "l1", "student"), ("official", "simsid", "joint"),
])  # fmt: skip
def test_simsid_chooses_in_the_stage_that_settles_its_score(variant, score, stage):
    c = load("configs/simsid.py:smoke")
    c.variant, c.evaluation.score, c.select = variant, score, "aucp"
    assert [s.name for s in load_system(c).stages if "unlabeled" in s.splits] == [stage]


@pytest.mark.long
def test_a_system_of_images_from_training_to_metrics(small_set, tmp_path):
    changes = """
    data.phantom= data.size=16,16 model.patch=8,8 model.width=8 model.heads=1 model.depth=1 model.memory=2
    model.decoder_width=8 model.decoder_heads=1 model.decoder_depth=1 model.long_skips=false train.batch=4 train.steps=4
    evaluation.masks=2 evaluation.batch=4 evaluation.window=3,3 evaluation.scales=1.0 evaluation.iou=0
    evaluation.maps=false select=aucp select_every=2 select_samples=6 checkpoint_every=2 log_every=2
    """.split()
    given = [f"--config.{change}" for change in [f"data.manifest={small_set}", *changes]]
    assert exit_code(train.main, ["--config=configs/memmc_mae.py:smoke", f"--workdir={tmp_path}", *given]) == 0
    history = [line for line in read_history(tmp_path / "metrics.jsonl") if "aucp" in line]
    best = max(history, key=lambda line: (line["aucp"], line["step"]))
    assert [line["step"] for line in history] == [2, 4]
    assert history[-1]["best_aucp"] == best["aucp"] and history[-1]["best_step"] == best["step"]
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text())["image"]["auroc"] is not None


@pytest.mark.long
def test_a_crop_s_score_is_the_mean_of_its_primary_map():
    c = config("", "evaluation.batch=4")
    score = lambda results, image, keys, groups: (image * results["factor"], jnp.ones((*image.shape[:-1], 1)))
    fuse = lambda results, averages, inside: {"maps": {"toy": jnp.where(inside, averages[..., 0], 0)}}
    sweep = Sweep(window=(8, 6, 4), stride=(4, 4, 2), repeats=2, score=score, fuse=fuse)
    system = System(name="toy", stages=(), uses=(), primary="toy", sweep=sweep)
    image = np.random.default_rng(0).random((3, 8, 6, 4, 2)).astype(np.float32)
    batch = {"image": jnp.asarray(image), "case": jnp.zeros((3, 2), jnp.uint32)}
    found = crop_scores(c, system, {"factor": jnp.float32(3)}, batch)
    np.testing.assert_allclose(found, 3 * image[..., 0].mean((1, 2, 3)), rtol=1e-5)
