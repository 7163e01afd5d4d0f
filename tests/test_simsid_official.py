"""The published SimSID and SQUID: golden vectors of the official code, and a training step against PyTorch."""

from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from drawn import drawn
from test_weights import pth, safetensors

from configs import simsid as recipe
from jmae import weights
from jmae.errors import InputError, exit_code
from jmae.nn import simsid_weights
from jmae.nn.simsid_published import Bottleneck, Windows
from jmae.pretrained import with_pretrained
from jmae.recipe import brought_up, override
from jmae.system import load_system, network
from jmae.systems import simsid_published, simsid_score

GOLDEN = Path(__file__).parent / "golden" / "simsid_official.npz"
OFFICIAL = """
variant=official joint.widths=4,8,16,32,64 joint.joined=2 joint.slots=20 joint.heads=8 joint.top_k=4 joint.kept=1.0
model.discriminator=16,32,64,128,256 model.dtype=float32
""".split()
KEY = jax.random.key(0)


def config(*changes: str, preset: str = "smoke"):
    c = recipe.get_config(preset)
    override(c, {f"config.{k}": v for k, _, v in (change.partition("=") for change in changes)})
    return c


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


def state_dict(network: str) -> dict[str, np.ndarray]:
    start = f"state/{network}/"
    return {name.removeprefix(start): x for name, x in golden().items() if name.startswith(start)}


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """The golden state dicts as the code saves them."""
    folder = tmp_path_factory.mktemp("released")
    pth(folder / "model.pth", state_dict("generator"))
    pth(folder / "discriminator.pth", state_dict("discriminator"))
    return folder


def loaded(source: Path, size: str, name: str):
    """(networks, parameters, statistics) of the golden generator ("network") or discriminator."""
    nets = simsid_published.networks(config(*OFFICIAL, f"data.size={size}", "joint.judge=running"))
    net = {"network": nets.autoencoder, "discriminator": nets.discriminator}[name]
    weights = simsid_weights.read(source)
    params, stats = (simsid_weights.load(weights, {name: part})[name] for part in jax.eval_shape(net.init, KEY))
    return nets, params, stats


def within(found, expected):
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.long_but_first
def test_the_official_generator_is_reproduced(mode, released):
    nets, params, stats = loaded(released, "32,32", "network")
    run = jax.jit(lambda params, stats, image: nets.autoencoder.bind(params, stats)(image, train=mode == "train"))
    student, teacher, distillation = run(params, stats, golden()["image"])
    within(student, golden()[f"{mode}/student"])
    within(teacher, golden()[f"{mode}/teacher"])
    within(distillation, golden()[f"{mode}/distillation"])


@pytest.mark.parametrize("mode", ["eval", "train", "released"])
@pytest.mark.long_but_first
def test_the_official_discriminator_is_reproduced(mode, released):
    running, params, stats = loaded(released, "64,64", "discriminator")
    nets = simsid_published.networks(config(*OFFICIAL, "data.size=64,64"))
    image = golden()["judged_image"]
    options = {"train": mode == "train", "alone": mode == "released"}
    logits = jax.jit(lambda params, stats: nets.discriminator.bind(params, stats)(image, **options))(params, stats)
    within(logits, golden()["released/judged" if mode == "released" else f"{mode}/judged_together"])
    if mode == "released":  # the way of the scores; images in [0, 1]
        weights = {"params": {"discriminator": params}, "stats": {"discriminator": stats}}
        found, in_eval_mode = (
            jax.jit(partial(simsid_published.judged_by, of))(weights, (image + 1) / 2) for of in (nets, running)
        )
        within(found, golden()["released/judged"])
        within(in_eval_mode, golden()["eval/judged_together"])
        assert np.max(np.abs(in_eval_mode - logits)) > 0.01


# --- a training step against PyTorch ----------------------------------------------------------------------------------

