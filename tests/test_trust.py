"""What later commands believe of a run folder: its recipe, its calibration, its rows, its exports, its weights."""

import json
import random
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from jmae import checkpoint, evaluate, export, predict, recipe, run_folder, tensors, train
from jmae.calibration import CALIBRATION, calibrate, read_calibration
from jmae.cards import trained_on
from jmae.data.cases import KeptCase
from jmae.data.files import Image
from jmae.data.manifest import Row
from jmae.data.preparation import PLS, Opened, prepared_case, prepared_image, soft_masks, stored_image
from jmae.errors import InputError, NonFiniteLoss, exit_code
from jmae.programs import skipping
from jmae.results import Result
from jmae.run_folder import digest, fixed, images_digest
from jmae.run_recipe import read_run, refuse_other_recipe
from jmae.sealed import seal, seal_line, seal_table, unseal, unseal_table
from jmae.seen import differences, read_seen, write_seen
from jmae.system import State
from jmae.tables import counted, csv_text, harmless, plain

ROWS = [Row(f"case {i}", "p", "train", 0, (f"{i}.png",), content=f"{i:016x}") for i in range(40)]


def load(name: str = "amae", **changes) -> ConfigDict:
    config = recipe.load(f"configs/{name}.py:smoke")
    config.update_from_flattened_dict(changes)
    return config


def write_run(folder: Path, config: ConfigDict, stage: str = "pretrain", **more) -> Path:
    """A run folder of one finished stage with one number."""
    identity = {"recipe": fixed(config), "rows": digest(ROWS), "images": images_digest(ROWS)} | more
    for step in (1, 2):
        position = {"steps": 2}
        checkpoint.save(folder / "checkpoints" / stage, step, {"w": np.ones(3)}, position, config=identity)
    run_folder.describe_run(config, folder)
    return folder


def rewrite(folder: Path, key: str, value) -> None:
    """Changes a key of config.json, and its digest with it."""
    content = unseal((folder / "config.json").read_bytes(), "", None)
    *sections, last = key.split(".")
    place = content
    for section in sections:
        place = place[section]
    if value is None:
        del place[last]
    else:
        place[last] = value
    (folder / "config.json").write_text(seal(content))


# --- the recipe -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("model.heads", 2, "recipe.model.heads: checkpoint 3, config.json 2"),
        ("seed", 7, "recipe.seed: checkpoint 0, config.json 7"),
        ("pretrain.steps", 3, "recipe.pretrain.steps: checkpoint"),
        ("model.width", None, "recipe.model.width: checkpoint"),
        ("data.size", [48, 48], "recipe.data.size: checkpoint"),
        ("system", "ppii", "config.json: is no recipe of a run (it lacks "),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "predict", "load", "export"])
def test_a_config_that_is_not_that_of_the_checkpoints_is_refused(tmp_path, key, value, said, command):
    run = write_run(tmp_path / "run", load(**{"model.heads": 3}))
    assert read_run(run).model.heads == 3
    rewrite(run, key, value)
    calls = {
        "evaluate": lambda: evaluate.main([f"--workdir={run}"]),
        "predict": lambda: predict.main([f"--workdir={run}", f"--out={tmp_path / 'out'}", __file__]),
        "load": lambda: predict.load(run),
        "export": lambda: export.main([f"--workdir={run}", f"--out={tmp_path / 'out'}"]),
    }
    with pytest.raises(InputError) as error:
        calls[command]()
    assert said in str(error.value) and "\n" not in str(error.value) and "restore" in str(error.value)


def test_settings_that_no_checkpoint_depends_on_carry_a_digest(tmp_path):
    run = write_run(tmp_path / "run", load())
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"batch": 16', '"batch": 17'))
    assert (run / "config.json").read_text() != text
    with pytest.raises(InputError, match="its digest says that it is damaged"):
        read_run(run)


