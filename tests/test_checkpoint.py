import contextlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jmae import checkpoint
from jmae.errors import InputError

CONFIG = {"model": {"width": 192, "patch": (8, 8)}, "stage": "mae", "empty": {}, "rate": float("nan")}
POSITION = {"seed": 2**80, "next": [3, 4], "text": "ü"}


class State(NamedTuple):
    params: dict
    opt: Any
    stats: dict
    frozen: dict
    step: Any


def make_state(seed: int) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "encoder": {"kernel": jnp.asarray(rng.standard_normal((17, 5)), jnp.float32), "none": {}},
        "odd name. ü": jnp.asarray(rng.standard_normal(7), jnp.bfloat16),
    }
    opt = optax.chain(optax.clip(1.0), optax.adamw(optax.constant_schedule(1e-3))).init(params)
    stats = {
        "nan": jnp.asarray([np.nan, -0.0, np.inf]),
        "nothing": jnp.zeros((0, 3)),
        "host": np.asarray([2**60 + seed, -1]),
        "no_host": np.zeros((2, 0), np.float64),
        "flag": jnp.asarray(True),
        "byte": jnp.arange(5, dtype=jnp.uint8),
    }
    return State(params, opt, stats, {}, jnp.asarray(seed, jnp.int32))


def blank(state: State) -> State:
    return jax.tree.map(lambda x: jnp.zeros_like(x) if isinstance(x, jax.Array) else np.zeros_like(x), state)


def assert_equal(got: Any, expected: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array) == isinstance(b, jax.Array)
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(folder: Path, *numbers: int, **kwargs: Any) -> None:
    for number in numbers:
        checkpoint.save(folder, number, make_state(number), POSITION | {"n": number}, config=CONFIG, **kwargs)


def restored(folder: Path, **kwargs: Any) -> tuple[int | None, list[str]]:
    """The step restored, after checking that it is bit-equal to what was saved, and what was logged."""
    lines: list[str] = []
    result = checkpoint.restore(folder, blank(make_state(0)), config=CONFIG, log=lines.append, **kwargs)
    if result is None:
        return None, lines
    assert_equal(result[1], make_state(result[0]))
    assert result[2] == POSITION | {"n": result[0]}
    return result[0], lines


def files_of(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file())


def run(script: str, *arguments: Any) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        cwd=Path(__file__).parent,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_round_trip_is_bit_equal_and_keeps_dtypes(tmp_path):
    save(tmp_path / "mae", 7)
    assert restored(tmp_path / "mae") == (7, [])


def test_a_fresh_folder_has_nothing_to_restore(tmp_path):
    assert restored(tmp_path / "none") == (None, [])
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "notes.txt").write_text("not a step")
    assert restored(tmp_path / "some") == (None, [])
    assert checkpoint.steps(tmp_path / "none") == checkpoint.steps(tmp_path / "some") == []


def test_a_state_without_arrays_and_one_of_python_numbers_survive(tmp_path):
    for i, state in enumerate([{}, {"a": {}, "b": ()}, {"n": 3, "x": 2.5, "f": True, "s": np.float32(4)}]):
        checkpoint.save(tmp_path / str(i), 0, state, {}, config={})
        assert checkpoint.restore(tmp_path / str(i), state, config={}) == (0, state, {})


def test_the_newest_steps_are_kept_and_an_older_one_can_be_asked_for(tmp_path):
    save(tmp_path, 1, 2, 3, keep=2)
    assert checkpoint.steps(tmp_path) == [2, 3]
    assert restored(tmp_path, step=2) == (2, [])
    with pytest.raises(InputError, match=r"no step 1; there are \[2, 3\]"):
        restored(tmp_path, step=1)


