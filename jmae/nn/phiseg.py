"""PHiSeg: a segmentation network with latent variables at several resolutions, for images with any number of axes.

Baumgartner et al., "PHiSeg: Capturing Uncertainty in Medical Image Segmentation", MICCAI 2019, arXiv 1906.04045;
consulted: baumgach/PHiSeg-code. There are three networks: the posterior q(z | x, y), the prior p(z | x), which differs
in its input alone, and the likelihood p(y | z). Latent level 0 is the finest, and lists begin with it. Differences:

- layers whose result nothing reads are left out;
- `ours:` upsampling has half-pixel centres (`conv.upsample`);
- `ours:` the kernels of means and deviations start at 0, so that posterior and prior start equal. With He normal ones
  their divergence at the start is some 800 times the cross-entropy, and short trainings learn nothing;
- `ours:` running statistics come from the training path alone; the code adds those of a pass on the prior's samples.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key

from jmae.errors import InputError
from jmae.nn.conv import conv, upsample
from jmae.nn.unet import Convs, Encoder, check_size

Normal = tuple[Array, Array]  # mean and standard deviation of a diagonal normal
Sample = Callable[[int, Array, Array], Array]  # (number, mean, deviation of a latent level) -> z


def accumulated(logits: list[Float[Array, "b *size k"]]) -> list[Float[Array, "b *size k"]]:
    """Residual sums s_acc(i) = s_acc(i+1) + s(i), finest first. The first is the prediction (PHiSeg section 2.2)."""
    return list(accumulate(reversed(logits)))[::-1]


def nearest(x: Float[Array, "b *small c"], size: tuple[int, ...]) -> Float[Array, "b *size c"]:
    """Nearest-neighbour enlargement: each axis grows to a whole multiple of its length."""
    for axis, n in enumerate(size, 1):
        x = jnp.repeat(x, n // x.shape[axis], axis)
    return x


def sampler(keys: Key[Array, " b"]) -> Sample:
    """Draws z = mean + deviation * noise of a latent level. The noise of a sample comes from the sample's key."""

    def sample(level: int, mean: Array, deviation: Array) -> Array:
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, level), mean.shape[1:])
        return mean + deviation * jax.vmap(draw)(keys)

    return sample


class Latents(nnx.Module):
    """Posterior or prior: an encoder, then the normals of the latent levels, the deepest first.

    The normal of z_i depends on the features of its resolution and on z_(i+1).
    """

    def __init__(
        self,
        rank: int,
        channels: int,
        widths: tuple[int, ...],
        latent_levels: int,
        latent: int,
        base: int,
        dtype: DTypeLike,
        remat: bool,
        *,
        rngs: nnx.Rngs,
    ):
        deep, lifted = widths[-latent_levels:], latent * base
        joined = (*widths[: latent_levels - 1], deep[-1])
        pairs = list(zip(deep, joined, strict=True))[:-1]
        lengths = [1] * len(pairs) + [3]
        self.encoder = Encoder(rank, channels, widths, dtype, remat, rngs=rngs)
        self.lift = nnx.List([Convs(rank, latent, (lifted,) * 2, dtype, remat, rngs=rngs) for _ in pairs])
        self.join = nnx.List([Convs(rank, a + lifted, (b,) * 2, dtype, remat, rngs=rngs) for a, b in pairs])
        head = lambda a, k: conv(rank, a, latent, k, jnp.float32, rngs, bias=True, zeros=True)
        self.mean = nnx.List([head(a, k) for a, k in zip(joined, lengths, strict=True)])
        self.deviation = nnx.List([head(a, 1) for a in joined])

    def __call__(
        self,
        features: list[Float[Array, "b *_ _"]],
        sample: Sample,
        *,
        train: bool,
    ) -> tuple[list[Float[Array, "b *_ z"]], list[Normal]]:
        """(samples, normals) by level, from the features of all resolution levels."""
        normals: list[Normal] = []
        samples: list[Array] = []
        top = len(self.mean) - 1
        for i, x in zip(reversed(range(top + 1)), reversed(features), strict=False):
            if i < top:
                lifted = self.lift[i](upsample(samples[0], x.shape[1:-1]), train=train)
                x = self.join[i](jnp.concatenate([x, lifted], axis=-1), train=train)
            mean, deviation = self.mean[i](x), jax.nn.softplus(self.deviation[i](x))
            samples, normals = [sample(i, mean, deviation), *samples], [(mean, deviation), *normals]
        return samples, normals