def test_a_recipe_of_an_earlier_version_is_brought_up_before_it_is_compared(tmp_path):
    """Keys that were declared later count with the value that changes nothing; old config.json have no digest."""
    config = load()
    old = fixed(config)
    del old["steps_per_dispatch" if "steps_per_dispatch" in old else "select_samples"]
    run = write_run(tmp_path / "run", config, recipe=old)
    (run / "config.json").write_text(recipe.to_json(config))
    assert fixed(read_run(run)) == fixed(config)


def test_a_damaged_step_is_not_believed_and_another_folder_is_no_step(tmp_path):
    run = write_run(tmp_path / "run", load())
    (run / "checkpoints" / "pretrain" / "2" / "step.json").write_text(json.dumps({"config": {"recipe": {"seed": 9}}}))
    (run / "checkpoints" / "notes").mkdir()
    assert [path.name for path, _ in checkpoint.configs(run)] == ["1"]
    assert read_run(run).seed == 0


def test_a_second_system_does_not_take_over_an_old_run_folder(tmp_path, capfd):
    run = write_run(tmp_path / "run", load(), stage="its own stage")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert exit_code(train.main, ["--config=configs/memmc_mae.py:smoke", f"--workdir={run}"]) == 2
    said = capfd.readouterr().err
    assert 'recipe.system: checkpoint "amae", recipe "memmc_mae"' in said and "another --workdir" in said
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refuse_other_recipe(load(), run)


# --- digests ----------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_sealed_file_is_told_or_changes_nothing():
    content = {"n": 3, "scores": {"a": 0.25, "b": 1e-3}, "threshold": None, "needs": [], "text": "x"}
    text, table = seal(content).encode(), csv_text([{"id": "a", "image": "0" * 16}, {"id": "b", "image": ""}])
    assert unseal(text, "", None) == content
    told = 0
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert unseal(bytes(flipped), "", pytest.fail) == content  # white space, or another writing of a value
        except ValueError:
            told += 1
    assert told > 7 * len(text)
    sealed = seal_table(table)
    assert unseal_table(sealed, "", pytest.fail) == table
    for bit in range(8 * len(sealed)):
        flipped = bytearray(sealed.encode())
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError):
            unseal_table(flipped.decode(), "", pytest.fail)
    for cut in range(1, len(sealed) - 1):
        if cut > len(sealed.partition("\n")[0]):
            with pytest.raises(ValueError):
                unseal_table(sealed[:cut], "", pytest.fail)


def test_seen_rows_that_were_cut_or_changed_are_refused_and_old_ones_said_to_be_unchecked(tmp_path, capfd):
    write_seen(tmp_path, ROWS[:20])
    write_seen(tmp_path, ROWS[20:])
    file = tmp_path / "seen.csv"
    text = file.read_text()
    known = [(row.id, row.patient, row.split, row.content) for row in ROWS]
    assert [(row.id, row.patient, row.split, row.content) for row in read_seen(tmp_path)] == known
    assert capfd.readouterr().err == ""
    lines = text.splitlines(keepends=True)
    for bad in ("".join(lines[:-1]), "".join(lines[:20]), lines[0], text.replace("case 7", "case 9"), text[:-1]):
        file.write_text(bad)
        with pytest.raises(InputError, match=r"seen\.csv: not readable \(its digest says that it is damaged or cut\)"):
            read_seen(tmp_path)
    file.write_text(csv_text([dict(id=r.id, patient=r.patient, split=r.split, image=r.content) for r in ROWS]))
    assert len(read_seen(tmp_path)) == 40
    assert capfd.readouterr().err == f"{file}: has no digest, as earlier versions wrote it: unchecked\n"


def test_a_damaged_environment_is_left_out_of_reports_and_said(tmp_path, capfd):
    run = write_run(tmp_path / "run", load())
    whole = run_folder.read_environment(run)
    assert whole["python"] and "content_sha256" not in whole
    text = (run / "environment.json").read_text()
    for bad in ("no JSON", "[1]", text.replace('"jax"', '"jay"', 1), "[" * 100_000, ""):
        (run / "environment.json").write_text(bad)
        assert run_folder.read_environment(run) == {}
        said = capfd.readouterr().err
        assert "left out of reports" in said and said.count("\n") == 1
    (run / "environment.json").unlink()
    assert run_folder.read_environment(run) == {}


