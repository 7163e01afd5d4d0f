"""Faults that are injected in numbers, each class a function (tally, rng, count, folder), and the tests that inject
the faults of the other classes.

A fault is caught where the program refuses it in one line, or gives the result that it would have without the fault. It
is silent where another result comes without a word. Anything else that is raised is a traceback.
"""

import dataclasses
import gzip
import io
import json
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nibabel as nib
import numpy as np
import pydicom
from PIL import Image as pillow
from pydicom import uid

from jmae import checkpoint, recipe, run_folder
from jmae.data import duplicates
from jmae.data.files import Image, read_image, write_map
from jmae.data.manifest import Row, parse_manifest
from jmae.data.preparation import PLS, Opened, prepared_case
from jmae.data.volumes import prepare
from jmae.errors import InputError
from jmae.programs import skipping
from jmae.run_recipe import read_run
from jmae.sealed import seal, unseal
from jmae.system import State


@dataclasses.dataclass
class Tally:
    """What became of the faults of a class."""

    injected: int = 0
    caught: int = 0
    silent: list[str] = dataclasses.field(default_factory=list)
    tracebacks: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def fault(self, what: str, function: Callable[[], Any], sound: Callable[[Any], bool] = lambda value: False) -> None:
        """Runs a function under a fault. Its result, where it has one, must be `sound`."""
        self.injected += 1
        try:
            value = function()
        except InputError as error:
            lines = str(error).splitlines()
            if lines and all(lines):
                self.caught += 1
            else:
                self.tracebacks.append(f"{what}: an empty message")
            return
        except Exception as error:
            self.tracebacks.append(f"{what}: {type(error).__name__}: {error}"[:200])
            return
        if sound(value):
            self.caught += 1
        else:
            self.silent.append(what)


Injector = Callable[[Tally, random.Random, int, Path], None]


# --- files ------------------------------------------------------------------------------------------------------------


def volume_bytes(seed: int, **fields: Any) -> bytes:
    """A .nii of 20 x 16 x 12 voxels; `fields` of its header are written as they are."""
    values = np.random.default_rng(seed).normal(size=(20, 16, 12)).astype(np.float32)
    image = nib.Nifti1Image(values, np.diag([1.5, 1, 2, 1]))
    image.header.set_xyzt_units("mm")
    header, data = bytearray(image.to_bytes()[:352]), image.to_bytes()[352:]
    wrong = nib.Nifti1Header(bytes(header[:348]), check=False)
    for name, value in fields.items():
        wrong[name] = value
    header[:348] = wrong.binaryblock
    return bytes(header) + data


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def same(expected: np.ndarray) -> Callable[[Image], bool]:
    return lambda image: image.array.shape == expected.shape and np.array_equal(image.array, expected, equal_nan=True)


def cut_nifti(tally: Tally, rng: random.Random, count: int, folder: Path) -> None:
    plain = volume_bytes(0)
    for i in range(count):
        data, name = (plain, "a.nii") if i % 2 else (gzip.compress(plain, 1), "a.nii.gz")
        at = rng.randrange(len(data))
        tally.fault(f"{name} cut at {at}", partial(read_image, write(folder / name, data[:at])))
    for what, data in {
        "text": b"hello\n" * 99,
        "empty": b"",
        "wrong magic": plain[:344] + b"n+9\0" + plain[348:],
        "a web page": b"<html></html>",
    }.items():
        tally.fault(what, partial(read_image, write(folder / "b.nii.gz", data)))