class Likelihood(nnx.Module):
    """Logits of every latent level at the image's size, from the latent maps alone."""

    def __init__(
        self,
        rank: int,
        outputs: int,
        widths: tuple[int, ...],
        latent_levels: int,
        latent: int,
        dtype: DTypeLike,
        remat: bool,
        *,
        rngs: nnx.Rngs,
    ):
        above = len(widths) - latent_levels  # resolution levels finer than any latent map
        narrow = widths[:latent_levels]
        joined = (*widths[above:-1], narrow[-1])  # channels of each level's result
        row = lambda a, b, n: Convs(rank, a, (b,) * n, dtype, remat, rngs=rngs)
        self.enter = nnx.List([row(latent, a, 2) for a in narrow])
        self.climb = nnx.List([nnx.List([row(a, a, 1) for _ in range(above)]) for a in narrow])
        self.lift = nnx.List([row(b, a, 1) for a, b in zip(narrow, joined[1:], strict=False)])
        self.join = nnx.List([row(2 * a, b, 2) for a, b in zip(narrow[:-1], joined, strict=False)])
        self.out = nnx.List([conv(rank, a, outputs, 1, jnp.float32, rngs, bias=True) for a in joined])

    def __call__(
        self,
        samples: list[Float[Array, "b *_ z"]],
        size: tuple[int, ...],
        *,
        train: bool,
    ) -> list[Float[Array, "b *size outputs"]]:
        above = len(self.climb[0])
        sizes = check_size(size, above + len(samples))
        logits: list[Array] = []
        x: Array | None = None
        for i, z in reversed(list(enumerate(samples))):
            own = self.enter[i](z, train=train)
            for k, layer in enumerate(self.climb[i], 1):
                own = layer(upsample(own, sizes[i + above - k]), train=train)
            if x is None:
                x = own
            else:
                lifted = self.lift[i](upsample(x, sizes[i]), train=train)
                x = self.join[i](jnp.concatenate([own, lifted], axis=-1), train=train)
            logits = [nearest(self.out[i](x), size), *logits]
        return logits


class PHiSeg(nnx.Module):
    """PHiSeg: `widths` are the channels of the resolution levels.

    The deepest `latent_levels` of them carry latent maps of `latent` channels. With 7 and 5 levels, the maps have 2^-2
    to 2^-6 of the image's side. `check_size` says which sizes fit. Arithmetic has `dtype`; norms, latent variables and
    logits are float32.
    """

    def __init__(
        self,
        *,
        rank: int,
        channels: int,
        outputs: int = 2,
        widths: tuple[int, ...] = (32, 64, 128, 192, 192, 192, 192),
        latent_levels: int = 5,
        latent: int = 2,
        base: int = 32,
        dtype: DTypeLike = jnp.float32,
        remat: bool = False,
        rngs: nnx.Rngs,
    ):
        if not 1 <= latent_levels <= len(widths):
            raise InputError(f"latent_levels is {latent_levels}: from 1 to {len(widths)}, the number of widths")
        ladder = (widths, latent_levels, latent, base, dtype, remat)
        self.posterior = Latents(rank, channels + outputs, *ladder, rngs=rngs)
        self.prior = Latents(rank, channels, *ladder, rngs=rngs)
        self.likelihood = Likelihood(rank, outputs, widths, latent_levels, latent, dtype, remat, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b *size c"],
        y: Float[Array, "b *size outputs"],
        keys: Key[Array, " b"],
        *,
        train: bool,
    ) -> tuple[list[Float[Array, "b *size outputs"]], list[Normal], list[Normal]]:
        """(logits, q, p) by latent level, for the soft target `y` = (1 - y, y).

        One sample of the posterior is the input of the likelihood and the condition of the prior.
        """
        mode: dict[str, Any] = {"train": train}
        both = jnp.concatenate([x, y - 0.5], axis=-1)
        samples, q = self.posterior(self.posterior.encoder(both, **mode), sampler(keys), **mode)
        _, p = self.prior(self.features(x, **mode), lambda i, *_: samples[i], **mode)
        return self.likelihood(samples, x.shape[1:-1], **mode), q, p

    def features(self, x: Float[Array, "b *size c"], *, train: bool = False) -> list[Float[Array, "b *_ _"]]:
        """The prior's features of every resolution level, finest first. They serve any number of samples."""
        return self.prior.encoder(x, train=train)

    def generate(
        self, features: list[Float[Array, "b *_ _"]], keys: Key[Array, " b"]
    ) -> Float[Array, "b *size outputs"]:
        """Logits of one sample of each image, drawn from the prior."""
        samples, _ = self.prior(features, sampler(keys), train=False)
        return accumulated(self.likelihood(samples, features[0].shape[1:-1], train=False))[0]