def toy_export(folder: Path) -> Path:
    folder.mkdir()
    function = lambda weights, image, case: {"scores/x": weights["w"].sum() + image.sum()}
    import jax
    import safetensors.numpy

    shapes = {"w": jax.ShapeDtypeStruct((3,), np.float32)}, jax.ShapeDtypeStruct((2, 2), np.float32)
    exported = jax.export.export(jax.jit(function))(*shapes, jax.ShapeDtypeStruct((2,), np.uint32))
    (folder / "function.bin").write_bytes(exported.serialize())
    safetensors.numpy.save_file({"w": np.ones(3, np.float32)}, folder / "weights.safetensors")
    sums = {name: export.sha256(folder / name) for name in ("function.bin", "weights.safetensors")}
    (folder / "export.json").write_text(seal({"system": "toy", "calibration": {"threshold": 0.5}, "sha256": sums}))
    return folder


def test_an_export_is_verified_whatever_its_description_says(tmp_path, capfd):
    folder = toy_export(tmp_path / "export")
    call, about = export.load(folder)
    assert call(np.ones((2, 2), np.float32), np.zeros(2, np.uint32))["scores/x"] == 7 and about["system"] == "toy"
    text = (folder / "export.json").read_text()
    content = {key: value for key, value in about.items() if key != "content_sha256"}
    for bad in (
        seal(content | {"sha256": {}}),
        seal({key: value for key, value in content.items() if key != "sha256"}),
        text.replace("0.5", "0.4"),
        "[]",
        "[" * 100_000,
    ):
        (folder / "export.json").write_text(bad)
        with pytest.raises(InputError, match="no whole export"):
            export.load(folder)
    rng = random.Random(0)
    for _ in range(40):
        flipped = bytearray(text.encode())
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        (folder / "export.json").write_bytes(flipped)
        try:
            assert export.load(folder)[1] == about
        except InputError as error:
            assert "\n" not in str(error)
    (folder / "export.json").write_text(json.dumps(content))
    capfd.readouterr()
    assert export.load(folder)[1] == content
    assert "has no digest" in capfd.readouterr().err


def test_a_calibration_carries_its_digest(tmp_path, monkeypatch):
    import jmae.calibration as calibration

    config, results = load(), {}
    system = types.SimpleNamespace(sweep=None, primary="x")
    identity = {"weights": "w", "settings": {"score": "x"}}
    monkeypatch.setattr(calibration, "score_identity", lambda *_: identity)
    monkeypatch.setattr(calibration, "settings_before", lambda _: {})
    monkeypatch.setattr(calibration, "chosen_on_val", lambda _: False)
    rows = [Row(f"n{i}", "", "val", 0, ()) for i in range(30)]
    scores = np.linspace(0.1, 0.9, 30)[None]
    reference = calibration.ReferenceScores(rows, scores, np.full((30, 2), np.nan), np.full(30, np.nan))
    written = calibrate(config, system, results, reference, tmp_path)
    read = lambda: read_calibration(config, system, results, tmp_path, pytest.fail).scores
    assert read() == written.scores
    text, rng, told = (tmp_path / CALIBRATION).read_bytes(), random.Random(1), 0
    for _ in range(200):
        flipped = bytearray(text)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        (tmp_path / CALIBRATION).write_bytes(flipped)
        try:
            assert read() == written.scores
        except InputError as error:
            told += 1
            assert "is no calibration" in str(error)
    assert told > 150