def flip_gzip(tally: Tally, rng: random.Random, count: int, folder: Path) -> None:
    data = gzip.compress(volume_bytes(1), 1, mtime=0)
    expected = read_image(write(folder / "a.nii.gz", data)).array
    for _ in range(count):
        flipped, bit = bytearray(data), rng.randrange(10 * 8, len(data) * 8)
        flipped[bit // 8] ^= 1 << bit % 8
        tally.fault(f"bit {bit}", partial(read_image, write(folder / "b.nii.gz", bytes(flipped))), same(expected))


def lying_nifti(tally: Tally, rng: random.Random, count: int, folder: Path) -> None:
    """Headers that lie; where one is read, its spacing is that of an image of a patient, and no affine is singular."""
    lies: list[dict[str, Any]] = [
        {"dim": [3, 32000, 32000, 32000, 1, 1, 1, 1]},
        {"dim": [3, -4, 16, 12, 1, 1, 1, 1]},
        {"dim": [5, 20, 16, 12, 2, 3, 1, 1]},
        {"dim": [4, 20, 16, 12, 40, 1, 1, 1]},
        {"dim": [0, 20, 16, 12, 1, 1, 1, 1]},
        {"datatype": 32, "bitpix": 64},
        {"datatype": 128, "bitpix": 24},
        {"scl_slope": np.nan},
        {"scl_slope": 2, "scl_inter": np.inf},
        {"srow_x": [0, 0, 0, 0]},
        {"srow_x": [1, 0, 0, 0], "srow_y": [1, 0, 0, 0]},
        {"srow_y": [np.nan] * 4},
        {"srow_x": [1e30, 0, 0, 0]},
        {"srow_z": [0, 0, 1e-30, 0]},
        {"xyzt_units": 1},
        {"xyzt_units": 7},
        {"vox_offset": 1e30},
        {"sform_code": 0, "qform_code": 0, "pixdim": [1, 0, 1, 1, 1, 1, 1, 1]},
        {"sform_code": 0, "qform_code": 0, "pixdim": [1, 1e30, 1, 1, 1, 1, 1, 1]},
        {"sform_code": 0, "qform_code": 0, "pixdim": [1, 1e-30, 1, 1, 1, 1, 1, 1]},
    ]
    config = recipe.load("configs/maemi.py:small").data
    config.channels, config.spacing = 1, (1.0, 1.0, 1.0)

    def resampled(path: Path) -> Any:
        return prepare(read_image(path), config, name=str(path))

    sound = lambda volume: np.isfinite(volume.array).all() and max(volume.array.shape) < 2**12
    for i in range(count):
        lie = lies[i % len(lies)]
        path = write(folder / f"a{i}.nii", volume_bytes(i, **lie))
        tally.fault(f"{lie}", lambda path=path: resampled(path), sound)
        path.unlink()


def bombs(tally: Tally, rng: random.Random, count: int, folder: Path) -> None:
    """The peak of memory is measured by the tests of tests/test_limits.py."""
    head = bytearray(volume_bytes(2)[:352])
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    body = packer.compress(bytes(head)) + b"".join(packer.compress(bytes(2**20)) for _ in range(64)) + packer.flush()
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    made = {"a.nii.gz": body}
    for side in (60_000, 11_000, 2**31 - 1):
        ihdr = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        packed = zlib.compress(bytes(9000))
        made[f"{side}.png"] = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
    for name, data in made.items():
        tally.fault(name, partial(read_image, write(folder / name, data)))
    for rows in (65535, 40000):
        tally.fault(f"DICOM of {rows} rows", partial(read_image, dicom(folder / "a.dcm", Rows=rows, Columns=65535)))


def dicom(path: Path, **tags: Any) -> Path:
    """A DICOM file of 8 x 6 values; a tag of None is left out."""
    array = np.arange(48, dtype=np.uint16).reshape(8, 6)
    data = pydicom.Dataset()
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = uid.SecondaryCaptureImageStorage, "1.2.3", "OT"
    values: dict[str, Any] = {"Rows": 8, "Columns": 6, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"}
    values |= {"BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0}
    for name, value in {**values, "PixelData": array.tobytes(), **tags}.items():
        if value is not None:
            setattr(data, name, value)
    if "PixelData" in data:
        data["PixelData"].VR = "OW"
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    data.preamble = bytes(128)
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


def odd_dicom(tally: Tally, rng: random.Random, count: int, folder: Path) -> None:
    values = np.arange(48, dtype=np.float32).reshape(8, 6, 1)
    for what, tags, expected in (
        ("without pixels", {"PixelData": None}, None),
        ("short pixels", {"PixelData": bytes(50)}, None),
        ("long pixels", {"PixelData": bytes(500)}, None),
        ("without rows", {"Rows": None}, None),
        ("several frames", {"NumberOfFrames": 2, "PixelData": bytes(192)}, None),
        ("a colour space that is none", {"PhotometricInterpretation": "NONE"}, None),
        ("12 bits in 8", {"BitsAllocated": 8}, None),
        ("a slope of 0", {"RescaleSlope": 0, "RescaleIntercept": 1}, None),
        ("inverted", {"PhotometricInterpretation": "MONOCHROME1"}, 4095 - values),
        ("a rescale", {"RescaleSlope": 2, "RescaleIntercept": -5}, 2 * values - 5),
        ("a name in another script", {"SpecificCharacterSet": "ISO_IR 192", "PatientName": "Ünal^日本"}, values),
        ("beyond its bits", {"BitsStored": 4, "HighBit": 3}, None),
    ):
        path = dicom(folder / "a.dcm", **tags)
        tally.fault(what, partial(read_image, path), same(expected) if expected is not None else lambda _: False)
    whole = dicom(folder / "a.dcm").read_bytes()
    for _ in range(count):
        at = rng.randrange(1, len(whole))
        tally.fault(f"cut at {at}", partial(read_image, write(folder / "b.dcm", whole[:at])))


def odd_pictures(tally: Tally, rng: random.Random, count: int, folder: Path) -> None:
    generator = np.random.default_rng(3)
    deep = generator.integers(0, 65536, (30, 20), dtype=np.uint16)
    file = io.BytesIO()
    pillow.fromarray(deep).save(file, "PNG")
    data = file.getvalue()
    tally.fault("16 bits", lambda: read_image(write(folder / "a.png", data)), same(deep[..., None].astype(np.float32)))
    for i in range(count):
        if i % 2:
            bad, at = data[: rng.randrange(len(data))], -1
        else:
            flipped, at = bytearray(data), rng.randrange(8 * len(data))
            flipped[at // 8] ^= 1 << at % 8
            bad = bytes(flipped)
        what = f"cut to {len(bad)}" if i % 2 else f"bit {at}"
        expected = same(deep[..., None].astype(np.float32))
        tally.fault(what, partial(read_image, write(folder / "b.png", bad)), expected)


# --- values and grids -------------------------------------------------------------------------------------------------


def not_finite(tally: Tally, rng: random.Random, count: int, folder: Path) -> None:
    config = recipe.load("configs/amae.py:smoke").data
    zero = config.copy_and_resolve_references()
    zero.nonfinite = "zero"
    row = Row("a", "", "test", 0, ("a.npy",))
    for i in range(count):
        array = np.random.default_rng(i).random((24, 20, 1)).astype(np.float32)
        hole = np.zeros((24, 20), bool)
        for _ in range(rng.randrange(1, 9)):
            hole[rng.randrange(24), rng.randrange(20)] = True
        array[hole] = rng.choice([np.nan, np.inf, -np.inf])
        opened = Opened(Image(array, None, None, None), None, None)
        tally.fault(f"{hole.sum()} values", partial(prepared_case, row, config, opened))
        sound = lambda case, hole=hole: np.isfinite(case.array).all() and np.array_equal(case.missing, hole)
        tally.fault(f"{hole.sum()} values as zero", partial(prepared_case, row, zero, opened), sound)


def bad_steps(tally: Tally, rng: random.Random, count: int, folder: Path) -> None:
    """A step whose loss is not finite changes no weight, whichever it is."""
    step = lambda state, batch, key, results, *, steps: (
        state.replace(params=state.params - 0.1 * batch, step=state.step + 1),
        {"loss": jnp.sum(batch)},
    )
    careful = jax.jit(skipping(step), static_argnames="steps")
    start = State(params=jnp.ones(3), opt={}, stats={}, step=jnp.int32(0))
    for _ in range(count):
        batches = [np.full(3, rng.random(), np.float32) for _ in range(4)]
        bad = rng.randrange(4)
        expected, state = start.params, start
        for k, batch in enumerate(batches):
            expected = expected if k == bad else expected - 0.1 * batch
            if k == bad:
                batch = batch.copy()
                batch[rng.randrange(3)] = rng.choice([np.nan, np.inf])
            state, _ = careful(state, batch, None, {}, steps=4)
        tally.fault(f"step {bad}", lambda s=state: s, lambda s, e=expected: np.allclose(s.params, e) and s.step == 4)


def grids(tally: Tally, rng: random.Random, count: int, folder: Path) -> None:
    """Volumes of any size and spacing: a map of ones comes back onto the volume's own grid, and lies there exactly."""
    config = recipe.load("configs/maemi.py:small").data
    config.channels, config.spacing = 1, (2.0, 2.0, 2.0)
    for i in range(count):
        size = tuple(rng.randrange(5, 40) for _ in range(3))
        spacing = [rng.uniform(0.4, 4) for _ in range(3)]
        values = np.random.default_rng(i).normal(size=(*size, 1)).astype(np.float32)
        affine = PLS @ np.diag([*spacing, 1])
        stored = Image(values, tuple(spacing), affine, None)

        def there_and_back(stored: Image = stored) -> Image:
            volume = prepare(stored, config, name="a")
            ones = np.ones(volume.array.shape[:3], np.float32)
            path = write_map(folder / "map", volume.grid.back(ones), stored)
            return read_image(path)

        def sound(image: Image, size: tuple[int, ...] = size, affine: np.ndarray = affine) -> bool:
            return image.size == size and np.allclose(image.affine, affine, atol=1e-4) and (image.array == 1).all()

        tally.fault(f"{size} at {spacing}", there_and_back, sound)


# --- run folders ------------------------------------------------------------------------------------------------------


def two_steps(folder: Path) -> tuple[dict[str, Any], Callable[[int], dict[str, np.ndarray]]]:
    config = {"model": {"width": 4}}
    state = lambda step: {"w": np.random.default_rng(step).normal(size=(33, 7)), "step": np.int64(step)}
    for step in (1, 2):
        checkpoint.save(folder, step, state(step), {}, config=config)
    return config, state


def flipped_checkpoints(tally: Tally, rng: random.Random, count: int, folder: Path) -> None:
    config, state = two_steps(folder / "c")
    files = sorted(path for path in (folder / "c" / "2").rglob("*") if path.is_file() and path.stat().st_size)
    for i in range(count):
        file = files[i % len(files)]
        whole = file.read_bytes()
        flipped, bit = bytearray(whole), rng.randrange(8 * len(whole))
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        said: list[str] = []
        read = lambda said=said: checkpoint.restore(folder / "c", state(0), config=config, log=said.append)
        sound = lambda found, said=said: (
            found[0] == 1 and len(said) == 1 and np.array_equal(found[1]["w"], state(1)["w"])
        )
        tally.fault(f"{file.name}, bit {bit}", read, sound)
        file.write_bytes(whole)


def other_configs(tally: Tally, rng: random.Random, count: int, folder: Path) -> None:
    """config.json with a changed value, and a restore under another recipe."""
    config = recipe.load("configs/amae.py:smoke")
    run = folder / "run"
    identity = {"recipe": run_folder.fixed(config), "rows": ""}
    checkpoint.save(run / "checkpoints" / "pretrain", 1, {"w": np.ones(2)}, {"steps": 1}, config=identity)
    run_folder.describe_run(config, run)
    text = (run / "config.json").read_text()
    keys = [key for key, value in recipe.keys_of(config) if key not in run_folder.FREE and type(value) in (int, float)]
    keys = [key for key in keys if not key.startswith("evaluation.") and key.split(".")[0] not in run_folder.FREE]
    for _ in range(count):
        key = rng.choice(keys)
        content = unseal(text, "", None)
        place = content
        *sections, last = key.split(".")
        for section in sections:
            place = place[section]
        place[last] += 1
        (run / "config.json").write_text(seal(content))
        tally.fault(key, lambda: read_run(run))


def flipped_records(tally: Tally, rng: random.Random, count: int, folder: Path) -> None:
    """A flipped bit in a sealed file changes nothing that is read of it."""
    content = {"scores": {f"case {i}": i / 7 for i in range(20)}, "threshold": 0.25, "needs": []}
    text = seal(content).encode()
    unsealed: list[str] = []

    def read(data: bytes) -> dict:
        try:
            return unseal(data, "", unsealed.append)
        except ValueError as error:
            raise InputError(str(error)) from None

    for _ in range(count):
        flipped, bit = bytearray(text), rng.randrange(8 * len(text))
        flipped[bit // 8] ^= 1 << bit % 8
        tally.fault(f"bit {bit}", partial(read, bytes(flipped)), lambda got: got == content and not unsealed)


# --- rows -------------------------------------------------------------------------------------------------------------


def texture(rng: np.random.Generator) -> np.ndarray:
    """An image of 160 x 160 with detail at all scales, (160, 160, 1)."""
    noise = np.fft.rfft2(rng.normal(size=(160, 160)))
    fy, fx = np.fft.fftfreq(160)[:, None], np.fft.rfftfreq(160)[None]
    radius = np.hypot(fy, fx)
    shaped = np.fft.irfft2(noise / np.maximum(radius, 1 / 160) ** 1.2, (160, 160))
    low, high = shaped.min(), shaped.max()
    return (255 * (shaped - low) / (high - low)).astype(np.float32)[..., None]


def planted_copies(tally: Tally, rng: random.Random, count: int, folder: Path) -> None:
    """Copies of images of one split in another, each changed in one of the ways of `CHANGES`."""
    from faults.changes import CHANGES

    generator = np.random.default_rng(rng.randrange(2**32))
    images = [texture(generator) for _ in range(max(2, count // len(CHANGES)))]
    prints = [duplicates.fingerprint(image) for image in images]
    n = len(images)
    planted = [(i, what) for what in CHANGES for i in range(n)]
    copied = [duplicates.fingerprint(np.ascontiguousarray(CHANGES[what](images[i]))) for i, what in planted]
    found = {(c.first, c.second - n) for c in duplicates.copies([*prints, *copied], [0] * n + [1] * len(copied))}
    for k, (i, what) in enumerate(planted):
        tally.fault(f"{what} {i}", partial(found.__contains__, (i, k)), bool)
    wrong = [(i, planted[k]) for i, k in found if planted[k][0] != i]
    tally.fault("strangers", partial(list, wrong), lambda bad: not bad)


def odd_rows(tally: Tally, rng: random.Random, count: int, folder: Path) -> None:
    """Manifests whose patients or ids differ by case or Unicode form alone, and abnormal rows in train."""
    columns = "id,patient,split,label,image,mask,region"
    pairs = [
        ("P1", "p1"),
        ("Ångström", "A\u030angstro\u0308m"),
        ("ﬁle", "file"),
        ("a  b", "a b"),
        ("Straße", "STRASSE"),
    ]
    for i in range(count):
        first, second = pairs[i % len(pairs)]
        rows = [f"x{i},{first},train,0,a.png,,", f"y{i},{second},test,0,b.png,,"]
        ids = [f"{first},,train,0,a.png,,", f"{second},,test,0,b.png,,"]
        abnormal = [f"x{i},,train,1,a.png,,", f"y{i},,test,0,b.png,,"]
        for what, lines in (("patients", rows), ("ids", ids), ("abnormal", abnormal)):
            path = write(folder / "m.csv", "\n".join([columns, *lines]).encode())
            told = lambda path=path: parse_manifest(path)[2]
            tally.fault(f"{what} {first} {second}", told, lambda problems: bool(problems))


def hostile_json(tally: Tally, rng: random.Random, count: int, folder: Path) -> None:
    canary = folder / "canary"
    attack = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    for text in (
        attack,
        json.dumps({"system": attack}),
        '{"py/object": "x"}',
        "[" * 100_000,
        "\0",
        '{"system": "../x"}',
    ):
        write(folder / "config.json", text.encode())
        tally.fault(text[:30], lambda: read_run(folder))
    tally.fault("no code ran", canary.exists, lambda there: not there)


def names(tally: Tally, rng: random.Random, count: int, folder: Path) -> None:
    expected = read_image(write(folder / "a.nii", volume_bytes(5))).array
    for name in (
        "with space.nii",
        "日本語.nii",
        "ü\u0308.nii",
        "x" * 200 + ".nii",
        "no ending",
        "wrong.png",
        "a\nb.nii",
    ):
        deep = folder.joinpath(*["d" * 100] * 8)
        deep.mkdir(parents=True, exist_ok=True)
        tally.fault(name, partial(read_image, write(deep / name, volume_bytes(5))), same(expected))
    shutil.rmtree(folder / ("d" * 100))


@dataclasses.dataclass(frozen=True)
class FaultClass:
    """One of the 30 classes of faults.

    Attributes:
        name: what goes wrong.
        inject: {the mark's number of faults: function}.
        tests: tests that inject further faults, as pytest names them.
        needs: why a part of the class cannot be run here; "" where all can.
    """

    name: str
    inject: tuple[tuple[int, Injector], ...] = ()
    tests: tuple[str, ...] = ()
    needs: str = ""


def _of(file: str, *tests: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{file}.py::{name}" for name in tests)


CLASSES = {
    1: FaultClass(
        "the training process is killed (kill -9)",
        tests=_of("train", "test_killed_three_times_a_run_ends_as_if_it_never_was"),
        needs="the comparison on a GPU needs a GPU",
    ),
    2: FaultClass(
        "the process is killed while it saves (kill -9)",
        tests=_of(
            "checkpoint",
            "test_a_save_killed_at_any_use_of_its_folder_leaves_a_complete_step",
            "test_a_save_killed_at_any_moment_leaves_a_complete_step",
            "test_left_overs_of_an_interrupted_save_do_not_matter",
        ),
    ),
    3: FaultClass(
        "SIGTERM and Ctrl-C in training",
        tests=_of("train", "test_sigterm_and_ctrl_c_save_and_exit_143_and_130_and_the_run_goes_on"),
    ),
    4: FaultClass("a flipped bit in a checkpoint or a record", ((500, flipped_checkpoints), (400, flipped_records))),
    5: FaultClass(
        "damaged, missing and foreign files beside checkpoints",
        tests=_of(
            "checkpoint",
            "test_a_damaged_step_is_named_and_passed_over_and_can_be_saved_again",
            "test_training_never_restarts_silently_where_no_step_is_sound",
        ),
    ),
    6: FaultClass(
        "a checkpoint or config.json of another recipe",
        ((100, other_configs),),
        (
            *_of("checkpoint", "test_another_configuration_is_refused_with_the_first_differences"),
            *_of("trust", "test_a_second_system_does_not_take_over_an_old_run_folder"),
        ),
    ),
    7: FaultClass(
        "a run goes on with another number of devices or processes",
        tests=(
            *_of(
                "checkpoint",
                "test_a_step_of_one_device_is_read_on_eight_and_back",
                "test_every_pair_of_1_2_4_and_8_devices_restores_the_same_bits",
            ),
            *_of("devices", "test_one_device_and_eight_train_alike"),
            *_of(
                "processes",
                "test_what_one_process_has_saved_two_restore_and_finish_with_the_parameters_split_over_both",
            ),
        ),
    ),
    8: FaultClass(
        "one of two processes dies",
        tests=_of(
            "processes",
            "test_stopped_then_one_killed_then_alone_a_run_of_two_ends_as_one_does",
            "test_a_lost_process_is_named_with_the_first_line_of_the_error",
        ),
    ),
    9: FaultClass("a NIfTI file that ends too early, or a file of another kind", ((200, cut_nifti),)),
    10: FaultClass("a flipped bit in a gzipped volume", ((200, flip_gzip),)),
    11: FaultClass(
        "NIfTI headers with false values",
        ((100, lying_nifti),),
        _of("limits", "test_a_lying_spacing_is_refused_before_memory_is_taken"),
    ),
    12: FaultClass(
        "small files that claim to be very large",
        ((6, bombs),),
        _of(
            "limits",
            "test_a_deflated_dicom_is_refused_before_it_is_inflated",
            "test_a_picture_takes_little_more_memory_than_its_float32_array",
            "test_an_nrrd_header_of_a_million_lines_is_refused_at_once",
        ),
    ),
    13: FaultClass(
        "damaged and unusual DICOM files",
        ((100, odd_dicom),),
        _of("series", "test_a_series_that_makes_no_volume_is_one_line"),
    ),
    14: FaultClass(
        "damaged and unusual picture files (PNG, JPEG, TIFF)",
        ((200, odd_pictures),),
        _of("files", "test_exif_and_tiff_orientation_are_undone", "test_jpeg_grey_colour_and_cmyk"),
    ),
    15: FaultClass(
        "NaN and Inf among the voxels",
        ((100, not_finite),),
        _of("trust", "test_values_that_are_not_finite_are_refused_or_stay_nan_in_the_map"),
    ),
    16: FaultClass(
        "a loss that is NaN or Inf",
        ((50, bad_steps),),
        (
            *_of("trust", "test_as_many_steps_are_skipped_as_the_recipe_says_then_training_ends_with_3"),
            *_of("train", "test_weights_that_are_not_finite_are_never_saved"),
        ),
    ),
    17: FaultClass("volumes of any size and spacing", ((100, grids),)),
    18: FaultClass(
        "a sequence that is missing, or on another grid",
        tests=_of("files", "test_channels_and_masks_on_another_grid_are_refused")
        + _of("manifest", "test_series_before_and_after_contrast_come_together"),
    ),
    19: FaultClass("copies of an image, or one patient, in two splits", ((60, planted_copies), (15, odd_rows))),
    20: FaultClass(
        "a full disk",
        tests=(
            *_of(
                "checkpoint",
                "test_a_disk_without_room_leaves_the_older_steps",
                "test_a_write_that_fails_midway_is_one_line_and_leaves_the_older_steps",
            ),
            *_of("files", "test_a_failed_write_is_one_line_and_leaves_the_old_file_and_no_other"),
        ),
    ),
    21: FaultClass(
        "files that vanish, or that may not be read",
        tests=_of(
            "loader",
            "test_a_file_that_turns_bad_in_mid_training_is_tried_three_times_then_quarantined",
            "test_a_file_that_comes_back_within_three_tries_is_read",
        ),
    ),
    22: FaultClass(
        "a worker of the data loader fails",
        tests=_of("loader", "test_a_file_that_vanishes_after_the_start_is_named"),
        needs="workers are threads: no thread can end alone",
    ),
    23: FaultClass(
        "the device has too little memory",
        tests=_of("predict", "test_a_device_that_is_full_gets_less_at_a_time_with_the_same_map"),
        needs="the memory allocator of a GPU needs a GPU",
    ),
    24: FaultClass(
        "two commands write into one folder",
        tests=(
            *_of("checkpoint", "test_a_second_run_is_refused_until_the_first_ends_even_by_kill"),
            *_of("trust", "test_a_second_predict_or_evaluate_into_a_folder_is_refused"),
        ),
    ),
    25: FaultClass(
        "malicious recipes, checkpoints and weights",
        ((6, hostile_json),),
        (
            *_of("checkpoint", "test_a_crafted_step_runs_no_code"),
            *_of("weights", "test_no_code_in_a_file_runs", "test_flipped_bits_are_refused_or_harmless"),
            *_of("limits", "test_a_pickle_that_is_nested_a_million_deep_is_one_line"),
        ),
    ),
    26: FaultClass(
        "files of earlier versions",
        tests=(
            *_of("checkpoint", "test_a_step_of_an_earlier_release_opens"),
            *_of(
                "trust",
                "test_a_recipe_of_an_earlier_version_is_brought_up_before_it_is_compared",
                "test_a_checkpoint_without_digests_of_images_is_continued_and_it_is_said",
                "test_seen_rows_that_were_cut_or_changed_are_refused_and_old_ones_said_to_be_unchecked",
            ),
        ),
    ),
    27: FaultClass(
        "the same cases, scored with other batches and devices",
        tests=(
            *_of("evaluate", "test_a_case_scores_the_same_alone_in_a_batch_and_in_another_order"),
            *_of("devices", "test_one_device_and_eight_give_the_same_maps_and_scores"),
        ),
    ),
    28: FaultClass(
        "a prediction is interrupted and goes on",
        tests=(
            *_of("predict", "test_an_interrupted_prediction_goes_on_where_it_stopped"),
            *_of("trust", "test_a_damaged_line_of_a_prediction_is_predicted_again"),
        ),
    ),
    29: FaultClass(
        "unusual file names and long paths", ((7, names),), _of("manifest", "test_ten_thousand_rows_keep_their_order")
    ),
    30: FaultClass(
        "packages of the lock files without a hash",
        tests=_of("supply", "test_every_package_of_the_lock_files_has_hashes"),
    ),
}


def inject(number: int, seed: int, share: float, folder: Path) -> Tally:
    """Injects the faults of a class, `share` of their number."""
    tally = Tally()
    for k, (count, function) in enumerate(CLASSES[number].inject):
        place = folder / f"{number}-{k}"
        place.mkdir(parents=True)
        function(tally, random.Random(f"{seed} {number} {k}"), max(2, round(share * count)), place)
        shutil.rmtree(place)
    return tally
