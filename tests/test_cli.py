"""The console command: what it lists, answers and passes on, and what it imports for that."""

import ast
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from jmae import __version__, cli, command_words, recipe
from jmae.data.manifest import parse_manifest
from jmae.errors import InputError, exit_code
from jmae.sealed import seal

ROOT = Path(__file__).parents[1]
HEAVY = "jax flax numpy scipy matplotlib orbax grain nibabel".split()
ASK = """
import atexit, sys
atexit.register(lambda: print("HEAVY", *(name for name in {heavy} if name in sys.modules)))
sys.argv = ["jmae", *{words}]
from jmae.cli import run
run()
"""


def run(*words: str) -> tuple[int, str, str, list[str]]:
    """(exit code, standard output, standard error, heavy packages that were imported) of `jmae WORDS`."""
    script = ASK.format(heavy=HEAVY, words=words)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    out, _, heavy = done.stdout.rpartition("HEAVY")
    return done.returncode, out, done.stderr, heavy.split()


def test_help_lists_every_command_with_one_line():
    code, out, err, heavy = run("--help")
    assert (code, err, heavy) == (0, "", [])
    lines = [line.split() for line in out.splitlines() if line.startswith("  ")]
    assert [words[0] for words in lines] == [*cli.COMMANDS, *cli.OWN]
    assert all(len(words) > 3 for words in lines)
    assert run("--version")[:2] == (0, f"jmae {__version__}\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "'trian' is no command: did you mean train?"),
        (["train", "--wrkdir=x"], "--wrkdir is unknown: did you mean --workdir?"),
        (["prepare", "folders", "--tset=x"], "--tset is unknown: did you mean --test?"),
        (["predict", "image.png", "--config_seed", "3"], "--config_seed is unknown: did you mean --config?"),
        (["train", "--budget", "0.1"], "--budget is unknown: did you mean --config.budget?"),
        (["train", "--pretrain.steps=5"], "--pretrain.steps is unknown: did you mean --config.pretrain.steps?"),
        (["train", "--pretrain.nothing=5"], "--pretrain.nothing is unknown: did you mean --"),
        (["train", "--variant=stage1"], "--variant is unknown: did you mean --config.variant?"),
        (["predict", "a.png", "--pretrain.steps=5"], "--pretrain.steps is unknown: did you mean --"),
        (["train", "--data.size=64,64"], "--data.size is unknown: did you mean --config.data.size?"),
        (["predict", "a.png", "--evaluation.batch=8"], "--evaluation.batch is unknown: did you mean --config.evaluat"),
        (["predict", "a.png", "--budget=1"], "--budget is unknown: did you mean --debug?"),
        (["plan", "--target.x=3"], "--target.x is unknown: did you mean --target?"),
        (["train", "--config", "ameai:small"], "ameai: no recipe: did you mean amae?"),
        (["train", "--config=configs/ame.py"], "configs/ame.py: no recipe: there are configs/amae.py"),
        (["completion", "fish"], "name the shell: jmae completion bash"),
    ],
)
def test_what_is_wrong_is_said_before_anything_heavy_is_imported(words, line):
    code, out, err, heavy = run(*words)
    assert (code, out, heavy) == (2, "", []) and err.startswith(line) and err.count("\n") == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with scans, manifests and the beginnings of two runs."""
    path = tmp_path_factory.mktemp("mistakes")
    (path / "scans").mkdir()
    (path / "scans" / "0.png").write_bytes(b"")
    lines = ["0.png,train,0", "1.png,test,1"]
    (path / "good.csv").write_text("\n".join(["image,split,label", *lines]))
    (path / "label.csv").write_text("\n".join(["image,split,label", *lines, "2.png,train,normal"]))
    (path / "column.csv").write_text("image,label\n0.png,0\n")
    (path / "patient.csv").write_text("\n".join(["image,split,label,patient", *(f"{line},P1" for line in lines)]))
    for name in ("run", "empty"):
        config = recipe.parse(["--config=ppii:small", f"--config.data.manifest={path / 'good.csv'}"], "")[0]
        (path / name / "checkpoints" / ("" if name == "empty" else "train/10")).mkdir(parents=True)
        (path / name / "config.json").write_text(seal(json.loads(recipe.to_json(config))))
    return path


SMALL = "train --config ppii:small --config."


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (f"{SMALL}bugdet=2", "--config.bugdet is unknown: did you mean --config.budget?"),
        (f"{SMALL}train.loss=l1", "train.loss is 'l1': one of 'cross_entropy', 'mse'"),
        (f"{SMALL}data.manifest=@/label.csv", "@/label.csv: line 4: label 'normal': write 0 (normal), 1 (abnormal)"),
        (f"{SMALL}data.manifest=@/column.csv", "@/column.csv: column 'split' is missing: add it"),
        (f"{SMALL}data.manifest=@/patient.csv", "@/patient.csv: patient 'P1' is in train and test: keep it in one"),
        ("train --config ppii:small --show nothing", "--show=nothing: no key of ppii: train?"),
        ("evaluate --workdir @/run --config.budget=1", "--config.budget is fixed by the training: only --config.eval"),
        ("evaluate --workdir @/run --split=nonsense", "split 'nonsense' has no rows: one of test, train"),
        ("evaluate --workdir @/run --config.evaluation.batch=0 --out @/out", "evaluation.batch is 0: 1 or more"),
        ("evaluate --workdir @/empty", "@/empty: no stage has a checkpoint: train it: jmae train --workdir @/empty"),
        ("predict --workdir @/run --out @/out @/none.png", "@/none.png: not found: check the path"),
        (
            "predict --workdir @/run --workdir @/run @/none.png",
            "no --out: name a folder for maps and scores: jmae pred",
        ),
        ("predict --workdir @/run --workdir @/run --out @/out @/none.png", "@/none.png: not found: check the path"),
        ("evaluate --workdir @/run --workdir @/scans --out @/out", "@/scans: no config.json: name the folder of a run"),
        ("train --config ppii:small --dry-run=maybe", "--dry-run: 'maybe' is not true or false, as False is"),
        ("predict --workdir @/scans --out @/out @/scans", "@/scans: no config.json: name the folder of a run"),
        ("export --workdir @/run --out @/out --platforms=gpu", "--platforms: 'gpu' is none of cpu, cuda, rocm, tpu"),
        ("check @/label.csv", "@/label.csv: line 4: label 'normal': write 0 (normal), 1 (abnormal)"),
        ("slices @/none.csv --out @/out", "@/none.csv: not readable (No such file or directory): check the path"),
        ("prepare folders --normal @/none --out @/out", "@/none: not a folder: name a folder with images"),
        ("report @/run --out @/r.html", "@/run: no complete evaluation (No such file or directory): run jmae evaluate"),
        ("quickstart @/none @/scans --out @/out", "@/none: not a folder: name a folder with images"),
    ],
)
def test_a_mistake_that_recipe_run_or_manifest_show_is_told_before_jax_is_imported(words, line, folder):
    code, out, err, heavy = run(*words.replace("@", str(folder)).split())
    assert (code, out) == (2, "") and err.startswith(line.replace("@", str(folder))) and err.count("\n") == 1
    assert not {"jax", "flax", "orbax", "grain"} & {*heavy} and not (folder / "out").exists()


def test_what_a_command_does_not_need_is_not_refused_early(folder, tmp_path, monkeypatch):
    """A dry run writes nothing, fusing needs no system, and a pipe gives its text only once."""
    refuse = command_words.refuse_mistakes
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"system": "mysys"}')
    refuse("evaluate", [f"--workdir={tmp_path / 'a'}", f"--workdir={tmp_path / 'b'}", f"--out={tmp_path}"])
    manifest = f"--config.data.manifest={folder / 'good.csv'}"
    refuse("train", ["--config=ppii:small", manifest, f"--workdir={folder / 'scans'}", "--dry-run"])
    reading, writing = os.pipe()
    os.write(writing, b"image,split\n0.png,train\n1.png,nonsense\n")
    os.close(writing)
    pipe = f"/dev/fd/{reading}"
    refuse("train", ["--config=ppii:small", f"--config.data.manifest={pipe}", "--dry-run"])
    refuse("predict", [f"--workdir={folder / 'run'}", f"--manifest={pipe}", f"--out={tmp_path}"])
    refuse("evaluate", [f"--workdir={folder / 'run'}", f"--manifest={pipe}", f"--out={tmp_path}"])
    assert len(parse_manifest(pipe)[0]) == 1
    os.close(reading)
    wrong = ["train", ["--config=ppii:small", f"--config.data.manifest={folder / 'label.csv'}"]]
    with pytest.raises(InputError, match="line 4: label 'normal'"):
        refuse(*wrong)
    monkeypatch.setattr(command_words, "EARLY", 10)
    refuse(*wrong)


def test_what_shaped_the_training_data_does_not_shape_other_data(tmp_path):
    changes = {"anomaly_ratio": 0.5, "unlabeled_size": 8, "unlabeled_labels": "gone.csv", "calibration": 0.5}
    words = ["--config=amae:small", *(f"--config.data.{key}={value}" for key, value in changes.items())]
    (tmp_path / "config.json").write_text(seal(json.loads(recipe.to_json(recipe.parse(words, "")[0]))))
    other = [f"--workdir={tmp_path}", "--manifest=other.csv", f"--out={tmp_path / 'out'}"]
    data = command_words.evaluation_request(other).config.data
    assert [data[key] for key in ("manifest", *changes)] == ["other.csv", -1, 0, "", 0]
    data = command_words.evaluation_request(other[:1]).config.data
    assert [data[key] for key in changes] == [*changes.values()]
    (tmp_path / "config.json").unlink()
    config = recipe.parse(["--config=amae:small", f"--config.data.manifest={tmp_path / 'moved.csv'}"], "")[0]
    (tmp_path / "config.json").write_text(seal(json.loads(recipe.to_json(config))))
    with pytest.raises(InputError, match=r"moved.csv: not found: .* jmae train --workdir .* --config.data.manifest="):
        command_words.evaluation_request(other[:1])


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_help_of_a_command_is_read_without_importing_it(command, capsys):
    before = set(sys.modules)
    assert exit_code(cli.main, [command, "--help"]) == 0
    text = capsys.readouterr().out
    assert set(sys.modules) == before
    assert f"jmae {command} " in text and "python -m jmae" not in text


def test_each_layout_and_data_set_has_a_help_of_its_own(capsys):
    from jmae.data.prepare import ALIASES, DATASETS

    code, out, err, heavy = run("prepare", "Folders", "--help")
    assert (code, err, heavy) == (0, "", []) and out.startswith(
        "jmae prepare folders --normal DIR --test DIR --out DIR\n"
    )
    assert "For example: jmae prepare folders --normal normals --test new --out data/mine" in out
    assert "--patient" in out and "CheXpert" not in out
    for name, own in DATASETS.items():
        text = cli.usage_of_set(name)
        assert f"jmae prepare {name} --root DIR --out DIR" in text and all(f"--{flag}" in text for flag in own)
        assert max(map(len, text.splitlines())) <= 120
    assert [cli.usage_of_set(name) for name in ALIASES] == [cli.usage_of_set(name) for name in ALIASES.values()]
    assert cli.usage_of_set("nothing") == "" and "chexpert " in cli.usage("prepare")


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_the_help_of_a_command_names_all_its_flags(command, monkeypatch):
    """A flag that the help does not name would be refused as misspelt."""
    place = ROOT / "jmae" / cli.COMMANDS[command][0].replace(".", "/")
    file = next(f for f in (place.with_suffix(".py"), place / "__main__.py") if f.is_file())
    file = file.with_name("__init__.py") if command == "prepare" else file
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    asked: list[str] = []

    def nearest(name: str, known: list[str]) -> str:
        asked.extend(known)
        return name

    monkeypatch.setattr(recipe, "nearest", nearest)
    assert exit_code(__import__(module, fromlist=["main"]).main, ["--nonsense=1"]) == 2
    written = [node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)]
    by_hand = [text[2:] for text in written if isinstance(text, str) and text[:2] == "--" and text[2:].isidentifier()]
    if command == "quickstart":  # its words are those of the commands that it runs
        by_hand = []
    assert asked and {*asked, *by_hand} <= {*cli.flags(command)}


def test_commands_of_a_few_words_have_a_help_too():
    code, out, err, heavy = run("completion", "--help")
    assert (code, err, heavy) == (0, "", []) and out.startswith("jmae completion bash|zsh: print the script")
    assert "echo '. ~/.jmae-completion.bash' >> ~/.bashrc" in out and ">> ~/.zshrc" in out and "Fish has no" in out
    assert run("systems", "-h")[:2] == (0, "jmae systems: which system takes which data, and its presets\n")


def test_every_system_is_told_with_its_presets_without_importing_it():
    code, out, err, heavy = run("systems")
    assert (code, err, heavy) == (0, "", [])
    for system in recipe.SYSTEMS:
        paragraph = f"\n{out}".partition(f"\n{system} ")[2].partition("\n\n")[0]
        presets = runpy.run_path(str(ROOT / "configs" / f"{system}.py"))["PRESETS"]
        assert f"--config {system}:PRESET with {', '.join(presets)}" in paragraph and "arXiv 2" in paragraph


def test_a_command_gets_its_words_and_gives_its_exit_code(tmp_path):
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("id,patient,split,label,image,mask,region\na,,train,0,nowhere.png,,\n")
    words = [str(manifest), f"--json={tmp_path / 'found.json'}"]
    code, out, _, _ = run("check", *words)
    by_module = subprocess.run([sys.executable, "-m", "jmae.data.check", *words], capture_output=True, text=True)
    assert code == by_module.returncode == 1 and "nowhere.png" in out
    assert [line for line in out.splitlines() if "nowhere" in line] == [
        line for line in by_module.stdout.splitlines() if "nowhere" in line
    ]
    code, _, err, _ = run("report", "nowhere", "--debug")
    assert code == 2 and "Traceback" in err


def test_a_reader_that_ends_early_gets_no_traceback():
    words = [sys.executable, "-m", "jmae", "train", "--config", "amae", "--show"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()  # before the command writes
        assert process.stderr.read() == ""
    assert process.returncode == 141


def test_another_broken_pipe_than_that_of_the_output_is_not_silent():
    def main(argv: list[str]) -> int:
        raise BrokenPipeError("of a connection")

    with pytest.raises(BrokenPipeError, match="of a connection"):
        exit_code(main, [])


def test_a_command_without_standard_output_ends_well(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert exit_code(lambda argv: 0, []) == 0


def test_bash_completes_commands_flags_and_recipes():
    assert cli.completion(["zsh"]).startswith("autoload -U +X compinit bashcompinit && compinit && ")  # for compdef
    script = subprocess.run([sys.executable, "-m", "jmae", "completion", "bash"], capture_output=True, text=True).stdout
    ask = 'COMP_WORDS=({words}); COMP_CWORD={last}; _jmae; echo "${{COMPREPLY[@]}}"'
    typed = ["jmae pr", "jmae train --wo", "jmae train --config m"]
    lines = [ask.format(words=words, last=words.count(" ")) for words in typed]
    done = subprocess.run(["bash", "-c", "\n".join([script, *lines])], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["prepare predict", "--workdir", "maemi memmc_mae"] and not done.stderr
