"""Checkpoints in their true forms, written here byte by byte; hostile ones as tables; the golden state through all."""

import argparse
import io
import json
import math
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jmae.errors import InputError, exit_code
from jmae.nn.mae import MAE
from jmae.patches import grid_of, patchify, sincos_positions
from jmae.tensors import read_tensors, unpickle
from jmae.weights import load_weights, main, read_weights, resize_weights, summary

GOLDEN = Path(__file__).parent / "golden"
BFLOAT16 = np.dtype(jnp.bfloat16)
STORAGES = {"f4": "Float", "f8": "Double", "f2": "Half", "i8": "Long", "b1": "Bool", "V2": "BFloat16"}


# --- writers: the forms of torch.save ---------------------------------------------------------------------------------


class View(NamedTuple):
    """A tensor that shares the storage of a flat array, offset and strides in values."""

    base: np.ndarray
    offset: int
    size: tuple
    stride: tuple


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def storage(name, key, count):
    return b"(" + text("storage") + f"ctorch\n{name}Storage\n".encode() + text(key) + text("cpu") + dump(count) + b"tQ"


def rebuilt(
    stored, offset=0, size=(1,), stride=(1,), hooks=b"ccollections\nOrderedDict\n)R", name="_rebuild_tensor_v2"
):
    given = dump(offset) + dump(size) + dump(stride) + b"\x89" + hooks
    return f"ctorch._utils\n{name}\n(".encode() + stored + given + b"tR"


def dump(value, bases=None, legacy=False):
    """The operations that make a value, as torch.save writes them; bytes are operations already."""
    again = lambda item: dump(item, bases, legacy)
    pairs = lambda value: b"(" + b"".join(again(k) + again(v) for k, v in value.items()) + b"u"
    match value:
        case bytes():
            return value
        case None | True | False:
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        case int():
            return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return text(value)
        case OrderedDict():
            return b"ccollections\nOrderedDict\n)R" + pairs(value) + b"}" + text("_metadata") + b"}sb"
        case dict():
            return b"}" + pairs(value)
        case argparse.Namespace():
            return b"cargparse\nNamespace\n)\x81" + again(vars(value)) + b"b"
        case View():
            number = next((n for n, base in enumerate(bases) if base is value.base), len(bases))
            bases.extend([value.base] if number == len(bases) else [])
            stored = storage(STORAGES[value.base.dtype.str[1:]], str(number), value.base.size)
            stored = stored[:-2] + b"NtQ" if legacy else stored
            return rebuilt(stored, *value[1:])
        case tuple():
            return b"(" + b"".join(map(again, value)) + b"t"
        case list():
            return b"](" + b"".join(map(again, value)) + b"e"
    flat = np.ascontiguousarray(value).reshape(-1)
    return again(
        View(flat, 0, value.shape, tuple(s // value.itemsize for s in np.empty(value.shape, value.dtype).strides))
    )


def pth(path, value, *, big=False, compression=zipfile.ZIP_STORED, extra=()):
    """The zip form."""
    bases = []
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + dump(value, bases) + b".")
        archive.writestr("archive/byteorder", "big" if big else "little")
        for number, base in enumerate(bases):
            archive.writestr(f"archive/data/{number}", base.byteswap().tobytes() if big else base.tobytes())
        archive.writestr("archive/version", "3\n")
        for name, content in extra:
            archive.writestr(name, content)
    return path


def legacy(path, value):
    """The form before 1.6."""
    bases = []
    body = b"\x80\x02" + dump(value, bases, legacy=True) + b"."
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}]
    keys = [str(n) for n in range(len(bases))]
    parts = [*(pickle.dumps(x, 2) for x in head), body, pickle.dumps(keys, 2)]
    path.write_bytes(b"".join([*parts, *(struct.pack("<q", b.size) + b.tobytes() for b in bases)]))
    return path


def npz(path, value):
    np.savez(path, **value)
    return path


def safetensors(path, value):
    save_file({name: np.ascontiguousarray(array) for name, array in value.items()}, path)
    return path