def test_a_step_can_be_saved_again(tmp_path):
    save(tmp_path, 1, keep=1)
    checkpoint.save(tmp_path, 1, {"a": jnp.ones(3)}, {}, config={}, keep=1)
    step, state, position = checkpoint.restore(tmp_path, {"a": jnp.zeros(3)}, config={})
    assert (step, position, state["a"].tolist()) == (1, {}, [1, 1, 1])
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def test_a_step_killed_while_it_was_replaced_is_still_there(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "1").rename(tmp_path / "1.replaced")  # the moment between the two renames
    assert checkpoint.steps(tmp_path) == [1]
    assert restored(tmp_path) == (1, [])
    save(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["1"]


def count_detected_flips(folder: Path, count: int) -> int:
    """Flips `count` bits, one at a time, over all files of the newest step; each must lead to the older one."""
    save(folder, 10, 20)
    rng = random.Random(0)
    files = files_of(folder / "20")
    assert len(files) > 10
    detected = 0
    for i in range(count):
        file = files[i] if i < len(files) else rng.choice(files)
        sound = file.read_bytes()
        if not sound:
            continue
        damaged = bytearray(sound)
        damaged[rng.randrange(len(sound))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        step, lines = restored(folder)
        detected += step == 10 and len(lines) == 1 and str(folder / "20") in lines[0]
        file.write_bytes(sound)
    assert restored(folder) == (20, [])
    return detected


def test_every_flipped_bit_is_detected_and_the_older_step_is_used(tmp_path):
    assert count_detected_flips(tmp_path, 20) == 20


def largest(path: Path) -> Path:
    return max(files_of(path / "state"), key=lambda p: p.stat().st_size)


def rewrite(path: Path, text: str) -> None:
    path.write_text(text)


def edit(path: Path, change: Any) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value, indent=1) + "\n")


MUTATIONS = {
    "truncated": (lambda p: os.truncate(largest(p), 10), "has 10 bytes"),
    "one byte longer": (lambda p: largest(p).write_bytes(largest(p).read_bytes() + b"x"), "bytes, expected"),
    "file missing": (lambda p: largest(p).unlink(), "is missing"),
    "file empty": (lambda p: largest(p).write_bytes(b""), "has 0 bytes"),
    "metadata missing": (lambda p: (p / "state" / "_METADATA").unlink(), "'state/_METADATA' is missing"),
    "foreign file": (lambda p: rewrite(p / "state" / "notes\n.txt", "?"), r"'state/notes\\n.txt' is foreign"),
    "foreign link": (lambda p: (p / "link").symlink_to("/etc"), "'link' is foreign"),
    "linked file": (lambda p: (largest(p).rename(p.parent / "x"), largest_link(p)), "cannot be read|missing"),
    "pipe": (lambda p: os.mkfifo(p / "pipe"), "'pipe' is foreign"),
    "file with a name that is no text": (lambda p: open(os.fsencode(p) + b"/\xff", "w").close(), "foreign"),
    "empty folder": (lambda p: (shutil.rmtree(p), p.mkdir()), "empty"),
    "a file": (lambda p: (shutil.rmtree(p), rewrite(p, "")), "not a folder"),
    "a link": (lambda p: (p.rename(p.parent / "moved"), p.symlink_to("moved")), "not a folder"),
    "a copy of another step": (
        lambda p: (shutil.rmtree(p), shutil.copytree(p.parent / "10", p)),
        "a copy of step 10",
    ),
    "no digests": (lambda p: (p / "digests.json").unlink(), "saving was interrupted"),
    "half digests": (lambda p: os.truncate(p / "digests.json", 300), "is damaged"),
    "empty digests": (lambda p: os.truncate(p / "digests.json", 0), "is damaged"),
    "no step.json": (lambda p: (p / "step.json").unlink(), "'step.json' is missing"),
    "half step.json": (lambda p: os.truncate(p / "step.json", 30), "'step.json' has 30 bytes"),
    "later format": (lambda p: edit(p / "digests.json", lambda d: d.update(format=2)), "has format 2"),
    "wrong types": (lambda p: edit(p / "digests.json", lambda d: d.update(files=[1])), "is damaged"),
    "wrong entry": (lambda p: edit(p / "digests.json", lambda d: d["files"].update({"step.json": 3})), "damaged"),
    "digests not a dict": (lambda p: rewrite(p / "digests.json", "[]\n"), "is damaged"),
    "deep JSON": (lambda p: rewrite(p / "digests.json", "[" * 10**6), "is damaged"),
    "not text": (lambda p: (p / "digests.json").write_bytes(b"\xff\xfe"), "is damaged"),
    "other spacing": (
        lambda p: rewrite(p / "digests.json", json.dumps(json.loads((p / "digests.json").read_text()))),
        "is damaged",
    ),
}


