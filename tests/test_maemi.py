"""MAEMI against its specification: the paper's sizes, its procedure in NumPy and SciPy, a run on NIfTI files."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jmae import evaluate, recipe
from jmae.data.loader import case_words
from jmae.errors import InputError
from jmae.masking import case_keys, order_of, visible_tokens
from jmae.optim import warmup_cosine
from jmae.patches import patchify, unpatchify
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


@pytest.mark.parametrize(
    "patch, tokens, kept",
    [
        ((8, 8, 2), 2520, 251),
        ((6, 6, 4), 2240, 223),
        ((8, 8, 4), 1260, 125),
        ((12, 12, 4), 560, 55),
        ((24, 24, 4), 140, 13),
    ],
)
def test_the_papers_patches_leave_the_released_codes_tokens_visible(patch, tokens, kept):
    assert np.prod([240 // patch[0], 168 // patch[1], 8 // patch[2]]) == tokens
    assert visible_tokens(tokens, 0.9) == kept


def test_the_paper_preset_has_the_papers_schedule():
    c = config("paper")
    (stage,) = load_system(c).stages
    steps = stage.steps(744)
    assert (steps, stage.batch) == (124_000, 6)
    lr = warmup_cosine(c.train.lr, warmup=c.train.warmup * steps, steps=steps, least=c.train.lr_least)
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
        ("evaluation.stride", (64, 42), "a value an axis"),
        ("evaluation.stride", (33, 8, 4), "evaluation.stride"),
        ("evaluation.repeats", 0, "evaluation.repeats"),
        ("evaluation.error", "seen", "'all'"),
        ("evaluation.mask_ratio", 1.0, "mask ratio"),
        ("train.mask_ratio", 0.0, "mask ratio"),
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
    c = config(**(small | changes))
    system = load_system(c)
    state = jax.jit(partial(system.stages[0].init, results={}, n=4))(jax.random.key(1))
    noise = lambda x: x + 0.05 * np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32)
    return c, system, state._replace(params=jax.tree.map(noise, state.params))


def test_training_images_are_clipped_and_mirrored_on_the_first_two_axes():
    c, system, state = tiny(**{"data.clip": (0.25, 0.75)})
    step = jax.jit(partial(system.stages[0].step, steps=10))
    batch = lambda image: {"image": image, "index": np.arange(1, dtype=np.int32), "case": np.zeros((1, 2), np.uint32)}
    image = np.random.default_rng(0).uniform(-1, 2, (1, 8, 12, 4, 2)).astype(np.float32)
    loss = lambda image, key: float(step(state, batch(image), key)[1]["loss"])
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
    twice = np.zeros(padded.shape)
    key = case_keys(jax.random.key(c.seed), case_words(case)[None])[0]
    tokens = int(np.prod([w // p for w, p in zip(window, c.model.patch, strict=True)]))
    for sweep in range(repeats):
        part, cover, number = np.zeros(padded.shape), np.zeros(count.shape), 0
        for first, last in ((0, middle), (middle, padded.shape[1])):
            for p in ends(window[0], padded.shape[0], stride[0]):
                for l in ends(window[1], last - first, stride[1]):  # noqa: E741
                    for s in ends(window[2], padded.shape[2], stride[2]):
                        at = tuple(slice(e - w, e) for e, w in zip((p, first + l, s), window, strict=True))
                        image = padded[at] if c.compat.clip else np.clip(padded[at], *c.data.clip)
                        noise = jax.random.uniform(
                            jax.random.fold_in(jax.random.fold_in(key, sweep), number), (1, tokens)
                        )
                        kept = int(tokens * (1 - c.evaluation.mask_ratio))
                        order = np.argsort(np.asarray(noise), 1)
                        patches = patchify(image[None], c.model.patch)
                        prediction = mae(patches, order[:, :kept], np.argsort(order, 1))
                        difference = image - np.asarray(unpatchify(prediction, window, c.model.patch))[0]
                        error = [ndimage.minimum_filter(difference[..., k] ** 2, c.evaluation.filter) for k in (0, 1)]
                        part[at] += np.stack(error, -1)
                        cover[at] += 1
                        number += 1
        total, count, twice = total + part, count + cover, twice + part / (cover + 1)
    each = twice / (repeats * (cover + 1)) if c.compat.averaging else total / count
    fused = ndimage.minimum_filter(each.mean(-1), c.evaluation.filter)
    return fused[tuple(slice(low, n - high) for (low, high), n in zip(pad, fused.shape, strict=True))]


@pytest.mark.parametrize("rule", ["mean", "released"])
@pytest.mark.parametrize("shape, midline", [((13, 27, 7), 14), ((9, 19, 3), 9)])
def test_a_map_is_that_of_the_papers_procedure(rule, shape, midline):
    changes = {"compat.averaging": True, "compat.clip": True, "compat.position": True} if rule == "released" else {}
    c, system, state = tiny(**changes)
    codes = {"positions": released_positions} if rule == "released" else {}
    _, mae_of = masked_autoencoder(c, c.data.channels, **codes)
    array = np.random.default_rng(3).normal(0.5, 0.6, (*shape, 2)).astype(np.float32)
    run = evaluate.sweeper(c, system.sweep, {"train": {"params": state.params, "stats": {}}})
    found = run(prepared_like(array, midline), case_words("a case"))["maps"]["maemi"][0]
    mae = jax.jit(lambda *arguments: mae_of(state.params)(*arguments))
    expected = procedure(c, mae, array, midline, "a case")
    assert found.shape == shape and expected.max() > 1e-3
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def prepared_like(array, midline):
    """A prepared volume as far as the sweep looks at it."""
    return SimpleNamespace(array=array, side=1, midline=midline)