def official(width=12, depth=2, decoder_width=8, decoder_depth=1, patch=(4, 4), channels=1, grid=(3, 3), decoder=True):
    """A random state dict with the names and shapes of facebookresearch/mae."""
    rng, values = np.random.default_rng(0), math.prod(patch) * channels
    shapes = {"cls_token": (1, 1, width), "patch_embed.proj.weight": (width, channels, *patch)}
    shapes |= {"patch_embed.proj.bias": (width,), "norm.weight": (width,), "norm.bias": (width,)}
    layers = [(f"blocks.{i}", width) for i in range(depth)]
    if decoder:
        layers += [(f"decoder_blocks.{i}", decoder_width) for i in range(decoder_depth)]
        shapes |= {"mask_token": (1, 1, decoder_width), "decoder_norm.weight": (decoder_width,)}
        shapes |= {"decoder_norm.bias": (decoder_width,), "decoder_embed.weight": (decoder_width, width)}
        shapes |= {"decoder_embed.bias": (decoder_width,), "decoder_pred.weight": (values, decoder_width)}
        shapes |= {"decoder_pred.bias": (values,)}
    for name, d in layers:
        dense = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
        shapes |= {f"{name}.{layer}.weight": shape for layer, shape in dense.items()}
        shapes |= {f"{name}.{layer}.bias": shape[:1] for layer, shape in dense.items()}
        shapes |= {f"{name}.{norm}.{kind}": (d,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
    state = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    for name, d in {"pos_embed": width, **({"decoder_pos_embed": decoder_width} if decoder else {})}.items():
        state[name] = np.pad(sincos_positions(grid, d), ((1, 0), (0, 0)))[None]
    return state


def in_transformers(state, age):
    """The same with the names of ViTMAE: of its 4th version, of its 5th's modules, as its 5th saves them."""
    old = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense"}
    old |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    new = old | {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    whole = {"cls_token": "vit.embeddings.cls_token", "pos_embed": "vit.embeddings.position_embeddings"}
    whole |= {f"norm.{kind}": f"vit.layernorm.{kind}" for kind in ("weight", "bias")}
    projection = "vit.embeddings.patch_embeddings.projection"
    whole |= {f"patch_embed.proj.{kind}": f"{projection}.{kind}" for kind in ("weight", "bias")}
    stacks = {"blocks": "vit.layers" if age == "new" else "vit.encoder.layer"}
    stacks |= {"decoder_blocks": "decoder.decoder_encoder.layer" if age == "saved" else "decoder.decoder_layers"}
    out = {}
    for name, array in state.items():
        stack, _, rest = name.partition(".")
        if stack not in stacks:
            out[whole.get(name, f"decoder.{name}")] = array
            continue
        number, _, rest = rest.partition(".")
        layer, _, kind = rest.rpartition(".")
        start = f"{stacks[stack]}.{number}"
        if layer == "attn.qkv":
            parts = ("q_proj", "k_proj", "v_proj") if age == "new" else ("query", "key", "value")
            middle = "attention" if age == "new" else "attention.attention"
            thirds = np.split(array, 3)
            out |= {f"{start}.{middle}.{part}.{kind}": third for part, third in zip(parts, thirds, strict=True)}
        else:
            out[f"{start}.{(new if age == 'new' else old)[layer]}.{kind}"] = array
    return out


# --- what the tests share ---------------------------------------------------------------------------------------------


def refused(path, *words, of=read_weights, **given):
    """The one line that refuses a file."""
    with pytest.raises(InputError) as caught:
        of(path, **given)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.count(":") >= 2 and message.isprintable(), message
    for word in words:
        assert word in message
    return message


def network(**config):
    """A freshly initialised network's parameters."""
    make = lambda: nnx.to_pure_dict(nnx.state(MAE(**config, rngs=nnx.Rngs(0)), nnx.Param))
    shapes, rng = nnx.eval_shape(make), np.random.default_rng(1)
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape, np.float32), shapes)


def leaves(params):
    return {"/".join(str(k.key) for k in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


HEADS = dict(heads=3, decoder_heads=2)
SIZES = dict(size=(12, 12), patch=(4, 4), channels=1, width=12, depth=2, decoder_width=8, decoder_depth=1) | HEADS


@pytest.fixture(scope="module")
def small():
    return network(**SIZES)


@pytest.fixture
def plain(tmp_path):
    return safetensors(tmp_path / "plain.safetensors", official())


def golden(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key.removeprefix("state/"): file[key] for key in file.files if key.startswith("state/")}


# --- forms and names --------------------------------------------------------------------------------------------------

PREFIXED = {
    "plain": lambda state: state,
    "model.": lambda state: {f"model.{name}": array for name, array in state.items()},
    "module.": lambda state: {f"module.{name}": array for name, array in state.items()},
    "module.model.": lambda state: {f"module.model.{name}": array for name, array in state.items()},
    "state/": lambda state: {f"state/{name}": array for name, array in state.items()},
    "transformers old": lambda state: in_transformers(state, "old"),
    "transformers new": lambda state: in_transformers(state, "new"),
    "transformers saved": lambda state: in_transformers(state, "saved"),
}
FORMS = {
    "npz": npz,
    "safetensors": safetensors,
    "pth": lambda path, state: pth(path, OrderedDict(state)),
    "pth in model": lambda path, state: pth(path, {"model": OrderedDict(state), "optimizer": {"state": {0: 1.5}}}),
    "pth in state_dict": lambda path, state: pth(path, {"epoch": 3, "state_dict": {"module": state}}),
    "legacy": lambda path, state: legacy(path, {"net": OrderedDict(state)}),
}


@pytest.mark.parametrize("name", ["mae2d", "mae3d"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_every_spelling_gives_the_same_parameters(tmp_path, form, name):
    state = golden(name)
    expected = read_weights(GOLDEN / f"{name}.npz")
    for spelling, rename in PREFIXED.items():
        path = FORMS[form](tmp_path / f"any.{'npz' if form == 'npz' else 'name'}", rename(state))
        found = read_weights(path, size=expected.size, heads=3, decoder_heads=4)
        assert found.leaves.keys() == expected.leaves.keys(), spelling
        for leaf, array in expected.leaves.items():
            np.testing.assert_array_equal(found.leaves[leaf], array, err_msg=f"{spelling} {leaf}")
        assert found.known() == expected.known()
        for code in ("pos_embed", "decoder_pos_embed"):
            np.testing.assert_array_equal(found.codes[code], state[code][0])


def test_what_stands_beside_the_network_is_named_and_left_out(tmp_path):
    beside = {"optimizer": {"state": {0: {"step": np.zeros(1, "f4")}}}, "epoch": 3, "scaler": {}}
    path = pth(tmp_path / "a.pth", beside | {"model": official() | {"head.weight": np.zeros((2, 12), "f4")}})
    skipped = {entry.name: entry.source for entry in read_weights(path).skipped}
    assert skipped == {"epoch": None, "optimizer": None, "scaler": None, "head.weight": (2, 12)}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_machine_reads_data_as_pickle_does(protocol):
    shared = [1, 2.5, "é", None, *([b"raw"] if protocol > 2 else [])]
    data = {"a": shared, "b": (shared, True, False, -1, 255, 256, 2**40, -(2**70)), "c": {}, 4: ((), (1,), (1, 2, 3))}
    found = unpickle(io.BytesIO(pickle.dumps(data, protocol)), {})
    assert found == data and found["a"] is found["b"][0]


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2", "i8", "?", BFLOAT16])
def test_values_of_every_type_in_either_byte_order(tmp_path, dtype, big):
    array = np.arange(6).reshape(2, 3).astype(dtype)
    found = read_tensors(pth(tmp_path / "a.pth", {"w": array, "s": array[1, 1, ...]}, big=big)).tensors
    assert found["w"].dtype == array.dtype and found["s"].shape == ()
    np.testing.assert_array_equal(found["w"].astype("f8"), array.astype("f8"))


@pytest.mark.parametrize("write", [pth, legacy])
def test_tensors_that_share_a_storage_transposed_cut_and_empty(tmp_path, write):
    base = np.arange(60, dtype="f4")
    cube = base.reshape(3, 4, 5)
    views = {
        "whole": (View(base, 0, (3, 4, 5), (20, 5, 1)), cube),
        "transposed": (View(base, 0, (5, 3, 4), (1, 20, 5)), cube.transpose(2, 0, 1)),
        "cut": (View(base, 21, (2, 2, 2), (20, 10, 1)), cube[1:, ::2, 1:3]),
        "empty": (View(base, 60, (0, 3), (3, 1)), np.zeros((0, 3))),
    }
    found = read_tensors(write(tmp_path / "a.pth", {name: view for name, (view, _) in views.items()})).tensors
    for name, (_, expected) in views.items():
        np.testing.assert_array_equal(found[name], expected)


def test_half_precision_is_read_and_its_position_codes_are_known(tmp_path):
    for dtype in ("f2", BFLOAT16):
        state = {name: array.astype(dtype) for name, array in official().items()}
        found = read_weights(pth(tmp_path / "a.pth", state), **HEADS)
        assert found.positions() is sincos_positions
        expected = state["blocks.1.mlp.fc1.weight"].T.astype("f4")
        np.testing.assert_array_equal(found.leaves["encoder/stack/fc1/kernel"][1], expected)


# --- what a file tells of its network ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "width", "heads"),
    [
        ("mae_vit_small_patch16_dec512d2b_448", 384, 6),
        ("mae_vit_base_patch16", 768, 12),
        ("mae_vit_base_patch16_dec512d8b", 768, 12),
        ("mae_vit_large_patch16", 1024, 16),
        ("mae_vit_huge_patch14", 1280, 16),
        ("mae_vit_base_patch16_dec256d4b", 768, None),  # nobody published it
        ("mae_vit_base_patch16", 384, None),  # not what the name says
        ("vit_base_patch16", 768, None),
    ],
)
def test_head_counts_of_published_names(tmp_path, model, width, heads):
    state = {name: a for name, a in official(width=width, depth=1).items() if "norm" in name or "cls" in name}
    state["blocks.0.mlp.fc1.weight"] = np.ones((4, width), "f4")
    found = read_weights(pth(tmp_path / "a.pth", {"model": state, "args": argparse.Namespace(model=model)}))
    assert (found.heads, found.decoder_heads) == (heads, heads and 16)


def test_head_counts_are_given_told_or_asked_for(tmp_path, small, plain):
    for of in (read_weights, lambda path, **given: load_weights(path, small, **given)):
        refused(plain, "5 heads do not divide its width 12", of=of, heads=5, decoder_heads=2)
        refused(plain, "3 decoder_heads do not divide its decoder_width 8", of=of, heads=3, decoder_heads=3)
        refused(plain, "0 heads", of=of, heads=0, decoder_heads=2)
    load = lambda path, **given: load_weights(path, small, **given)
    refused(plain, "numbers of heads", "--heads", "--decoder-heads", of=load)
    refused(plain, "numbers of heads", of=load, heads=3)
    refused(plain, "numbers of heads", of=load, part="blocks")
    load(plain, part="blocks", heads=3)
    load(plain, **HEADS)
    own = {"num_heads": np.array(3), "decoder_num_heads": np.array(2)}
    told = npz(tmp_path / "told.npz", own | {f"state/{name}": array for name, array in official().items()})
    load(told)
    refused(told, "trained with 3 heads, not 4", of=load, heads=4)


def test_sizes_of_the_network_in_the_file(tmp_path):
    state = official(width=18, depth=3, patch=(2, 4, 1), channels=2, grid=(2, 2, 2), decoder_width=12)
    path = pth(tmp_path / "a.pth", state)
    config = dict(width=18, depth=3, patch=(2, 4, 1), channels=2, size=(4, 8, 2), mlp_ratio=4.0, heads=3)
    config |= dict(decoder_width=12, decoder_depth=1, decoder_heads=2, positions=sincos_positions)
    assert read_weights(path, **HEADS).config() == config
    refused(path, "8 tokens", of=read_weights, size=(4, 8, 4))
    with pytest.raises(InputError, match="does not tell heads, decoder_heads"):
        read_weights(path).config()


def test_a_grid_that_nothing_tells_is_asked_for(tmp_path):
    state = golden("mae3d")
    path = pth(tmp_path / "a.pth", state)
    with pytest.raises(InputError, match=r"does not tell size: pass it"):
        read_weights(path, heads=3, decoder_heads=4).config()
    found = read_weights(path, heads=3, decoder_heads=4, size=(32, 24, 4)).config()["positions"]
    np.testing.assert_array_equal(found((4, 3, 2), 36), state["pos_embed"][0, 1:])
    np.testing.assert_array_equal(found((4, 3, 2), 24), state["decoder_pos_embed"][0, 1:])
    with pytest.raises(InputError, match=r"its position codes are for the grid \(4, 3, 2\)"):
        found((3, 4, 2), 36)


def test_a_decoder_trained_on_normalised_patches_is_warned_of(tmp_path, small, capsys):
    for norm, words in ((True, "was trained on normalised"), (None, "the file does not say"), (False, "")):
        args = argparse.Namespace(**({} if norm is None else {"norm_pix_loss": norm}), lr=1e-3, device="cuda")
        path = pth(tmp_path / "a.pth", {"model": official(), "args": args})
        load_weights(path, small, **HEADS)
        warned = capsys.readouterr().err
        assert (words in warned and "warning" in warned) if words else not warned
        load_weights(path, small, part="encoder", heads=3)
        assert not capsys.readouterr().err


# --- into a network ---------------------------------------------------------------------------------------------------


def loaded(path, target, **given):
    """(names of the leaves that are the file's, report); all others are the target's own arrays, bit by bit."""
    params, report = load_weights(path, target, **({"heads": 3, "decoder_heads": 2} | given))
    before, after = leaves(target), leaves(params)
    assert jax.tree.structure(params) == jax.tree.structure(target)
    expected = read_weights(path).leaves
    new = {name for name in after if after[name] is not before[name]}
    for name in new:
        np.testing.assert_array_equal(after[name], expected[name])
    return new, report


def test_parts_change_their_own_parameters_and_no_other(small, plain):
    blocks, report = loaded(plain, small, part="blocks")
    parts = ("norm1", "qkv", "out", "norm2", "fc1", "fc2")
    assert blocks == {f"encoder/stack/{p}/{k}" for p in parts for k in ("bias", "scale" if "n" in p[:1] else "kernel")}
    assert summary(report) == f"24 loaded, 0 resized, {len(official()) - 24} skipped, {len(leaves(small)) - 12} kept"
    encoder, _ = loaded(plain, small, part="encoder")
    rest = {"class_token", "patch_embed/kernel", "patch_embed/bias", "encoder_norm/scale", "encoder_norm/bias"}
    assert encoder == blocks | rest
    mae, report = loaded(plain, small)
    assert mae == set(leaves(small))
    assert summary(report) == f"{len(official())} loaded, 0 resized, 0 skipped, 0 kept"
    with pytest.raises(InputError, match="part 'decoder' is unknown"):
        load_weights(plain, small, part="decoder")


def test_the_report_names_every_tensor_with_its_shapes(small, plain):
    _, report = loaded(plain, small, part="blocks")
    assert {e.name: e.source for e in report if e.source} == {name: a.shape for name, a in official().items()}
    qkv = next(entry for entry in report if entry.name == "blocks.1.attn.qkv.weight")
    assert qkv == ("loaded", "blocks.1.attn.qkv.weight", (36, 12), (12, 36), "encoder/stack/qkv/kernel[1]")
    assert {e.status for e in report if e.name == "mask_token"} == {"skipped", "kept"}  # in the file, in the network


def test_encoder_only_files_load_as_encoder_and_say_what_they_lack(tmp_path, small):
    path = pth(tmp_path / "a.pth", {"model": official(decoder=False)})
    assert len(loaded(path, small, part="encoder")[0]) == 17
    refused(path, "has no decoder", of=lambda path: load_weights(path, small, **HEADS))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(width=24), ("class_token has the shape (1, 1, 24), that of the network (1, 1, 12)", "more")),
        (dict(depth=3), ("encoder/stack/fc1/bias has the shape (3, 48), that of the network (2, 48)",)),
        (dict(decoder_depth=2), ("decoder/stack/fc1/bias has the shape (2, 32), that of the network (1, 32)",)),
        (dict(channels=3), ("its patches are (4, 4) with 3 channels, those of the network (4, 4) with 1",)),
        (dict(patch=(2, 8)), ("(2, 8)", "(4, 4)")),  # of equal shape here
        (dict(grid=(4, 4)), ("pos_embed (17, 12) is not the network's code of the grid (3, 3)",)),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(tmp_path, small, change, words):
    path = pth(tmp_path / "a.pth", official(**change))
    sizes = dict(size=(12, 12), patch=(4, 4), channels=1)
    refused(path, "does not fit", *words, of=lambda path: load_weights(path, small, **HEADS, **sizes))


@pytest.mark.parametrize("gone", ["blocks.1.attn.proj.bias", "blocks.0.norm1.weight", "norm.bias", "decoder_pred.bias"])
def test_what_is_missing_is_refused(tmp_path, small, gone):
    state = official()
    del state[gone]
    refused(pth(tmp_path / "a.pth", state), of=lambda path: load_weights(path, small, **HEADS))


def test_tensors_that_make_it_another_network_are_refused(tmp_path):
    for name in ("blocks.0.ls1.gamma", "blocks.1.attn.q_norm.weight", "reg_token", "norm_pre.weight"):
        refused(pth(tmp_path / "a.pth", official() | {name: np.ones(12, "f4")}), name, "does not belong to")
    twice = official() | {"module.norm.bias": np.ones(12, "f4")}
    refused(pth(tmp_path / "a.pth", twice), "norm.bias", "are the same parameter")
    refused(pth(tmp_path / "a.pth", {"backbone.w": np.ones(3, "f4")}), "no blocks", "backbone.w")
    quantised = official() | {"blocks.0.mlp.fc1.weight": np.ones((48, 12), "i8")}
    refused(pth(tmp_path / "a.pth", quantised), "blocks.0.mlp.fc1.weight has the type int64")
    for bad in (np.nan, np.inf, 1e300):
        state = official() | {"norm.bias": np.full(12, bad)}
        refused(pth(tmp_path / "a.pth", state), "encoder_norm/bias has values that are not finite")


# --- position codes and other sizes -----------------------------------------------------------------------------------


def test_codes_in_another_order_are_refused_taken_along_or_left(small, tmp_path):
    weights = read_weights(GOLDEN / "mae3d.npz")
    target = network(**weights.config())
    with pytest.raises(InputError, match=r"pos_embed \(25, 36\) is not the network's code of the grid \(4, 3, 2\)"):
        load_weights(weights, target)
    taken, report = load_weights(weights, target, positions=weights.positions())
    assert {e.status for e in report if "pos_embed" in e.name} == {"loaded"}
    left, report = load_weights(weights, target, adapt=True)
    assert [(e.status, e.source) for e in report if "pos_embed" in e.name] == [
        ("skipped", (1, 25, 36)),
        ("skipped", (1, 25, 24)),
    ]
    jax.tree.map(np.testing.assert_array_equal, taken, left)


def test_without_position_codes_a_file_is_refused(tmp_path, small):
    state = {name: array for name, array in official().items() if "pos_embed" not in name}
    load = lambda path: load_weights(path, small, **HEADS, size=(12, 12))
    refused(pth(tmp_path / "a.pth", state), "no position code pos_embed", "no position code decoder_pos_embed", of=load)
    load_weights(tmp_path / "a.pth", small, **HEADS, size=(12, 12), adapt=True)


def test_the_class_tokens_own_code_is_added_to_it(tmp_path):
    state, row = official(), np.arange(12, dtype="f4")
    state["pos_embed"] = state["pos_embed"] + np.pad(row[None], ((0, 9), (0, 0)))
    found = read_weights(pth(tmp_path / "a.pth", state), **HEADS)
    np.testing.assert_array_equal(found.leaves["class_token"], state["cls_token"] + row)
    assert found.positions() is sincos_positions
    state["decoder_pos_embed"] = state["decoder_pos_embed"] + 1  # has no such place
    found = read_weights(pth(tmp_path / "a.pth", state), **HEADS)
    with pytest.raises(InputError, match="the position codes of its decoder do not fit"):
        found.positions()
    assert found.positions("encoder") is sincos_positions


def test_the_computed_codes_are_computed_for_another_size_on_request(tmp_path, small):
    path = pth(tmp_path / "a.pth", official(grid=(5, 5)))
    params, report = load_weights(path, small, **HEADS, size=(12, 12), adapt=True)
    resized_codes = [(e.name, e.source, e.target) for e in report if e.status == "resized"]
    assert resized_codes == [("pos_embed", (1, 26, 12), (10, 12)), ("decoder_pos_embed", (1, 26, 8), (10, 8))]
    jax.tree.map(np.testing.assert_array_equal, params, loaded_tree(path, small))


def loaded_tree(path, like):
    found = read_weights(path).leaves
    names = leaves(like)
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in names])


@pytest.mark.parametrize(
    ("patch", "channels"), [((4, 4), 3), ((8, 2), 1), ((3, 5), 1), ((4, 4, 2), 1), ((6, 3, 4), 2)], ids=str
)
def test_patches_of_another_kind_are_loaded_on_request(tmp_path, patch, channels):
    path = pth(tmp_path / "a.pth", official())
    size = tuple(2 * p for p in patch)
    config = SIZES | dict(size=size, patch=patch, channels=channels)
    params, report = load_weights(
        path, network(**config), **HEADS, size=size, patch=patch, channels=channels, adapt=True
    )
    values = math.prod(patch) * channels
    assert params["patch_embed"]["kernel"].shape == (values, 12) and params["predict"]["kernel"].shape == (8, values)
    changed = {e.name for e in report if e.status == "resized"}
    assert {"patch_embed.proj.weight", "decoder_pred.weight", "decoder_pred.bias"} <= changed
    assert params["predict"]["bias"].flags.c_contiguous and params["predict"]["kernel"].dtype == np.float32


def embed(kernel, patch_of_voxels):
    """Response of a patch embedding to one patch (*patch, channels)."""
    return patch_of_voxels.reshape(-1) @ kernel


def test_the_response_to_equal_channels_and_to_equal_slices_stays():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((4 * 3 * 2, 5), np.float32)
    grey = rng.standard_normal((4, 3, 1), np.float32)
    expected = embed(kernel, np.repeat(grey, 2, -1))
    for channels in (1, 3):
        wider = resize_weights(kernel, (4, 3), 2, (4, 3), channels, embedding=True)
        np.testing.assert_allclose(embed(wider, np.repeat(grey, channels, -1)), expected, rtol=1e-4, atol=1e-5)
    volume = resize_weights(kernel, (4, 3), 2, (4, 3, 6), 2, embedding=True)
    deep = np.repeat(np.repeat(grey, 2, -1)[:, :, None], 6, axis=2)
    np.testing.assert_allclose(embed(volume, deep), expected, rtol=1e-4, atol=1e-5)
    back = resize_weights(volume, (4, 3, 6), 2, (4, 3), 2, embedding=True)
    np.testing.assert_allclose(back, kernel, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch", [(8, 8), (2, 4), (7, 3)])
def test_a_patch_of_another_size_is_seen_as_the_old_size_by_linear_resizing(patch):
    rng = np.random.default_rng(0)
    kernel, image = rng.standard_normal((4 * 6 * 2, 5), np.float32), rng.standard_normal((*patch, 2), np.float32)
    found = embed(resize_weights(kernel, (4, 6), 2, patch, 2, embedding=True), image)
    np.testing.assert_allclose(found, embed(kernel, jax.image.resize(image, (4, 6, 2), "linear")), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch", [(8, 8), (2, 4), (7, 3)])
def test_a_prediction_of_another_size_is_the_old_one_by_linear_resizing(patch):
    rng = np.random.default_rng(0)
    kernel, latent = rng.standard_normal((5, 4 * 6 * 2), np.float32), rng.standard_normal(5, np.float32)
    found = latent @ resize_weights(kernel.T, (4, 6), 2, patch, 2, embedding=False).T
    old = jax.image.resize((latent @ kernel).reshape(4, 6, 2), (*patch, 2), "linear")
    np.testing.assert_allclose(found.reshape(*patch, 2), old, rtol=1e-4, atol=1e-4)


def test_a_prediction_of_more_channels_and_slices_repeats_the_old_one():
    bias = np.arange(4 * 3 * 2, dtype="f4")
    found = resize_weights(bias, (4, 3), 2, (4, 3, 5), 3, embedding=False).reshape(4, 3, 5, 3)
    expected = bias.reshape(4, 3, 2).mean(-1)
    np.testing.assert_allclose(found, np.broadcast_to(expected[:, :, None, None], found.shape), rtol=1e-6)


# --- hostile files ----------------------------------------------------------------------------------------------------

GLOBAL = "c{}\n{}\n".format


def call(module, name, *given):
    return GLOBAL(module, name).encode() + b"(" + b"".join(given) + b"tR"


def tensor(count=4, offset=0, size=(4,), stride=(1,), kind="Float", key="0"):
    return rebuilt(storage(kind, key, count), offset, size, stride)


def attacks(canary):
    """Operations that would run a command if anything did, by what they try."""
    run = text(f"touch {canary}")
    system = call("os", "system", run)
    code = text(f"__import__('pathlib').Path({str(canary)!r}).touch()")
    rebuild = GLOBAL("torch._utils", "_rebuild_tensor_v2").encode()
    namespace = GLOBAL("argparse", "Namespace").encode()
    return {
        "os.system": system,
        "posix.system": call("posix", "system", run),
        "nt.system": call("nt", "system", run),
        "subprocess.Popen": call("subprocess", "Popen", b"(" + run + b"t"),
        "subprocess as new object": GLOBAL("subprocess", "Popen").encode() + b"(" + run + b"t\x81",
        "new object with keywords": GLOBAL("subprocess", "Popen").encode() + b")}\x92",
        "eval": call("builtins", "eval", code),
        "exec": call("builtins", "exec", code),
        "eval of Python 2": call("__builtin__", "eval", code),
        "import": call("builtins", "__import__", text("os")),
        "getattr": call("builtins", "getattr", GLOBAL("collections", "OrderedDict").encode(), text("__class__")),
        "operator.attrgetter": call("operator", "attrgetter", text("system")),
        "copyreg": call("copyreg", "_reconstructor", namespace, GLOBAL("builtins", "object").encode(), b"N"),
        "dotted name": b"\x8c\x0bcollections\x8c\x14OrderedDict.__init__\x93)R",
        "stack global": text("os") + text("system") + b"\x93(" + run + b"tR",
        "stack global of no text": b"K\x01" + text("system") + b"\x93(" + run + b"tR",
        "instance": b"(" + run + b"ios\nsystem\n",
        "object": b"(" + GLOBAL("os", "system").encode() + run + b"o",
        "extension registry": b"\x82\x01(" + run + b"tR",
        "in a tensor's hooks": rebuilt(storage("Float", "0", 4), 0, (4,), (1,), hooks=system),
        "in a storage's device": rebuilt(storage("Float", "0", 4).replace(text("cpu"), system)),
        "as a storage's type": rebuilt(storage("Float", "0", 4).replace(b"ctorch\nFloatStorage\n", b"cos\nsystem\n")),
        "in the arguments": b"}(" + text("args") + namespace + b")\x81}" + text("x") + system + b"sbu",
        "arguments called": namespace + b"(" + run + b"tR",
        "arguments made with values": namespace + b"(" + run + b"t\x81",
        "state of a function": rebuild + b"}" + text("__code__") + run + b"sb",
        "state of a class": namespace + b"}" + text("__setstate__") + b"Nsb",
        "state in slots": namespace + b")\x81N}" + text("__class__") + run + b"s\x86b",
        "state set by a global": namespace + b")\x81" + GLOBAL("os", "system").encode() + b"b",
        "torch.load": call("torch", "load", run),
        "storage from bytes": call("torch.storage", "_load_from_bytes", run),
        "tensor from numpy": call("torch._utils", "_rebuild_device_tensor_from_numpy", run, run, run, b"\x89"),
        "numpy's reconstruct": call("numpy.core.multiarray", "_reconstruct", run),
        "text called": run + b"(" + run + b"tR",
        "tensor called": tensor() + b"(" + run + b"tR",
        "function with other values": rebuild + b"(" + run + b"tR",
        "module by persistent id": b"(" + text("module") + namespace + run + run + b"tQ",
        "persistent id of protocol 0": b"Pos.system\n",
        "pickle of protocol 0": b"(dp0\nS'a'\np1\nI1\ns",
    }


ATTACKS = list(attacks("canary"))


def wrapped(attack, write, path):
    return write(path, {"model": {"w": np.zeros(4, "f4")}, "epoch": attack})


@pytest.mark.parametrize("write", [pth, legacy])
@pytest.mark.parametrize("name", ATTACKS)
def test_no_code_in_a_file_runs(tmp_path, name, write):
    canary = tmp_path / "canary"
    attack = attacks(canary)[name]
    refused(wrapped(attack, write, tmp_path / "inside.pth"))
    whole = tmp_path / "whole.pth"
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + attack + b".")
        archive.writestr("archive/data/0", bytes(16))
    refused(whole)
    assert not canary.exists()


def test_such_attacks_work_on_pickle(tmp_path):
    for name in ("eval", "exec", "stack global", "instance", "object"):
        canary = tmp_path / name.replace(" ", "-")
        pickle.loads(b"\x80\x02" + attacks(canary)[name] + b".")
        assert canary.exists()


def test_arguments_are_inert_whatever_they_are_called(tmp_path):
    names = {"__class__": 1, "__dict__": 2, "__setstate__": 3, "__reduce__": 4, "values": 5, "model": "x"}
    shared = b"}(" + text("model") + dump({"w": np.zeros(3, "f4")}, []) + text("args")
    namespace = b"cargparse\nNamespace\n)\x81q\x00" + dump(names) + b"b"
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + shared + namespace + b"u.")
        archive.writestr("archive/data/0", bytes(12))
    assert read_tensors(path).arguments == names


def test_a_path_among_the_arguments_is_its_text(tmp_path):
    for module in ("pathlib", "pathlib._local"):
        args = argparse.Namespace(output_dir=call(module, "PosixPath", text("runs"), text("1")))
        path = pth(tmp_path / "a.pth", {"model": {"w": np.zeros(3, "f4")}, "args": args})
        assert read_tensors(path).arguments == {"output_dir": "runs/1"}


LIES = {
    "size beyond the storage": tensor(size=(5,)),
    "offset beyond the storage": tensor(offset=1),
    "offset far beyond": tensor(offset=2**62),
    "negative offset": tensor(offset=-1),
    "negative size": tensor(size=(-1,)),
    "negative stride": tensor(stride=(-1,)),
    "huge size": tensor(size=(2**40,), stride=(0,)),
    "sizes that overflow": tensor(size=(2**32, 2**32), stride=(0, 0)),
    "sizes that overflow, empty": tensor(size=(2**40, 2**40, 0), stride=(1, 1, 1)),
    "huge stride": tensor(size=(2,), stride=(2**61,)),
    "expanded": tensor(count=1, size=(2**30,), stride=(0,)),
    "fewer strides": tensor(size=(2, 2), stride=(1,)),
    "real size": tensor(size=(4.0,)),
    "true size": tensor(size=(True,)),
    "list for size": tensor(size=[4]),
    "many axes": tensor(size=(1,) * 1000, stride=(1,) * 1000),
    "longer storage": tensor(count=2**40, size=(2**40,)),
    "shorter storage": tensor(count=3, size=(3,)),
    "negative storage": tensor(count=-4, size=(0,)),
    "storage of another type": b"(" + tensor(kind="Float") + tensor(kind="Int") + b"t",
    "unknown type": tensor(kind="Quantised"),
    "path for a key": tensor(key="../../canary"),
    "absolute path for a key": tensor(key="/etc/passwd"),
    "storage that is not there": tensor(key="7"),
    "append to a dict": b"}K\x01a",
    "item of a list": b"]K\x01K\x02s",
    "items of a tensor": tensor() + b"K\x01K\x02s",
    "odd number of items": b"}(K\x01u",
    "deep tuple for a key": b"}" + b"N" + b"\x85" * 30_000 + b"Ns",
    "memo that is not there": b"h\x05",
    "empty stack": b"\x87",
    "no mark": b"t",
    "no operation": b"\xff",
    "long number": b"\x8b\xff\xff\xff\x7f\x01",
    "long text": b"\x8d" + b"\xff" * 7 + b"\x7f",
}


@pytest.mark.parametrize("name", LIES)
def test_what_does_not_fit_together_is_refused_at_no_cost(tmp_path, name):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}(" + text("w") + LIES[name] + b"u.")
        archive.writestr("archive/data/0", bytes(16))
    tracemalloc.start()
    refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6 and list(tmp_path.iterdir()) == [path]


def test_deep_nesting_and_a_far_memo_cost_nothing(tmp_path):
    deep = b"]" * 50_000 + b"a" * 49_999
    for value in (deep, b"Nr\xff\xff\xff\xff"):
        path = pth(tmp_path / "a.pth", {"model": {"w": np.zeros(3, "f4")}, "epoch": value})
        tracemalloc.start()
        assert list(read_tensors(path).tensors) == ["w"]
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 50e6


def test_a_dict_that_holds_itself_has_no_tensors(tmp_path):
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00" + text("model") + b"h\x00s.")
    refused(path, "no tensors")


def test_many_views_of_one_storage_do_not_fill_the_memory(tmp_path):
    base = np.zeros(2**20, "f4")
    views = {f"w{n}": View(base, 0, (2**10, 2**10), (1, 2**10)) for n in range(200)}
    refused(pth(tmp_path / "a.pth", views), "too many for its")


def test_every_cut_is_refused(tmp_path):
    writers = {"a.pth": pth, "b.pth": legacy, "c.npz": npz, "d.safetensors": safetensors}
    for name, write in writers.items():
        content = write(tmp_path / name, {"w": np.arange(50, dtype="f4"), "v": np.ones((2, 3), "f4")}).read_bytes()
        for length in range(0, len(content), max(1, len(content) // 40)):
            (tmp_path / name).write_bytes(content[:length])
            refused(tmp_path / name, of=read_tensors)


def test_flipped_bits_are_refused_or_harmless(tmp_path):
    rng = np.random.default_rng(0)
    for name, write in {"a.pth": pth, "b.pth": legacy, "c.npz": npz, "d.safetensors": safetensors}.items():
        content = write(tmp_path / name, {"w": np.arange(50, dtype="f4"), "v": np.ones((2, 3), "f4")}).read_bytes()
        for _ in range(60):
            flipped = bytearray(content)
            flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
            (tmp_path / name).write_bytes(flipped)
            try:
                read_tensors(tmp_path / name)
            except InputError as error:
                assert "\n" not in str(error)


def test_zip_files_that_lie_are_refused(tmp_path):
    path, value = tmp_path / "a.pth", {"w": np.zeros(1000, "f4")}
    refused(pth(path, value, compression=zipfile.ZIP_DEFLATED), "compressed", of=read_tensors)
    np.savez(tmp_path / "a.npz", w=np.zeros(3))
    with zipfile.ZipFile(tmp_path / "a.npz") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as packed:
        packed.writestr("w.npy", plain.read("w.npy"))
    refused(path, "compression", of=read_tensors)
    refused(pth(path, value, extra=[("archive/constants.pkl", b"")]), "TorchScript", of=read_tensors)
    refused(pth(path, value, extra=[("archive/byteorder2", b""), ("other/data.pkl", b"")]), of=read_tensors)
    with pytest.warns(UserWarning, match="Duplicate name"):
        pth(path, value, extra=[("archive/data/0", bytes(4000))])
    refused(path, "two files of the same name", of=read_tensors)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    refused(path, "neither torch.save nor numpy.savez", of=read_tensors)
    pth(path, value)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"PK\x01\x02", 0, content.index(b"archive/data/0", content.index(b"PK\x01\x02")))
    content[at + 20 : at + 28] = struct.pack("<II", 2**31, 2**31)  # both sizes of one entry
    path.write_bytes(content)
    refused(path, of=read_tensors)
    pth(path, {"w": np.zeros(3, "f4"), "epoch": text(" " * 2**21)})
    refused(path, "pickle of more than", of=read_tensors)


def test_a_member_outside_of_the_folder_is_no_storage(tmp_path):
    path = tmp_path / "a.pth"
    pth(path, {"w": np.zeros(3, "f4")}, extra=[("archive/../../canary", b"x"), ("/canary", b"x")])
    assert list(read_tensors(path).tensors) == ["w"]
    assert list(tmp_path.iterdir()) == [path]


def test_npz_bombs_objects_and_lies_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, w=np.zeros(2**25, "f4"))
    tracemalloc.start()
    refused(path, "too many for its", of=read_tensors)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    np.savez(path, w=np.array([{"a": 1}], dtype=object))
    refused(path, "object", of=read_tensors)
    np.savez(path, w=np.array(["text"]))
    refused(path, of=read_tensors)
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(4, "f4"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("w.npy", buffer.getvalue().replace(b"(4,)", b"(9,)"))
    refused(path, "not those of", of=read_tensors)


def test_safetensors_that_lie_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    for header in (
        {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"w": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}},
        {"w": [1]},
        {},
    ):
        raw = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(16))
        refused(path, of=read_tensors)
    path.write_bytes(struct.pack("<Q", 2**60) + b"{" + bytes(100))
    refused(path, "not a format", of=read_tensors)


