"""Times loading: images and crops a second for each format, and how long a training step waits for them.

    python -m benchmarks.loading               # first writes 48 images of 512 x 512 and 6 volumes of 128 x 128 x 48
    python -m benchmarks.loading --images 16 --side 256 --rounds 5

Batches are those of `jmae.train`, and are put on the device. Images use the recipe memmc_mae.py:small (96 x 96, batch
32), crops maemi.py:small. "once" decodes images when the set is opened ("open s"), as where all fit into a quarter of
the memory; "use" decodes them at every use. Crops are cut from prepared volumes on the host or on the device; in the
latter case the volumes stay on the device. Formats are 8-bit PNG, 12-bit NIfTI (gzip) and DICOM (uncompressed; a volume
is a series).

"waits" is the time of next(iterator) between steps, as a share of this time plus the step. "most" is the longest wait.
The threads of the iterator run beside the step, on the same cores.
"""

import argparse
import multiprocessing
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import Prepared, interleaved, table, use_cores, write

RESULTS = Path(__file__).parent / "results" / "loading.json"
FORMATS = ("PNG", "NIfTI", "DICOM")
OWN, STEPS, BATCHES = "benchmarks.loading:", 12, 12


# --- files ------------------------------------------------------------------------------------------------------------


def smooth(rng: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
    """A smooth image of 12-bit values with noise, for realistic compression."""
    from scipy.ndimage import zoom

    coarse = zoom(rng.uniform(500, 3500, [8] * len(size)), [n / 8 for n in size], order=1)
    return np.clip(coarse + rng.normal(0, 30, size), 1, 4095).astype(np.int16)


def dicom(file: Path, array: np.ndarray, uid: str, position: float = 0.0) -> None:
    """Writes one slice (rows, columns) with 1 mm pixels as DICOM."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

    data = pydicom.Dataset()
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = SecondaryCaptureImageStorage, f"{uid}.{position:.0f}", "OT"
    data.StudyInstanceUID, data.SeriesInstanceUID, data.FrameOfReferenceUID = f"{uid}.1", f"{uid}.2", f"{uid}.3"
    data.Rows, data.Columns, data.SamplesPerPixel, data.PhotometricInterpretation = *array.shape, 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.PixelSpacing, data.ImageOrientationPatient = [1, 1], [1, 0, 0, 0, 1, 0]
    data.ImagePositionPatient, data.SliceThickness = [0, 0, position], 1
    data.PixelData = array.astype("<u2").tobytes()
    data["PixelData"].VR = "OW"
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    pydicom.dcmwrite(file, data, enforce_file_format=True)


def write_files(folder: Path, kind: str, arrays: list[np.ndarray]) -> list[str]:
    """Writes images or volumes. Returns their files, or their folders for series."""
    import nibabel as nib
    from PIL import Image

    folder.mkdir()
    names = []
    for k, array in enumerate(arrays):
        name = folder / {"PNG": f"{k}.png", "NIfTI": f"{k}.nii.gz", "DICOM": f"{k}.dcm"}[kind]
        if kind == "PNG":
            Image.fromarray((array >> 4).astype(np.uint8)).save(name)
        elif kind == "NIfTI":
            nib.save(nib.Nifti1Image(array, np.eye(4)), name)
        elif array.ndim == 2:
            dicom(name, array, f"1.2.{k}")
        else:
            name = folder / str(k)
            name.mkdir()
            for z in range(array.shape[2]):
                dicom(name / f"{z}.dcm", array[:, :, z], f"1.2.{k}", z)
        names.append(str(name))
    return names


# --- contestants ------------------------------------------------------------------------------------------------------


def open_set(files: list[str], way: str, folder: str) -> tuple[Callable[[], Iterator], int, float, Any, Any]:
    """(function that makes a new iterator, batch, seconds of opening, volumes on the device or None, recipe)."""
    from benchmarks.steps import ROOT
    from jmae import recipe
    from jmae.data.crops import Volumes
    from jmae.data.loader import Images, batches
    from jmae.data.manifest import Row

    volumes = way in ("host", "device")
    config = recipe.load(f"{ROOT / 'configs' / ('maemi.py:small' if volumes else 'memmc_mae.py:small')}")
    rows = [Row(str(k), str(k), "train", 0, (file,)) for k, file in enumerate(files)]
    cache = Path(folder) / f"prepared-{way}"
    start = time.perf_counter()
    if volumes:
        config.data.channels, config.data.spacing, config.data.crop, config.data.region = 1, (), "none", "nonzero"
        config.data.join, config.data.crops_on = "same", way
        cache.mkdir(exist_ok=True)
        samples: Any = Volumes(rows, config, cache)
    else:
        samples = Images(rows, config)
    seconds = time.perf_counter() - start
    if way == "use":
        samples.decoded = None  # the state of a set that does not fit into the memory
    batch = config.train.batch
    make = lambda: batches(samples, [np.arange(len(rows))], batch=batch, seeds=[0], shuffle=True, host={})
    return make, batch, seconds, samples.resident(), config


def load(*, files: list[str], way: str, folder: str) -> Prepared:
    """Some batches of a new iterator. Each is put on the device; crops may be cut there."""
    import jax

    from jmae.data.crops import cut

    make, batch, seconds, resident, config = open_set(files, way, folder)
    held, crop = jax.device_put(resident), tuple(config.data.size)
    crops = jax.jit(lambda held, rows: cut(held, rows, crop))

    def run() -> None:
        iterator = make()
        for _ in range(BATCHES):
            rows = jax.device_put(next(iterator))
            jax.block_until_ready(rows if held is None else crops(held, rows))

    return run, {"open_s": seconds, "samples": BATCHES * batch}


def waiting(files: list[str], way: str, folder: str) -> dict[str, float]:
    """Median seconds of a step and of next(iterator) between steps, the longest wait, and the share of waiting."""
    import jax

    from jmae.programs import compiled_step
    from jmae.system import load_system, stage_keys

    make, batch, _, resident, config = open_set(files, way, folder)
    stage, key = load_system(config).stages[0], stage_keys(config, 0)
    state, held = jax.jit(lambda key: stage.init(key, {}, batch))(key), jax.device_put(resident)
    crop = () if held is None else tuple(config.data.size)
    step = compiled_step(stage.step, 1000, 1, crop, None, stage.phases[0])
    iterator, times = make(), []
    for _ in range(STEPS + 2):
        start = time.perf_counter()
        rows = next(iterator)
        got = time.perf_counter()
        state, metrics = step(state, jax.device_put(rows), key, {}, held)
        jax.block_until_ready((state, metrics))
        times.append((got - start, time.perf_counter() - got))
    waits, steps = zip(*times[2:], strict=True)
    share = sum(waits) / (sum(waits) + sum(steps))
    return {
        "step_s": statistics.median(steps),
        "next_s": statistics.median(waits),
        "most_s": max(waits),
        "share": share,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--volumes", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, help="number of cores to use; default all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    cores, rng, folder = use_cores(options.cores), np.random.default_rng(0), Path(tempfile.mkdtemp())
    try:
        images = [smooth(rng, (options.side,) * 2) for _ in range(options.images)]
        volumes = [smooth(rng, (128, 128, 48)) for _ in range(options.volumes)]
        cases = {}
        for what, arrays, kinds, ways in (
            ("images", images, FORMATS, ("once", "use")),
            ("crops", volumes, FORMATS[1:], ("host", "device")),
        ):
            for kind in kinds:
                files = write_files(folder / f"{what}-{kind}", kind, arrays)
                for way in ways:
                    given = {"files": files, "way": way, "folder": str(folder / f"{what}-{kind}")}
                    cases[what, kind, way] = given
        named = {", ".join(case): (OWN + "load", given) for case, given in cases.items()}
        out = interleaved(named, rounds=options.rounds)
        for case, given in cases.items():
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                out[", ".join(case)]["waits"] = pool.apply(waiting, kwds=given)
    finally:
        shutil.rmtree(folder)
    rows: list[list[Any]] = []
    for (what, kind, way), r in zip(cases, out.values(), strict=True):
        w = r["waits"]
        rates = [r["samples"] / r["median_s"], r["samples"] / r["cpu_median_s"]]
        rows.append([what, kind, way, r["open_s"], *rates, w["step_s"], w["next_s"], w["most_s"], f"{w['share']:.1%}"])
    head = (
        "what",
        "format",
        "decoded or cut",
        "open s",
        "a second",
        "a CPU second",
        "step s",
        "next s",
        "most",
        "waits",
    )
    print(table(head, [tuple(row) for row in rows]))
    about = {"images": f"{options.images} of {options.side} x {options.side}", "volumes": f"{options.volumes}"}
    write(options.out, f"{options.side} px{cores}", {**about, "contestants": out, "table": [head, rows]})


if __name__ == "__main__":
    main()
