"""The training loss and the fused multi-mask pass, 2D and 3D."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmae import reconstruct as module
from jmae.masking import fold_in, hidden, random_mask, run_masks, take
from jmae.nn.mae import MAE
from jmae.patches import patchify, unpatchify
from jmae.reconstruct import fitting

SIZES = {"2d": ((12, 20), (4, 5), 1), "3d": ((8, 6, 4), (2, 3, 2), 2)}


@pytest.fixture(params=SIZES, scope="module")
def case(request):
    size, patch, channels = SIZES[request.param]
    sizes = {"width": 24, "depth": 1, "heads": 2, "decoder_width": 12, "decoder_depth": 1, "decoder_heads": 2}
    mae = MAE(size=size, patch=patch, channels=channels, **sizes, rngs=nnx.Rngs(0))
    image = jnp.asarray(np.random.default_rng(0).normal(size=(3, *size, channels)), jnp.float32)
    return mae, image, patch


def reconstruct(mae, *arrays, **settings):
    graph, params = nnx.split(mae)
    return jax.jit(lambda p, *a: module.reconstruct(nnx.merge(graph, p).predictions, *a, **settings))(params, *arrays)


def jitted(mae, *arrays):
    graph, params = nnx.split(mae)
    return jax.jit(lambda p, *a: nnx.merge(graph, p)(*a))(params, *arrays)


def jitted_loss(mae, *arrays, **settings):
    graph, params = nnx.split(mae)
    return jax.jit(lambda p, *a: module.masked_loss(nnx.merge(graph, p), *a, **settings))(params, *arrays)


def by_hand(mae, image, keys, patch, masks, ratio, paste):
    """One mask after the other, moments by NumPy in float64."""
    graph, params = nnx.split(mae)

    @jax.jit
    def one(params, j):
        mae, patches = nnx.merge(graph, params), patchify(image, patch)
        kept = int(patches.shape[1] * (1 - ratio))
        keep, restore = random_mask(fold_in(keys, j), patches.shape[1], kept)
        prediction = mae.decode(mae.encode(take(mae.embed(patches), keep)), restore)
        if paste:
            prediction = jnp.where(hidden(restore, kept)[..., None], prediction, patches)
        return unpatchify(prediction, image.shape[1:-1], patch)

    drawn = [np.asarray(one(params, j), np.float64) for j in range(masks)]
    drawn = np.stack(drawn)
    return drawn.mean(0), drawn.var(0), ((drawn - np.asarray(image)) ** 2).mean(0)


@pytest.mark.parametrize("paste", [True, False])
@pytest.mark.long_but_first
def test_the_fused_pass_equals_one_call_a_mask(case, paste):
    mae, image, patch = case
    keys = jax.random.split(jax.random.key(1), 3)
    fused = reconstruct(mae, image, keys, patch=patch, ratio=0.7, masks=5, paste=paste)
    for ours, expected in zip(fused[:3], by_hand(mae, image, keys, patch, 5, 0.7, paste), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.long_but_first
def test_chunks_of_masks_give_the_same_result(case, chunk):
    mae, image, patch = case
    keys = jax.random.split(jax.random.key(1), 3)
    view = lambda chunk: reconstruct(mae, image, keys, patch=patch, ratio=0.7, masks=5, chunk=chunk)
    for ours, whole in zip(view(chunk), view(None), strict=True):
        np.testing.assert_allclose(ours, whole, atol=1e-5)


@pytest.mark.parametrize(("masks", "chunk"), [(8, None), (10, 3), (4, 4), (3, None)])
@pytest.mark.long_but_first
def test_images_that_share_their_masks_are_reconstructed_under_each(case, masks, chunk):
    """With a ratio of 0.7 a round has four masks. The spread is that of whole rounds."""
    mae, image, patch = case
    key, size = jax.random.key(4), image.shape[1:-1]
    mean_of = lambda image, made, hidden: jnp.mean(made, -1)
    settings = dict(patch=patch, ratio=0.7, masks=masks, chunk=chunk, measure=mean_of, paste=False)
    found = reconstruct(mae, image, key, **settings)
    patches = patchify(image, patch)
    visible = int(patches.shape[1] * 0.3)
    made = []
    for keep, restore in zip(*run_masks(key, jnp.arange(masks), patches.shape[1], visible), strict=True):
        own = lambda x: jnp.broadcast_to(x[None], (3, len(x)))
        made.append(np.asarray(unpatchify(jitted(mae, patches, own(keep), own(restore)), size, patch), np.float64))
    made = np.stack(made)
    over = tuple(range(2, made.ndim))
    near = lambda ours, expected: np.testing.assert_allclose(ours, expected, atol=1e-5)
    near(found.mean, made.mean(0))
    near(found.error, ((made - np.asarray(image)) ** 2).mean(0))
    rounds = lambda each: each[: masks // 4 * 4].reshape(-1, 4, 3).mean(1).T
    near(found.errors, rounds(((made - np.asarray(image)) ** 2).mean(over)))
    near(found.measures, rounds(made.mean(over)))


def test_visible_patches_are_pasted_exactly(case):
    mae, image, patch = case
    keys = jax.random.split(jax.random.key(1), 3)
    one = reconstruct(mae, image, keys, patch=patch, ratio=0.7, masks=1)
    n = patchify(image, patch).shape[1]
    _, restore = random_mask(fold_in(keys, 0), n, int(n * 0.3))
    visible = ~np.asarray(hidden(restore, int(n * 0.3)))
    assert np.array_equal(np.asarray(patchify(one.mean, patch))[visible], np.asarray(patchify(image, patch))[visible])
    assert (np.asarray(patchify(one.error, patch))[~visible] > 0).any(axis=1).all()


@pytest.mark.long_but_first
def test_a_case_scores_the_same_alone_and_in_a_batch(case):
    mae, image, patch = case
    keys = jax.random.split(jax.random.key(1), 3)
    together = reconstruct(mae, image, keys, patch=patch, ratio=0.7, masks=4)
    alone = reconstruct(mae, image[1:2], keys[1:2], patch=patch, ratio=0.7, masks=4)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a[1:2], b, atol=1e-5)


def test_the_training_loss_is_the_mean_over_masks_of_the_masked_error(case):
    mae, image, patch = case
    keys = jax.random.split(jax.random.key(2), 3)
    patches = np.asarray(patchify(image, patch), np.float64)
    n, losses = patches.shape[1], []
    for j in range(2):
        keep, restore = random_mask(fold_in(keys, j), n, int(n * 0.3))
        prediction = np.asarray(jitted(mae, patchify(image, patch), keep, restore), np.float64)
        mask = np.asarray(hidden(restore, int(n * 0.3)))
        losses.append(((prediction - patches) ** 2).mean(-1)[mask].mean())
    ours = jitted_loss(mae, image, keys, patch=patch, ratio=0.7, masks=2)
    assert float(ours) == pytest.approx(np.mean(losses), rel=1e-5)


def test_the_chunk_is_halved_until_the_pass_fits():
    class Program:
        def __init__(self, chunk):
            self.temp_size_in_bytes = 100 * chunk

        def compile(self):
            return self

        def memory_analysis(self):
            return self

    assert [fitting(Program, 10, limit)[1] for limit in (1000, 999, 500, 499, 150, 1)] == [10, 5, 5, 3, 1, 1]