def test_what_is_no_weights_file_is_named(tmp_path):
    path = tmp_path / "a.pth"
    refused(path, "not found", of=read_tensors)
    refused(tmp_path, "folder", of=read_tensors)
    for content, word in (
        (b"", "empty"),
        (b"<!DOCTYPE html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (pickle.dumps({"w": 1}), "not one of torch.save"),
        (b"weights", "not a format"),
    ):
        path.write_bytes(content)
        refused(path, word, of=read_tensors)
    refused(pth(path, {"epoch": 1}), "contains no tensors", of=read_tensors)
    refused(pth(path, [np.zeros(3, "f4")]), "no state dict", of=read_tensors)
    refused(pth(path, {"a\x1b[2Jb\n": np.zeros(3, "f4")}), "plain names", of=read_tensors)
    refused(pth(path, {"w": np.zeros(3, "f4"), "\x1b]0;x\x07": 1}), "plain names", of=read_tensors)


# --- the command ------------------------------------------------------------------------------------------------------


def run(*argv):
    return exit_code(main, [str(word) for word in argv])


@pytest.mark.parametrize("part", ["mae", "encoder", "blocks"])
@pytest.mark.parametrize("name", ["mae2d", "mae3d"])
def test_a_converted_file_holds_the_part_and_loads_as_the_original(tmp_path, capsys, name, part):
    source, out = GOLDEN / f"{name}.npz", tmp_path / "new" / "out.safetensors"
    assert run(source, "--out", out, f"--part={part}") == 0
    printed, said = capsys.readouterr()
    assert ("position codes differ from the computed ones" in said) == (name == "mae3d" and part != "blocks")
    original, copy = read_weights(source), read_weights(out)
    for tensor_name, array in golden(name).items():
        assert f"state/{tensor_name} " in printed and "x".join(map(str, array.shape)) in printed
    assert printed.splitlines()[-2].startswith(f"{out}: {part} of {source}: ")
    assert list(out.parent.iterdir()) == [out]
    for leaf, array in copy.leaves.items():
        np.testing.assert_array_equal(array, original.leaves[leaf])
    target = network(**original.config())
    given = dict(part=part, size=original.size, patch=original.patch, positions=original.positions())
    jax.tree.map(
        np.testing.assert_array_equal, load_weights(out, target, **given)[0], load_weights(source, target, **given)[0]
    )
    with safe_open(out, framework="np") as file:
        about = json.loads(file.metadata()["jmae"])
    assert about["heads"] == 3 and about["decoder_heads"] == (4 if part == "mae" else None)
    assert about["part"] == part and about["format"] == 1 and about["source_sha256"] == original.sha256
    assert about["size"] == (None if part == "blocks" else list(original.size))
    if part == "mae":
        config, expected = copy.config(), original.config()
        found, wanted = (
            c.pop("positions")(grid_of(copy.size, copy.patch), copy.known()["width"]) for c in (config, expected)
        )
        assert config == expected
        np.testing.assert_array_equal(found, wanted)
    else:
        refused(out, of=lambda path: load_weights(path, target, **(given | {"part": "mae"})))


def test_heads_and_size_are_given_on_the_command_line(tmp_path, capsys):
    source, out = pth(tmp_path / "a.pth", golden("mae3d")), tmp_path / "out.safetensors"
    assert run(source, f"--out={out}", "--heads", 3, "--decoder-heads=4", "--size=32,24,4") == 0
    jax.tree.map(np.testing.assert_array_equal, read_weights(out).leaves, read_weights(source).leaves)
    assert out.stat().st_mode == source.stat().st_mode  # others may read it, too
    first = out.read_bytes()
    assert run(f"--out={out}", "--heads=3", "--decoder-heads=4", "--size=32,24,4", source) == 0
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--heads=3"], "--decoder-heads"),
        (["--heads=5", "--decoder-heads=2"], "do not divide"),
        (["--heads=x"], "whole number"),
        (["--size=9,9", "--heads=3", "--decoder-heads=2"], "divisible"),
        (["--size=16,16", "--heads=3", "--decoder-heads=2"], "9 tokens"),
        (["--part=head"], "part 'head' is unknown"),
        (["--head=3"], "did you mean --heads"),
        (["--heads"], "no value"),
        (["another.pth"], "name one checkpoint"),
    ],
)
def test_wrong_commands_are_one_line_and_leave_nothing(tmp_path, plain, capsys, flags, words):
    out = tmp_path / "out.safetensors"
    assert run(plain, f"--out={out}", *flags) == 2
    printed = capsys.readouterr()
    assert words in printed.err and len(printed.err.splitlines()) == 1 and not printed.out
    assert list(tmp_path.iterdir()) == [plain]