def largest_link(path: Path) -> None:
    listed = json.loads((path / "digests.json").read_text())["files"]
    gone = next(name for name in listed if not (path / name).exists())
    (path / gone).symlink_to(path.parent / "x")


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    save(folder, 10, 20)
    return folder


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_damaged_step_is_named_and_passed_over_and_can_be_saved_again(name, two_steps, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    mutate, reason = MUTATIONS[name]
    mutate(folder / "20")
    step, lines = restored(folder)
    assert step == 10
    assert len(lines) == 1 and "\n" not in lines[0] and str(folder / "20") in lines[0]
    assert re.search(reason, lines[0]), lines[0]
    assert (folder / "20").exists()  # looked at, not touched
    with pytest.raises(InputError, match="no sound step"):
        restored(folder, step=20)
    save(folder, 20)
    assert restored(folder) == (20, [])


def test_training_never_restarts_silently_where_no_step_is_sound(tmp_path):
    save(tmp_path, 1, 2)
    for step in (1, 2):
        os.truncate(tmp_path / str(step) / "step.json", 3)
    with pytest.raises(InputError, match=r"no sound step to continue from .*2: step not used: 'step.json' has"):
        restored(tmp_path)
    empty = tmp_path / "other"
    (empty / "5").mkdir(parents=True)
    with pytest.raises(InputError, match="no sound step"):
        restored(empty)


CRAFTED = """
import contextlib, os, pickle, shutil, sys
from pathlib import Path
import test_checkpoint as t

class Canary:
    def __reduce__(self):
        return os.mkdir, (sys.argv[1] + "/canary",)

folder = Path(sys.argv[1])
t.save(folder / "mae", 1)
sound = folder / "mae" / "1"
for i, file in enumerate(t.files_of(sound / "state")):
    crafted = folder / str(i) / "1"
    shutil.copytree(sound, crafted)
    (crafted / file.relative_to(sound)).write_bytes(pickle.dumps(Canary()))
    digests = t.checkpoint._digests(crafted, t.checkpoint._files(crafted) - {"digests.json"})
    t.edit(crafted / "digests.json", lambda listed: listed.update(files=digests))
    with contextlib.suppress(t.InputError):
        t.restored(crafted.parent)
"""


def test_a_crafted_step_runs_no_code(tmp_path):
    done = run(CRAFTED, tmp_path)  # a process of its own: orbax leaves coroutines behind, which warn later
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "canary").exists()


def test_left_overs_of_an_interrupted_save_do_not_matter(tmp_path):
    save(tmp_path, 1)
    for name in ("2.1.tmp/state.orbax-checkpoint-tmp", "3.99.tmp/state"):
        shutil.copytree(tmp_path / "1", tmp_path / name)
    assert restored(tmp_path) == (1, [])
    save(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2"]


def test_pruning_never_counts_damaged_steps(tmp_path):
    save(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "2" / "state")
    save(tmp_path, 3, keep=2)
    assert checkpoint.steps(tmp_path) == [1, 3]


def test_another_configuration_is_refused_with_the_first_differences(tmp_path):
    save(tmp_path, 1)
    other = {"model": {"width": 384, "patch": [8, 8]}, "stage": "mae", "empty": {}, "rate": float("nan"), "new": 1}
    with pytest.raises(InputError) as error:
        checkpoint.restore(tmp_path, make_state(0), config=other)
    assert "model.width: checkpoint 192, recipe 384; new: checkpoint absent, recipe 1; remedy" in str(error.value)
    assert "\n" not in str(error.value)
    assert checkpoint.restore(tmp_path, make_state(0), config=None)[0] == 1


def test_other_shapes_types_and_names_are_refused(tmp_path):
    checkpoint.save(tmp_path, 1, {"a": jnp.ones((3, 4)), "b": jnp.ones(2), "c": jnp.ones(1)}, {}, config={})
    target = {"a": jnp.ones((4, 3)), "b": jnp.ones(2, jnp.bfloat16), "d": jnp.ones(1)}
    with pytest.raises(InputError) as error:
        checkpoint.restore(tmp_path, target, config={})
    assert "a: checkpoint float32[3, 4], recipe float32[4, 3]" in str(error.value)
    assert "b: checkpoint float32[2], recipe bfloat16[2]" in str(error.value)
    assert "c: checkpoint float32[1], recipe absent; and 1 more" in str(error.value)


def test_a_part_of_a_state_is_read_without_the_rest(tmp_path):
    save(tmp_path, 4)
    state = make_state(4)
    target = {"params": blank(state).params, "stats": blank(state).stats}
    step, part, _ = checkpoint.restore(tmp_path, target, config=None, parts=("params", "stats"))
    assert step == 4
    assert_equal(part, {"params": state.params, "stats": state.stats})
    del target["stats"]["flag"]
    with pytest.raises(InputError, match=r"stats/flag: checkpoint bool\[\], recipe absent"):
        checkpoint.restore(tmp_path, target, config=None, parts=("params", "stats"))


def test_a_step_of_an_earlier_release_opens(tmp_path):
    """tests/golden/checkpoint was saved by the release before `restore` could read a part of a state."""
    folder, state = Path(__file__).parent / "golden" / "checkpoint", make_state(3)
    leaves = json.loads((folder / "3" / "step.json").read_text())["leaves"]
    assert {"params/encoder/kernel", "opt/1/0/mu/encoder/kernel", "stats/host", "step"} < set(leaves)
    target = {"params": blank(state).params, "step": jnp.int32(0)}
    step, part, position = checkpoint.restore(folder, target, config=CONFIG, parts=("params", "step"))
    assert (step, position) == (3, POSITION)
    assert_equal(part, {"params": state.params, "step": state.step})
    names = {"nan", "nothing", "host", "byte"}
    whole = state._replace(stats={name: state.stats[name] for name in names})
    assert_equal(checkpoint.restore(folder, blank(whole), config=CONFIG)[1], whole)


def test_shape_structs_serve_as_target(tmp_path):
    state = {"a": jnp.ones((3, 4)), "z": jnp.ones((0, 2))}
    checkpoint.save(tmp_path, 1, state, {}, config={})
    target = jax.eval_shape(lambda: state)
    assert_equal(checkpoint.restore(tmp_path, target, config={})[1], state)


def test_names_that_would_collide_are_refused(tmp_path):
    with pytest.raises(ValueError, match="same name"):
        checkpoint.save(tmp_path, 1, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {}, config={})


def test_a_disk_without_room_leaves_the_older_steps(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 95, 5))
    with pytest.raises(InputError, match=r"2: not saved: 0\.0 MB needed, 0\.0 MB free; older steps are intact"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]
    assert restored(tmp_path) == (1, [])