def test_weights_files_of_jmae_carry_the_digest_of_their_content(tmp_path):
    arrays = {"encoder/a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(0, np.float32)}
    about = {"format": 1, "heads": 3}
    first = tensors.digest_of(arrays, about)
    assert first == tensors.digest_of(dict(reversed(arrays.items())), about)
    changed = [
        ({**arrays, "encoder/a": arrays["encoder/a"] + 1e-6}, about),
        ({**arrays, "encoder/a": arrays["encoder/a"].T}, about),
        ({**arrays, "encoder/c": arrays["encoder/a"]}, about),
        (arrays, about | {"heads": 4}),
    ]
    assert first not in [tensors.digest_of(*one) for one in changed]


# --- rows and images --------------------------------------------------------------------------------------------------


def test_images_that_were_exchanged_under_the_same_ids_are_noticed(tmp_path):
    run = write_run(tmp_path / "run", load())
    system = types.SimpleNamespace(stages=[types.SimpleNamespace(name="pretrain")])
    other = [row._replace(content="f" * 16) if row.id == "case 3" else row for row in ROWS]
    assert digest(other) == digest(ROWS) and images_digest(other) != images_digest(ROWS)
    assert trained_on(system, run, ROWS) and not trained_on(system, run, other)
    course = types.SimpleNamespace(folder=run, config=load(), identity={"images": images_digest(other)})
    folder, target = run / "checkpoints" / "pretrain", {"w": np.zeros(3)}
    up = lambda saved: train.saved_identity(course, saved)
    identity = {"recipe": fixed(load()), "rows": digest(ROWS), "images": images_digest(ROWS)}
    assert checkpoint.restore(folder, target, config=identity, brought_up=up)[0] == 2
    with pytest.raises(InputError, match="the images to train on differ"):
        checkpoint.restore(folder, target, config=identity | {"images": images_digest(other)}, brought_up=up)


def test_images_that_differ_are_counted_with_ids():
    row = lambda name, content, split="train": Row(name, "", split, 0, (), content=content)
    before = [row("a", "1"), row("b", "2"), row("c", "3"), row("v", "4", "val")]
    assert differences(before, before[:3]) == ""
    now = [row("a", "9"), *(row(name, "2") for name in "bdefg")]
    assert differences(before, now) == "1 changed (a); 1 removed (c); 4 added (d, e, f, ...)"


def test_a_checkpoint_without_digests_of_images_is_continued_and_it_is_said(tmp_path, capfd):
    identity = {"recipe": fixed(load()), "rows": digest(ROWS)}
    checkpoint.save(tmp_path, 1, {"w": np.ones(3)}, {}, config=identity)
    course = types.SimpleNamespace(folder=tmp_path, config=load(), identity={"images": "now"})
    up = lambda saved: train.saved_identity(course, saved)
    assert checkpoint.restore(tmp_path, {"w": np.zeros(3)}, config=identity | {"images": "now"}, brought_up=up)
    assert "without digests of its images: they are not compared" in capfd.readouterr().err


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_an_image_without_content_is_refused(tmp_path, value):
    config = load().data
    array = np.full((40, 40, 1), value, np.float32)
    row = Row("a", "", "test", 0, ("a.png",))
    image = types.SimpleNamespace(array=array, bits=8)
    with pytest.raises(InputError, match=r"a\.png: no content: it has one value all over"):
        prepared_image(row, config, image)
    array[3, 3] = value + 1
    assert np.isfinite(prepared_image(row, config, image)).all()


# --- folders that two commands write ----------------------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from jmae import checkpoint
with checkpoint.workdir_lock(Path(sys.argv[1]), "--out"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_predict_or_evaluate_into_a_folder_is_refused(tmp_path):
    from jmae.evaluate import locked

    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    try:
        with pytest.raises(InputError, match=rf"out: in use by process {holder.pid} .*choose another --out"):
            with locked(tmp_path / "run", tmp_path / "out", of_run=False):
                pass
        with pytest.raises(InputError, match="choose another --out"):
            with checkpoint.workdir_lock(tmp_path / "out", "--out"):
                pass
    finally:
        holder.communicate("")
    with locked(tmp_path / "run", tmp_path / "out", of_run=True), pytest.raises(InputError, match="in use"):
        with checkpoint.workdir_lock(tmp_path / "run"):
            pass


def test_a_lock_that_is_no_text_is_no_traceback(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff\x00\x1b[2Jprocess")
    with checkpoint.workdir_lock(tmp_path), pytest.raises(InputError) as error, checkpoint.workdir_lock(tmp_path):
        pass
    assert str(error.value).isprintable()


def test_failed_cases_of_an_earlier_command_are_not_listed(tmp_path):
    rows = [Row("=a", "", "test", None, ("a.png",)), Row("b", "", "test", None, ("b.png",))]
    first = [predict.Failure(row, "bad", final=False) for row in rows]
    assert predict.finish(rows, {}, first, tmp_path, 0.05) == 1
    done = {"b": {"image": ["b.png"], "line": {"id": "b", "label": None, "score": 1.0, "p_value": None}}}
    assert (tmp_path / "failed.csv").read_text().startswith("id,image,reason\n'=a,")
    assert predict.finish(rows[1:], done, [], tmp_path, 0.05) == 0 and not (tmp_path / "failed.csv").exists()
    assert (tmp_path / "scores.csv").read_text() == "id,label,score,p_value\nb,,1,\n"


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@x", "\tx", "'=1", "''=1", "'", "a=1", "", "é", "-"])
def test_cells_that_a_spreadsheet_would_run_are_quoted_and_come_back(text):
    cell = harmless(text)
    assert plain(cell) == text and not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert harmless(-1.5) == "-1.5"
    assert csv_text([{"a": text, "b": -2.0}]).endswith(",-2\n")
    assert csv_text([{"a": float(np.float32(0.1)), "b": np.float32(1 / 3)}]) == "a,b\n0.100000001,0.333333343\n"


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_lines_of_metrics_that_cannot_be_read_are_said_and_stay(tmp_path, capfd):
    file = tmp_path / "metrics.jsonl"
    good = [{"stage": "a", "step": step, "loss": step / 7} for step in range(1, 6)]
    bad = [b"\xff\xfe\n", b'{"stage": "a"}\n', b"[1]\n", b'{"stage": "a", "st', b"[" * 100_000 + b"\n"]
    lines = [json.dumps(line).encode() + b"\n" for line in good]
    file.write_bytes(lines[0] + bad[0] + lines[1] + bad[1] + bad[2] + lines[2] + bad[4] + lines[3] + lines[4] + bad[3])
    assert run_folder.read_history(file) == good
    said = capfd.readouterr().err
    assert said == f"warning: {file}: line 2, 4, 5 and 1 more: cannot be read and is passed over\n"
    run_folder.cut_history(file, "a", 3)
    kept = lines[0] + bad[0] + lines[1] + bad[1] + bad[2] + lines[2] + bad[4]  # the torn end comes again
    assert file.read_bytes() == kept
    run_folder.cut_history(file, "b", 0)
    run_folder.add_history(file, good[3])
    assert file.read_bytes() == kept + lines[3] and run_folder.read_history(file) == good[:4]


def test_a_damaged_line_of_a_prediction_is_predicted_again(tmp_path):
    line = {"id": "a", "image": ["a"], "of": [], "files": [], "line": {"score": 0.125}}
    file = tmp_path / "done"
    good = [seal_line({"weights": "w"}), seal_line(line), seal_line(line | {"id": "b"})]
    file.write_text("\n".join(good) + "\n")
    assert [one.get("id") for one in predict.read_done(file)] == [None, "a", "b"]
    file.write_text("\n".join([good[0], good[1].replace("0.125", "0.625"), good[2][:-9]]))
    assert predict.read_done(file) == [{"weights": "w"}]
    assert predict.read_done(tmp_path / "none") == []


# --- other files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["phantom:", "phantom:nonsense", "phantom:chest/test/x", "phantom:x/test/0", "phantom:a/b/c/d"]
)
def test_a_row_of_a_phantom_that_is_none_is_one_line(name):
    with pytest.raises(InputError) as error:
        stored_image(Row("a", "", "test", 0, (name,)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["metrics.json", "scores.csv", "cases.csv", "config.json", "environment.json"])
def test_a_report_of_a_damaged_folder_is_one_line(tmp_path, file, capfd):
    import jmae.report.__main__ as report

    folder = tmp_path / "run" / "evaluation"
    folder.mkdir(parents=True)
    sound = {
        "metrics.json": "{}",
        "scores.csv": "id,label,score\na,0,0.5\nb,1,0.7\n",
        "cases.csv": "id,patient,image\na,,0\nb,,1\n",
        "config.json": "{}",
        "environment.json": "{}",
    }
    for bad in (
        "",
        "[",
        "[1]",
        "null",
        "\xff",
        "[" * 100_000,
        '{"a": 1}',
        "id,label\n",
        "id,label,score\na,x,y\n",
        "\0",
    ):
        for name, text in sound.items():
            (folder / name).write_text(bad if name == file else text, encoding="latin-1")
        assert exit_code(report.main, [str(tmp_path / "run"), f"--out={tmp_path / 'page.html'}"]) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and "Traceback" not in said


def test_control_characters_of_names_and_headers_do_not_reach_the_terminal(tmp_path, capfd):
    assert predict.printable("a\x1b[2Jb\u202ec\u00e9 d") == "a\\x1b[2Jb\\u202ec\u00e9 d"
    assert predict.why_failed(Row("a", "", "x", None, ("f",)), MemoryError()).startswith("f: does not fit")
    assert "ZeroDivisionError" in predict.why_failed(Row("a", "", "x", None, ("f",)), ZeroDivisionError("x"))


# --- losses that are not finite ---------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_leaves_the_state_but_for_its_number():
    step = lambda state, batch, key, results, *, steps: (
        state.replace(params=state.params + batch, opt=state.opt * 2, step=state.step + 1),
        {"loss": batch.sum(), "grad_norm": jnp.float32(1)},
    )
    careful = jax.jit(skipping(step), static_argnames="steps")
    state = State(params=jnp.ones(2), opt=jnp.ones(()), stats={}, step=jnp.int32(0))
    state, _ = careful(state, jnp.full(2, 2.0), None, {}, steps=9)
    for bad in (jnp.nan, jnp.inf):
        state, metrics = careful(state, jnp.array([1.0, bad]), None, {}, steps=9)
        assert not np.isfinite(metrics["loss"])
    state, _ = careful(state, jnp.zeros(2), None, {}, steps=9)
    np.testing.assert_array_equal(state.params, [3, 3])
    assert (int(state.step), float(state.opt)) == (4, 4.0)
    both = jax.vmap(lambda s, b: skipping(step)(s, b, None, {}, steps=9))  # replicates drop their own steps alone
    pair, _ = both(jax.tree.map(lambda x: jnp.stack([x, x]), state), jnp.array([[1.0, 1.0], [1.0, jnp.nan]]))
    np.testing.assert_array_equal(pair.params, [[4, 4], [3, 3]])
    assert skipping(step) is skipping(step)  # stages that share a step share its program


@pytest.mark.parametrize("allowed", [0, 2])
def test_as_many_steps_are_skipped_as_the_recipe_says_then_training_ends_with_3(tmp_path, allowed, capfd):
    course = types.SimpleNamespace(
        config=load(log_every=2, skip_nonfinite=allowed),
        stage=types.SimpleNamespace(name="a", batch=2),
        steps=9,
        tables=[np.arange(4)],
        samples=types.SimpleNamespace(rows=ROWS),
        folder=tmp_path / "checkpoints",
        history=tmp_path / "metrics.jsonl",
    )
    record = train.Record(course, [], 0, [])
    for step in range(1, allowed + 1):
        record.add(step, [np.array([0, 1])], {"loss": np.float32(np.nan)})
        record.fetch()
    assert record.skipped == allowed
    record.add(allowed + 1, [np.array([0, 1])], {"loss": np.float32(3)})
    record.add(allowed + 2, [np.array([0, 1])], {"loss": np.float32(5)})
    record.fetch()
    said = capfd.readouterr().err
    assert said.count("its update is dropped") == allowed and (f"{allowed} of {allowed}" in said) == bool(allowed)
    again = train.Record(course, [], 0, [], record.skipped)  # as after a restart: the count goes on
    for one in (record, again):
        one.add(allowed + 3, [np.array([2, 3])], {"loss": np.float32(np.inf)})
        with pytest.raises(NonFiniteLoss, match="loss not finite; batch: case 2, case 3; no step was saved") as error:
            one.fetch()
        assert error.value.code == 3
    lines = run_folder.read_history(course.history)
    assert [line.get("skipped", 0) for line in lines] == [allowed] * len(lines) and lines


def test_presets_of_ours_skip_up_to_three_steps_and_papers_none():
    of = lambda preset: recipe.load(f"configs/amae.py:{preset}").skip_nonfinite
    assert [of(name) for name in ("paper", "phantom", "small", "smoke")] == [0, 3, 3, 3]
    assert recipe.load("configs/simsid.py:zhanglab").skip_nonfinite == 0


# --- values that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 3])
def test_values_that_are_not_finite_are_refused_or_stay_nan_in_the_map(rank):
    """Where they count as zero, no metric counts them, and the map is NaN there alone."""
    size = (20, 16, 12)[:rank]
    config = recipe.load("configs/amae.py:smoke" if rank == 2 else "configs/maemi.py:smoke")
    config.data.channels = 1
    rng = np.random.default_rng(rank)
    array = rng.random((*size, 1)).astype(np.float32) + 3
    hole = np.zeros(size, bool)
    hole[(slice(2, 4),) * rank] = True
    array[hole] = np.where(rng.random((hole.sum(), 1)) < 0.5, np.nan, np.inf)
    affine = None if rank == 2 else PLS
    image = Image(array, (1.0,) * rank, affine, None)
    row = Row("a", "", "test", 0, ("a.nii",))
    inside = np.ones(size, bool)
    inside[0] = False
    opened = Opened(image, None, inside)
    with pytest.raises(InputError, match=rf"a\.nii: {hole.sum()} values are not finite"):
        prepared_case(row, config.data, opened)
    config.data.nonfinite = "zero"
    case = prepared_case(row, config.data, opened)
    assert np.isfinite(case.array).all()
    np.testing.assert_array_equal(case.region, inside & ~hole)
    np.testing.assert_array_equal(case.missing, hole)
    if rank == 3:
        assert not case.volume.region[case.volume.grid.forward(hole, 0)].any()
    else:
        filled = np.where(np.isfinite(array), array, array[np.isfinite(array)].min())
        np.testing.assert_array_equal(case.array, prepared_image(row, config.data, image._replace(array=filled)))
    kept = KeptCase.of(case, {"array": lambda: case.array, "stored": lambda: array, "subtraction": lambda: None})
    np.testing.assert_array_equal(kept.whole(row).missing, hole)
    system = types.SimpleNamespace(map="x", primary="x")
    result = Result(case, {"x": np.ones((1, *case.array.shape[:-1]), np.float32)}, {"x": np.ones(1)})
    written = result.written(system, ["anomaly"])["anomaly"]
    np.testing.assert_array_equal(np.isnan(written), hole)
    assert predict.overlay(image, written, None).dtype == np.uint8


def test_one_case_is_told_in_the_singular():
    assert "in 1 case:" in soft_masks(1, 0.5) and "in 2 cases:" in soft_masks(2, 0.5)
    assert counted(1, "sequences") == "1 sequence" and counted(1, "colour images") == "1 colour image"