def test_outputs_that_cannot_be_are_refused_and_the_source_stays(tmp_path, plain, capsys, monkeypatch):
    before = plain.read_bytes()
    good = ["--heads=3", "--decoder-heads=2"]
    (tmp_path / "file").write_text("no folder")
    for out in (plain, tmp_path / "a.pth", tmp_path / "file" / "a.safetensors"):
        assert run(plain, f"--out={out}", *good) == 2
    assert run(plain, *good) == 2 and run(f"--out={tmp_path / 'b.safetensors'}") == 2
    old = tmp_path / "old.safetensors"
    old.write_text("an earlier file")
    monkeypatch.setattr("jmae.weights.save_tensors", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert run(plain, f"--out={old}", *good) == 2
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert old.read_text() == "an earlier file" and plain.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "old.safetensors", "plain.safetensors"]


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as ended:
        run("--help")
    assert ended.value.code == 0 and "--decoder-heads" in capsys.readouterr().out


def test_metadata_that_lie_are_refused(tmp_path, plain):
    out = tmp_path / "out.safetensors"
    assert run(plain, f"--out={out}", "--heads=3", "--decoder-heads=2") == 0
    with safe_open(out, framework="np") as file:
        about = json.loads(file.metadata()["jmae"])
    tensors = load_file(out)
    for change in (
        {"format": 2},
        {"heads": -3},
        {"heads": "3"},
        {"heads": 5},
        {"size": [2**30, 2**30]},
        {"size": 12},
        {"patch": [4, 4, 4]},
        {"patch": [2, 2]},
        {"channels": None},
        {"positions": {}},
    ):
        save_file(tensors, out, {"jmae": json.dumps(about | change)})
        with pytest.raises(InputError):
            load_weights(out, network(**SIZES))
    save_file(tensors, out, {"jmae": "[" * 100_000})
    refused(out)


def test_tokens_are_embedded_as_by_the_convolution(tmp_path):
    state = official(patch=(2, 3), channels=2, grid=(2, 2))
    kernel = read_weights(pth(tmp_path / "a.pth", state)).leaves["patch_embed/kernel"]
    image = np.random.default_rng(0).standard_normal((1, 4, 6, 2), np.float32)
    found = patchify(image, (2, 3)) @ kernel
    conv = jax.lax.conv(np.moveaxis(image, -1, 1), state["patch_embed.proj.weight"], (2, 3), "VALID")
    np.testing.assert_allclose(found, np.moveaxis(conv.reshape(1, 12, 4), 1, -1), rtol=1e-4, atol=1e-5)