SMALL = """
variant=official data.size=16,16 data.normalise=unit joint.widths=4,8,16 joint.joined=1 joint.slots=9 joint.top_k=4
joint.heads=8 joint.kept=1.0 joint.batch=4 joint.translation=0 joint.scaling=0 joint.lr=1.0 joint.lr_least=1.0
model.discriminator=4,8 model.dtype=float32 select=last
""".split()


def small_state(seed: int = 0) -> dict[str, np.ndarray]:
    """State dicts of generator and discriminator with the sizes of `SMALL`. Values have no bias."""
    shapes: dict[str, tuple[int, ...]] = {}

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.{kind}": (width,) for kind in ("weight", "bias", "running_mean", "running_var")})

    def conv(name: str, outputs: int, inputs: int, length: int = 3) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs, length, length), f"{name}.bias": (outputs,)})

    def double(name: str, inputs: int, outputs: int) -> None:
        for part, width in (("conv1.0", inputs), ("conv2.0", outputs), ("conv2.3", outputs)):
            conv(f"{name}.{part}", outputs, width)
            norm(f"{name}.{part[:-1]}{int(part[-1]) + 1}", outputs)

    double("in_conv.conv", 1, 4)
    for i in range(2):
        double(f"down_blocks.{i}.mpconv", 4 * 2**i, 8 * 2**i)
        for side in ("up_blocks", "teacher_ups"):
            double(f"{side}.{i}.conv", 24 if i == 0 else 8, 8 // 2**i)
    conv("out_conv.conv", 1, 4, 1)
    conv("teacher_out.conv", 1, 4, 1)
    block = "inpaint_block"
    shapes |= {f"{block}.bottleneck_conv1.0.weight": (4, 16, 1, 1)}
    norm(f"{block}.bottleneck_conv1.1", 4)
    shapes |= {f"{block}.attention.in_proj_weight": (48, 16), f"{block}.attention.in_proj_bias": (48,)}
    for name, shape in (("attention.out_proj", (16, 16)), ("ff.0", (4, 16)), ("ff.3", (16, 4))):
        shapes |= {f"{block}.{name}.weight": shape, f"{block}.{name}.bias": shape[:1]}
    for number in (1, 2):
        shapes |= {f"{block}.attn_norm{number}.{kind}": (16,) for kind in ("weight", "bias")}
    conv(f"{block}.bottleneck_conv2.0", 16, 7, 1)
    norm(f"{block}.bottleneck_conv2.1", 16)
    for window in range(4):
        shapes |= {f"{block}.memory.{window}.memMatrix": (9, 16), f"memory_blocks.0.memory.{window}.memMatrix": (9, 32)}
    conv("conv_model.0", 4, 1, 5)
    conv("conv_model.2", 8, 4, 5)
    norm("conv_model.3", 8)
    shapes |= {"regressor.weight": (1, 128), "regressor.bias": (1,)}
    rng, state = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        gain = (name.endswith("weight") and len(shape) == 1) or name.endswith("running_var")
        state[name] = (float(gain) + rng.normal(0, 0.3, shape)).astype(np.float32) ** (1 + name.endswith("var"))
    state[f"{block}.attention.in_proj_bias"][32:] = 0
    return state


def in_pytorch(state: dict[str, np.ndarray], image: np.ndarray, *, last: str = "tanh"):
    """One step of the released main.py with plain descent at rate 1 for the discriminator.

    Returns (parts of the losses, gradients by the names of the state dicts, vectors that a queue gets).
    """
    torch = pytest.importorskip("torch")
    f = torch.nn.functional
    sd = {name: torch.tensor(array, requires_grad="running" not in name) for name, array in state.items()}

    def norm(name, x):
        return f.batch_norm(x, None, None, sd[f"{name}.weight"], sd[f"{name}.bias"], training=True)

    def conv(name, x, **more):
        return f.conv2d(x, sd[f"{name}.weight"], sd.get(f"{name}.bias"), **more)

    def double(name, x, stride=1):
        x = f.relu(norm(f"{name}.conv1.1", conv(f"{name}.conv1.0", x, stride=stride, padding=1)))
        y = f.relu(norm(f"{name}.conv2.1", conv(f"{name}.conv2.0", x, padding=1)))
        return f.relu(x + norm(f"{name}.conv2.4", conv(f"{name}.conv2.3", y, padding=1)))

    def cut(x):  # into 2 x 2 windows
        b, c, h, w = x.shape
        return x.view(b, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 1, 3, 5).reshape(4 * b, c, h // 2, w // 2)

    def joined(x):
        b, c, h, w = x.shape
        return x.view(b // 4, 2, 2, c, h, w).permute(0, 3, 1, 4, 2, 5).reshape(b // 4, c, 2 * h, 2 * w)

    def read(name, query):  # the released shrinkage of the top 5 keeps four
        matrix = sd[f"{name}.memMatrix"]
        soft = torch.softmax(query @ matrix.T, 1)
        fifth = soft.topk(5).values[:, -1:]
        hard = torch.where(soft > fifth, soft, torch.zeros(())).detach()
        return (hard / hard.sum(1, keepdim=True) - soft.detach() + soft) @ matrix

    def remembered(name, x):
        flat = cut(x).reshape(len(x), 4, -1)
        reads = torch.stack([read(f"{name}.memory.{i}", flat[:, i]) for i in range(4)], 1)
        return joined(reads.reshape(-1, x.shape[1], *(n // 2 for n in x.shape[2:])))

    def bottleneck(x):
        query = f.relu(norm("inpaint_block.bottleneck_conv1.1", conv("inpaint_block.bottleneck_conv1.0", x)))
        query = query.reshape(len(x) // 4, 4, -1)
        reads = torch.stack([read(f"inpaint_block.memory.{i}", query[:, i]) for i in range(4)], 1)
        b, _, d = query.shape
        around = f.pad(reads.view(b, 2, 2, d), (0, 0, 1, 1, 1, 1)).unfold(1, 3, 1).unfold(2, 3, 1).reshape(4 * b, d, 9)
        around = around[:, :, [0, 1, 2, 3, 5, 6, 7, 8]].permute(2, 0, 1)
        at = lambda name: sd[f"inpaint_block.{name}"]
        found, _ = f.multi_head_attention_forward(
            query.reshape(1, 4 * b, d), around, around, d, 8, at("attention.in_proj_weight"),
            at("attention.in_proj_bias"), None, None, False, 0.0, at("attention.out_proj.weight"),
            at("attention.out_proj.bias"),
        )  # fmt: skip
        layer = lambda name, x: f.layer_norm(x, (d,), at(f"{name}.weight"), at(f"{name}.bias"))
        y = f.relu(layer("attn_norm1", found[0]) + reads.view(4 * b, d))
        hidden = f.relu(f.linear(y, at("ff.0.weight"), at("ff.0.bias")))
        y = f.relu(layer("attn_norm2", f.linear(hidden, at("ff.3.weight"), at("ff.3.bias"))) + y)
        bits = torch.tensor([[i >> k & 1 for k in (2, 1, 0)] for i in range(4)], dtype=torch.float32).repeat(b, 1)
        y = torch.cat([y.view(4 * b, -1, *x.shape[2:]), bits[:, :, None, None].expand(-1, -1, *x.shape[2:])], 1)
        return f.relu(norm("inpaint_block.bottleneck_conv2.1", conv("inpaint_block.bottleneck_conv2.0", y))), query

    def judged(x):
        x = f.leaky_relu(conv("conv_model.0", x, stride=2, padding=2), 0.2)
        x = f.leaky_relu(norm("conv_model.3", conv("conv_model.2", x, stride=2, padding=2)), 0.2)
        return f.linear(x.flatten(1), sd["regressor.weight"], sd["regressor.bias"])

    x = torch.tensor(image).permute(0, 3, 1, 2)
    first = double("in_conv.conv", cut(x))
    second = double("down_blocks.0.mpconv", first, 2)
    deepest = double("down_blocks.1.mpconv", second, 2)
    inpainted, queue = bottleneck(deepest)
    up = lambda x: f.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    y = double("up_blocks.0.conv", torch.cat([second, up(inpainted)], 1))
    y = remembered("memory_blocks.0", y)
    t = double("teacher_ups.0.conv", torch.cat([second.detach(), up(deepest.detach())], 1))
    differences = f.mse_loss(y, t)
    y, t = double("up_blocks.1.conv", up(joined(y))), double("teacher_ups.1.conv", up(joined(t)))
    differences = differences + f.mse_loss(y, t)
    activation = getattr(torch, last)
    made, taught = activation(conv("out_conv.conv", y)), activation(conv("teacher_out.conv", t))

    bce = lambda logits, label: f.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))
    of_judge = 0.005 * (bce(judged(x), 1.0) + bce(judged(made.detach()), 0.0))
    names = [name for name in sd if name.startswith(("conv_model", "regressor")) and sd[name].requires_grad]
    gradients = dict(zip(names, torch.autograd.grad(of_judge, [sd[name] for name in names]), strict=True))
    for name in names:
        sd[name] = (sd[name] - gradients[name]).detach()
    parts = {
        "reconstruction": f.mse_loss(made, x),
        "teacher": f.mse_loss(taught, x),
        "distillation": differences,
        "adversarial": bce(judged(made), 1.0),
    }
    weights = {"reconstruction": 10, "teacher": 0.01, "distillation": 0.001, "adversarial": 0.005}
    loss = sum(weight * parts[name] for name, weight in weights.items())
    of_generator = [name for name in sd if sd[name].requires_grad and name not in names]
    found = torch.autograd.grad(loss, [sd[name] for name in of_generator], allow_unused=True)
    gradients |= {
        name: torch.zeros_like(sd[name]) if one is None else one for name, one in zip(of_generator, found, strict=True)
    }
    parts |= {"loss": loss, "discriminator": of_judge}
    detached = lambda tree: {name: one.detach().numpy().copy() for name, one in tree.items()}
    return detached(parts), detached(gradients), queue.detach().numpy()


def gradients_kept() -> optax.GradientTransformation:
    """Plain descent that keeps the gradients as its state."""
    return optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), lambda grads, *_: (grads, grads))


@pytest.mark.parametrize(("queue", "last"), [(False, "tanh"), pytest.param(True, "sigmoid", marks=pytest.mark.long)])
@pytest.mark.long
def test_a_training_step_is_the_released_one(monkeypatch, queue, last):
    monkeypatch.setattr(simsid_published, "decayed_adam", lambda joint: gradients_kept())
    monkeypatch.setattr(simsid_published, "adam", lambda joint: gradients_kept())
    nets = simsid_published.networks(config(*SMALL, f"joint.queue={queue}", f"joint.activation={last}"))
    tensors = simsid_weights.Weights("", "", *simsid_weights.from_pytorch(small_state()))
    shapes = jax.eval_shape(lambda key: simsid_published.joint_init(nets, key, {}, 8), KEY)
    params, stats = (simsid_weights.load(tensors, part) for part in (shapes.params, shapes.stats))
    opt = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes.opt)
    state = shapes.replace(params=params, stats=stats, opt=opt, step=jnp.int32(4))  # two steps of the autoencoder
    image = np.random.default_rng(1).uniform(size=(4, 16, 16, 1)).astype(np.float32)
    step = jax.jit(lambda state, phase: simsid_published.joint_step(
        nets, state, {"image": image, "index": np.arange(4)}, KEY, {}, steps=9, phase=phase
    ), static_argnums=1)  # fmt: skip
    new, metrics = step(state, True)
    parts, gradients, vectors = in_pytorch(small_state(), 2 * image - 1 if last == "tanh" else image, last=last)
    for name, value in parts.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    gradients["inpaint_block.attention.in_proj_bias"][32:] = 0  # of the values, which have no bias here
    rows = {name for name in gradients if queue and "inpaint_block.memory" in name}  # these are no parameters
    expected, _ = simsid_weights.from_pytorch({name: x for name, x in gradients.items() if name not in rows})
    flat = {"/".join(str(step.key) for step in path): x for path, x in jax.tree.leaves_with_path(new.opt)}
    assert set(flat) == set(expected)
    for name, found in flat.items():
        bias_before_norm = name.endswith("conv/bias") and "memory" not in name  # its gradient is 0
        least = 1e-3 if bias_before_norm else 1e-4 * max(np.abs(expected[name]).max(), 1e-4)
        np.testing.assert_allclose(found, expected[name], rtol=0, atol=least, err_msg=name)
    if not queue:
        return
    # The third step of the autoencoder fills the rows from 8 on, round the end; the discriminator's own step none.
    vectors = vectors.reshape(4, 4, 4, 4).swapaxes(2, 3).reshape(4, 4, 16)  # channels last
    filled = np.array(stats["network"]["inpaint"]["memory"]["rows"])
    filled[:, [8, 0, 1, 2]] = vectors.swapaxes(0, 1)
    np.testing.assert_allclose(new.stats["network"]["inpaint"]["memory"]["rows"], filled, atol=1e-4)
    critic, _ = step(state, False)
    np.testing.assert_array_equal(
        critic.stats["network"]["inpaint"]["memory"]["rows"], stats["network"]["inpaint"]["memory"]["rows"]
    )


# --- weights ----------------------------------------------------------------------------------------------------------


def cut_to_32(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The golden discriminator, whose last layer is of 64 x 64 images, with that of 32 x 32 ones."""
    return state | {"regressor.weight": state["regressor.weight"].reshape(256, 4)[:, 0][None]}


@pytest.mark.parametrize("form", ["pth", "safetensors", "converted"])
@pytest.mark.long_but_first
def test_weights_of_the_recipe_make_the_official_images(tmp_path, form, capsys):
    source, write = tmp_path / "released", {"pth": pth, "safetensors": safetensors}.get(form, pth)
    source.mkdir()
    suffix = "safetensors" if form == "safetensors" else "pth"
    write(source / f"model.{suffix}", {f"module.{name}": x for name, x in state_dict("generator").items()})
    write(source / f"discriminator.{suffix}", cut_to_32(state_dict("discriminator")))
    if form == "converted":
        file = tmp_path / "simsid.safetensors"
        assert exit_code(weights.main, [str(source), f"--out={file}"]) == 0
        assert "skipped  inpaint_block.conv.weight  no part of the networks" in capsys.readouterr().out
        assert file.stat().st_mode == (source / "model.pth").stat().st_mode  # others may read it, too
        source = file
    given = ("data.size=32,32", "joint.judge=running", "data.normalise=unit", "select=last")
    c = config(*OFFICIAL, *given, f"model.weights={source}")
    stage = load_system(c).stages[0]
    ones = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), jax.eval_shape(lambda: stage.init(KEY, {}, 16)))
    state = with_pretrained(c, stage, ones, tmp_path)
    method = simsid_published.method(c)
    made = jax.jit(method.remake)({"joint": stage.result(state)}, (golden()["image"] + 1) / 2)
    within(2 * made - 1, golden()["eval/student"])
    assert (tmp_path / "weights.txt").read_text().startswith("loaded   discriminator/first/bias  16\n")


def test_weights_that_do_not_fit_are_one_line(tmp_path, released):
    c = config(*OFFICIAL, "data.size=64,64", f"model.weights={released}")
    stage = load_system(c).stages[0]
    state = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), jax.eval_shape(lambda: stage.init(KEY, {}, 16)))
    with pytest.raises(InputError, match=r"does not fit: network/inpaint/fc1/bias is \(4,\), the network's is \(16,\)"):
        with_pretrained(c, stage, state, tmp_path)
    with pytest.raises(InputError, match="is a folder without model"):
        simsid_weights.read(tmp_path)
    with pytest.raises(InputError, match="is of masked autoencoders"):
        weights.main([str(released), f"--out={tmp_path}/x.safetensors", "--heads=8"])
    with pytest.raises(InputError, match="has no weights of SimSID"):
        simsid_weights.read(safetensors(tmp_path / "other.safetensors", {"x": np.ones(3, np.float32)}))
    broken = state_dict("discriminator") | {"regressor.bias": np.full(1, np.nan, np.float16)}
    with pytest.raises(InputError, match="discriminator/out/bias has values that are not finite"):
        simsid_weights.read(safetensors(tmp_path / "broken.safetensors", broken))


def test_squid_lists_its_decoder_memories_the_other_way_round_and_with_the_channels_last():
    matrix = np.arange(2 * 8, dtype=np.float32).reshape(2, 8)
    names = {f"memory_blocks.{i}.memory.0.memMatrix": matrix + 100 * i for i in (2, 3)}
    names |= {f"up_blocks.{i}.conv.conv1.0.weight": np.ones((4, 2, 3, 3), np.float32) for i in range(4)}
    leaves, _ = simsid_weights.from_pytorch(names)
    np.testing.assert_array_equal(leaves["network/memories/0/rows"][0], matrix + 300)
    np.testing.assert_array_equal(leaves["network/memories/1/rows"][0], matrix + 200)
    names = {name.replace(".3.m", ".0.m").replace(".2.m", ".1.m"): x for name, x in names.items()}
    leaves, _ = simsid_weights.from_pytorch(names)
    turned = (matrix + 300).reshape(2, 4, 2).swapaxes(1, 2).reshape(2, 8)  # SimSID: channels first
    np.testing.assert_array_equal(leaves["network/memories/0/rows"][0], turned)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_presets_of_the_published_configurations():
    zhanglab, squid = recipe.get_config("zhanglab"), recipe.get_config("squid")
    for c, epochs, activation, kept, widths in (
        (zhanglab, 1000, "tanh", (1.0, 1.0), (16, 32, 64, 128, 256)),
        (squid, 200, "sigmoid", (0.95, 0.95), (16, 32, 64, 128, 128)),
    ):
        stage = load_system(c).stages[0]
        assert (c.variant, c.joint.queue, c.joint.slots, c.joint.top_k) == ("official", True, 200, 4)
        assert (c.joint.activation, c.joint.kept, c.joint.decoder_kept) == (activation, *kept)
        assert c.joint.tolerance == (0.005 if c is squid else 0), "half a point of AUROC, in SQUID's main.py"
        assert c.model.discriminator == widths and stage.steps(160) == 10 * epochs
        # The cosine reaches its least rate, a tenth, after 300 epochs.
        rate = lambda epoch, c=c, n=10 * epochs: simsid_published.rate(c.joint, 10 * epoch, n)
        np.testing.assert_allclose([rate(0), rate(150), rate(300)], [1e-4, 5.5e-5, 1e-5], rtol=1e-4)
        assert stage.checks[-1].every == 0  # the weights are chosen every epoch
    # The released configuration for CheXpert.
    c = recipe.get_config("paper")
    assert (c.joint.kept, c.joint.queue, c.joint.epochs, c.joint.lr_least, c.joint.judge) == (
        0.9,
        False,
        600,
        5e-5,
        "image",
    )


@pytest.mark.long
def test_initial_weights_are_those_of_pytorch():
    nets = simsid_published.networks(config(*SMALL, "joint.widths=8,16,32", "model.discriminator=16,64"))
    params = jax.jit(nets.autoencoder.init)(KEY)[0] | {"d": jax.jit(nets.discriminator.init)(KEY)[0]}

    def bounds(array, most):
        assert 0.95 * most < np.abs(array).max() <= most
        np.testing.assert_allclose(np.std(array), most / 3**0.5, rtol=0.1)

    bounds(params["down"][1]["middle"]["conv"]["kernel"], (9 * 32) ** -0.5)
    bounds(params["d"]["layers"][0]["conv"]["kernel"], (25 * 16) ** -0.5)
    bounds(params["d"]["layers"][0]["conv"]["bias"], (25 * 16) ** -0.5)
    block, d = params["inpaint"], 32  # 8 channels of 2 x 2 cells
    bounds(block["q"]["kernel"], (6 / (4 * d)) ** 0.5)  # Xavier, of the joint matrix
    bounds(block["kv"]["kernel"], (6 / (4 * d)) ** 0.5)
    bounds(block["out"]["kernel"], d**-0.5)
    bounds(block["memory"]["rows"], d**-0.5)
    assert not np.any(block["q"]["bias"]) and not np.any(block["out"]["bias"])
    assert np.all(block["norm1"]["scale"] == 1) and not np.any(block["norm1"]["bias"])


def test_ablations_leave_out_what_they_say():
    """Without a memory nothing reads it; without inpainting a window's features do not depend on other windows."""
    x = np.random.default_rng(0).normal(size=(4, 2, 2, 16)).astype(np.float32)
    other = x.copy()
    other[0] += 1

    def changed(slots: int = 5, **options) -> tuple[bool, np.ndarray]:
        make = lambda rngs: Bottleneck((2, 2), (2, 2), 16, slots, 2, 2, jnp.float32, **options, rngs=rngs)
        init, bind = network(make)
        params, stats = drawn(lambda: init(KEY))
        run = jax.jit(lambda x: bind(params, stats)(x, train=False))
        return "memory" in params, np.abs(run(x) - run(other)).max((1, 2, 3)) > 0

    assert changed()[1].all()
    has_memory, moved = changed(slots=0)
    assert not has_memory and moved.all()
    has_memory, moved = changed(inpainting=False)
    assert has_memory and list(moved) == [True, False, False, False]
    stages = load_system(config("memory.levels=0", "student.from_teacher=false")).stages
    assert [stage.name for stage in stages] == ["teacher", "student", "discriminator", "calibration"]
    student = jax.eval_shape(lambda: stages[1].init(KEY, {}, 8)).params["inpainting"]
    assert student["project"]["kernel"].shape == (16, 16)  # from the features of a patch alone


def test_the_official_variant_sees_raw_images():
    image = np.random.default_rng(0).uniform(0.2, 0.4, (2, 8, 8, 1)).astype(np.float32)
    seen, _ = simsid_score.normalised(config("variant=official"), jnp.asarray(image))
    np.testing.assert_array_equal(seen, image)
    seen, _ = simsid_score.normalised(config(), jnp.asarray(image))
    np.testing.assert_allclose(np.std(seen, (1, 2, 3)), 0.2, rtol=1e-4)


def test_a_run_of_an_earlier_version_keeps_its_norms_and_its_judge():
    old = config("variant=official", "joint.top_k=5")
    for key in ("norms", "judge", "queue", "activation", "decoder_kept", "inpainting"):
        del old.joint[key]
    c = brought_up(old)
    assert (c.joint.norms, c.joint.judge, c.joint.top_k) == ("sum", "running", 5)
    assert (c.joint.queue, c.joint.activation, c.joint.decoder_kept, c.joint.inpainting) == (False, "tanh", 1.0, True)


@pytest.mark.long
def test_the_decoder_s_memories_have_the_masked_shortcut_too():
    make = lambda rngs: Windows(
        (8, 8), 1, (2, 2), (4, 4, 16), 1, 3, 2, 2, 1.0, jnp.float32, decoder_share=1e-9, rngs=rngs
    )
    init, bind = network(make)
    params, stats = drawn(lambda: init(KEY))
    image = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)).astype(np.float32)
    run = jax.jit(lambda params, keys: bind(params, stats)(image, keys, train=False)[0])
    other = params | {"memories": jax.tree.map(lambda x: x + 0.5, params["memories"])}
    keys = jax.random.split(KEY, 2)
    np.testing.assert_array_equal(run(params, keys), run(other, keys))  # every cell keeps its own features
    assert not np.allclose(run(params, None), run(other, None))