DISK_FULL = """
import resource, sys
from pathlib import Path
import test_checkpoint as t
folder = Path(sys.argv[1])
t.save(folder, 1)
for limit in (0, 5, 100, 300, 700):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        t.save(folder, 2)
        raise SystemExit(f"saved {limit}")
    except t.InputError as error:
        assert "2: not saved: " in str(error) and "File too large" in str(error), error
        assert "\\n" not in str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert t.checkpoint.steps(folder) == [1] and not (folder / "2").exists()
    assert t.restored(folder) == (1, [])
t.save(folder, 2)
assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]
assert t.restored(folder) == (2, [])
"""


@pytest.mark.long
def test_a_write_that_fails_midway_is_one_line_and_leaves_the_older_steps(tmp_path):
    done = run(DISK_FULL, tmp_path)
    assert done.returncode == 0, done.stderr


KILLED = """
import os, random, signal, sys, time, warnings
from pathlib import Path
import test_checkpoint as t
warnings.filterwarnings("ignore", "os.fork")  # no thread runs yet: the backend is started in the children alone
folder, trials = Path(sys.argv[1]), int(sys.argv[2])

def child(work):
    def body():
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    pid = os.fork()
    return pid or body()

def save_on(write):
    result = t.checkpoint.restore(folder, t.blank(t.make_state(0)), config=t.CONFIG)
    first = 0 if result is None else result[0] + 1
    for step in range(first, first + 100):
        state = t.make_state(step)
        os.write(write, b"%d " % step)
        t.save(folder, step, keep=1 + step % 2)

def check(completed):
    step, lines = t.restored(folder)
    assert step is None or step >= completed, (step, completed)
    assert step is not None or completed < 0
    assert lines == [], lines

rng = random.Random(int(sys.argv[3]))
for trial in range(trials):
    read, write = os.pipe()
    pid = child(lambda: save_on(write))
    os.close(write)
    seen = b""
    while seen.count(b" ") < rng.choice([1, 2, 3]):
        more = os.read(read, 100)
        assert more, "ended early"
        seen += more
    time.sleep(rng.uniform(0, 0.08))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while more := os.read(read, 100):
        seen += more
    os.close(read)
    pid = child(lambda: check(int(seen.split()[-1]) - 1))
    assert os.waitpid(pid, 0)[1] == 0, (trial, seen)
    print("tmp" if any(p.suffix == ".tmp" for p in folder.iterdir()) else "-", flush=True)
"""


KILLED_AT = """
import os, signal, sys, warnings
from pathlib import Path
import test_checkpoint as t
warnings.filterwarnings("ignore", "os.fork")
prepared, trials, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def save_and_die(folder, moment):
    left = [moment]
    state = t.make_state(step)
    def hook(event, arguments):  # open, os.rename, os.mkdir, os.remove, os.rmdir, os.listdir, os.scandir, ...
        if (event == "open" or event.startswith("os.")) and arguments and str(folder) in str(arguments[0]):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    t.save(folder, step, keep=1)
    os._exit(0)

for moment in map(int, sys.argv[4:]):
    folder = trials / str(moment)
    t.shutil.copytree(prepared, folder)
    pid = os.fork() or save_and_die(folder, moment)
    print(moment, os.waitpid(pid, 0)[1], flush=True)
"""


def check_saves_killed_at(tmp_path: Path, step: int, moments: list[int]) -> list[int]:
    """Kills a save of `step` (over steps 1 and 2, which it replaces) at its n-th use of the folder; exit codes."""
    save(tmp_path / "prepared", 1, 2)
    done = run(KILLED_AT, tmp_path / "prepared", tmp_path / "trials", step, *moments)
    assert done.returncode == 0, done.stderr
    codes = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(codes) == len(moments)
    for moment, code in zip(moments, codes, strict=True):
        folder = tmp_path / "trials" / str(moment)
        found, lines = restored(folder)
        assert found in ({step} if code == 0 else {2, step}), moment
        assert lines == [], moment
        save(folder, step, keep=1)
        assert restored(folder) == (step, [])
        shutil.rmtree(folder)
    return codes


@pytest.mark.parametrize("step", [2, 3])
@pytest.mark.long_but_first
def test_a_save_killed_at_any_use_of_its_folder_leaves_a_complete_step(step, tmp_path):
    codes = check_saves_killed_at(tmp_path, step, [5, 90, 104, 1000])
    assert codes[0] != 0 and codes[-1] == 0


@pytest.mark.long
def test_a_save_killed_at_any_moment_leaves_a_complete_step(tmp_path):
    done = run(KILLED, tmp_path, 2, 0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.split()) == 2


EIGHT = """
import sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jmae import checkpoint
mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
place = {"w": NamedSharding(mesh, P("fsdp", None)), "b": NamedSharding(mesh, P())}
blank = {"w": np.zeros((8, 3), np.float32), "b": np.zeros(3, np.float32)}
target = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=place[k]) for k, v in blank.items()}
_, state, _ = checkpoint.restore(Path(sys.argv[1]), target, config={})
assert state["w"].sharding == place["w"] and state["b"].sharding == place["b"]
assert len({s.device for s in state["w"].addressable_shards}) == 8
checkpoint.save(Path(sys.argv[2]), 5, jax.tree.map(lambda x: x + 1, state), {}, config={})
"""


@pytest.mark.long
def test_a_step_of_one_device_is_read_on_eight_and_back(tmp_path):
    state = {"w": jnp.arange(24.0).reshape(8, 3) / 7, "b": jnp.arange(3.0)}
    checkpoint.save(tmp_path / "one", 1, state, {}, config={})
    done = run(EIGHT, tmp_path / "one", tmp_path / "eight")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    _, got, _ = checkpoint.restore(tmp_path / "eight", jax.tree.map(jnp.zeros_like, state), config={})
    assert_equal(got, jax.tree.map(lambda x: x + 1, state))


ALL_PAIRS = """
import itertools, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jmae import checkpoint
values = {"w": np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32), "b": np.arange(3.0, dtype=np.float32)}
def placed(n, split):
    mesh = Mesh(np.array(jax.devices()[:n]), ("fsdp",))
    return {"w": NamedSharding(mesh, P("fsdp" if split else None)), "b": NamedSharding(mesh, P())}
forms = [(n, split) for n in (1, 2, 4, 8) for split in (False, True)]
for form in forms:
    folder = Path(sys.argv[1]) / str(form)
    checkpoint.save(folder, 1, {k: jax.device_put(v, placed(*form)[k]) for k, v in values.items()}, {}, config={})
for old, new in itertools.product(forms, forms):
    target = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=placed(*new)[k]) for k, v in values.items()}
    _, state, _ = checkpoint.restore(Path(sys.argv[1]) / str(old), target, config={})
    for k, v in values.items():
        assert state[k].sharding == placed(*new)[k] and np.asarray(state[k]).tobytes() == v.tobytes(), (old, new, k)
print("pairs", len(forms) ** 2)
"""


@pytest.mark.long
def test_every_pair_of_1_2_4_and_8_devices_restores_the_same_bits(tmp_path):
    """Whole on every device, and split over them."""
    done = run(ALL_PAIRS, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "pairs 64\n", "")


HOLDER = """
import sys, time
from pathlib import Path
from jmae import checkpoint
with checkpoint.workdir_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_ends_even_by_kill(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"in use by process {holder.pid} on {os.uname().nodename}"):
        with checkpoint.workdir_lock(tmp_path):
            pass
    holder.kill()
    holder.communicate()
    assert f"process {holder.pid}" in (tmp_path / ".lock").read_text()  # stale, and no obstacle
    with checkpoint.workdir_lock(tmp_path):
        with pytest.raises(InputError, match=f"in use by process {os.getpid()}"):
            with checkpoint.workdir_lock(tmp_path):
                pass
    assert not (tmp_path / ".lock").exists()


def test_where_locks_are_not_supported_the_name_in_the_file_decides(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(checkpoint.fcntl, "flock", unsupported)
    with checkpoint.workdir_lock(tmp_path):
        with pytest.raises(InputError, match="in use by"):
            with checkpoint.workdir_lock(tmp_path):
                pass
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / ".lock").write_text(f"process {ended.pid} on {os.uname().nodename}")
    with checkpoint.workdir_lock(tmp_path):
        pass
    (tmp_path / ".lock").write_text("process 1 on another-host")
    with pytest.raises(InputError, match="another-host"):
        with checkpoint.workdir_lock(tmp_path):
            pass


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    folder, real, tries = tmp_path / "run", checkpoint.fcntl.flock, []

    def after_the_other_ended(file, how):
        if not tries:
            shutil.rmtree(folder)
        tries.append(file)
        real(file, how)

    monkeypatch.setattr(checkpoint.fcntl, "flock", after_the_other_ended)
    with checkpoint.workdir_lock(folder):
        assert len(tries) == 2 and f"process {os.getpid()}" in (folder / ".lock").read_text()
        with pytest.raises(InputError, match="in use by process"):
            with checkpoint.workdir_lock(folder):
                pass


def test_a_lock_removes_the_folder_that_it_made_where_no_file_was_written(tmp_path):
    for inside, stays in (("", False), ("cache/", False), ("cache/a", True), ("a", True)):
        with checkpoint.workdir_lock(tmp_path / "runs" / "mine"):
            file = tmp_path / "runs" / "mine" / inside
            file.parent.mkdir(exist_ok=True)
            file.write_text("") if stays else file.mkdir(exist_ok=True)
        assert (tmp_path / "runs").exists() == stays
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)


def test_the_file_of_a_lock_is_gone_after_a_command_that_ended_or_failed(tmp_path):
    for error in (None, InputError("wrong input"), KeyboardInterrupt()):
        with contextlib.suppress(InputError, KeyboardInterrupt), checkpoint.workdir_lock(tmp_path):
            assert [path.name for path in tmp_path.iterdir()] == [".lock"]
            if error:
                raise error
        assert not list(tmp_path.iterdir())


def test_a_lock_that_another_run_has_made_anew_is_not_removed(tmp_path):
    with checkpoint.workdir_lock(tmp_path):
        (tmp_path / ".lock").unlink()
        second = checkpoint.workdir_lock(tmp_path)
        second.__enter__()
    with pytest.raises(InputError, match="in use by process"), checkpoint.workdir_lock(tmp_path):
        pass
    second.__exit__(None, None, None)
    assert not list(tmp_path.iterdir())


def test_one_of_many_at_a_time_has_a_lock_whose_file_comes_and_goes(tmp_path):
    def work(_):
        done = 0
        while done < 25:
            with contextlib.suppress(InputError), checkpoint.workdir_lock(tmp_path):
                os.close(os.open(tmp_path / "inside", os.O_CREAT | os.O_EXCL))  # fails if another is inside
                time.sleep(0)
                (tmp_path / "inside").unlink()
                done += 1

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not list(tmp_path.iterdir())
