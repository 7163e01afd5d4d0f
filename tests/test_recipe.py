"""Recipes resolve, overrides are checked, and what is wrong is one line."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from jmae import evaluate, preview, recipe, train
from jmae.data.manifest import Row
from jmae.errors import InputError, exit_code
from jmae.system import load_system

CONFIGS = sorted(Path("configs").glob("*.py"))
AMAE = "--config=configs/amae.py"
KNOWN = ["workdir"]


def test_there_are_recipes():
    assert CONFIGS, "run the tests in the folder of the repository"


@pytest.mark.parametrize("preset", ["", ":phantom", ":smoke", ":small", ":paper"])
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_preset_of_every_recipe_resolves_and_survives_json(file, preset):
    config, _ = recipe.parse([f"--config={file}{preset}"], "")
    system = load_system(config)
    assert system.stages and system.masks > 0
    again = recipe.from_json(recipe.to_json(config))
    assert again.to_dict() == config.to_dict()
    assert recipe.to_json(again) == recipe.to_json(config)
    assert [type(v) for _, v in recipe.keys_of(again)] == [type(v) for _, v in recipe.keys_of(config)]


def test_an_empty_tuple_takes_what_its_declaration_holds():
    config, _ = recipe.parse(["--config=configs/maemi.py:small", "--config.data.spacing=2,2,1.5"], "", KNOWN)
    assert config.data.spacing == (2.0, 2.0, 1.5)
    config, _ = recipe.parse([AMAE, "--config.evaluation.subsets=a1,2020"], "", KNOWN)
    assert config.evaluation.subsets == ("a1", "2020")
    config, _ = recipe.parse(["--config=configs/memmc_mae.py", "--config.data.crop_from=96,64"], "", KNOWN)
    assert str(config.data.crop_from) == "(96, 64)"
    with pytest.raises(InputError, match=r"--config.data.crop_from: '9.5' is not a whole number"):
        recipe.parse(["--config=configs/memmc_mae.py", "--config.data.crop_from=9.5,64"], "", KNOWN)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=3", "seed", 3),
        ("seed=-3", "seed", -3),
        ("budget=2", "budget", 2.0),
        ("pretrain.lr=1e-4", "pretrain.lr", 1e-4),
        ("variant=stage1", "variant", "stage1"),
        ("data.manifest=a b=c:d.csv", "data.manifest", "a b=c:d.csv"),
        ("data.manifest=", "data.manifest", ""),
        ("loggers=wandb,mlflow", "loggers", ("wandb", "mlflow")),
        ("data.allow_leaks", "data.allow_leaks", True),
        ("data.allow_leaks=True", "data.allow_leaks", True),
        ("evaluation.paste=false", "evaluation.paste", False),
        ("evaluation.paste=0", "evaluation.paste", False),
        ("data.size=48,56", "data.size", (48, 56)),
        ("data.size=(48, 56, 8)", "data.size", (48, 56, 8)),
        ("proxy.head=[7]", "proxy.head", (7,)),
        ("proxy.head=()", "proxy.head", ()),
        ("pretrain.betas=0.9,1", "pretrain.betas", (0.9, 1.0)),
        ("evaluation.subsets=matched,ward", "evaluation.subsets", ("matched", "ward")),
        ("evaluation.subsets=('matched',)", "evaluation.subsets", ("matched",)),
    ],
)
def test_every_kind_of_value_can_be_overridden(override, key, value):
    config, rest = recipe.parse([AMAE, f"--config.{override}", "--workdir", "x"], "", KNOWN)
    got = dict(recipe.keys_of(config))[key]
    assert got == value and type(got) is type(value) and rest == {"workdir": "x"}
    if isinstance(value, tuple):
        assert list(map(type, got)) == list(map(type, value))


def test_a_recipe_of_the_library_is_known_by_its_name_in_every_folder(tmp_path, monkeypatch):
    there = recipe.load("configs/amae.py:small").to_dict()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "amae").mkdir()  # a run folder, not a recipe
    assert recipe.load("amae:small").to_dict() == there
    assert recipe.load("amae").to_dict() == recipe.load("amae:phantom").to_dict()
    with pytest.raises(InputError, match=r"^ppii: preset 'smal' is unknown: did you mean small\? One of paper, "):
        recipe.load("ppii:smal")
    with pytest.raises(InputError, match=r"^simsd: no recipe: did you mean simsid\?"):
        recipe.load("simsd:small")
    (tmp_path / "amae.py").write_text("def get_config(preset): return preset")
    assert recipe.load("amae.py:own") == "own"


def test_a_recipe_explains_its_keys():
    config = recipe.load("maemi:small")
    assert recipe.explained(config, "data.size").splitlines() == [
        "data.size = (32, 32, 8)  (a list, 3 values; each a whole number; 1 or more; voxels; default (240, 168, 8))",
        "    Size of a training crop and of a window.",
    ]
    lines = recipe.explained(config).splitlines()
    assert [line.partition(" = ")[0] for line in lines[::2]] == [*recipe.declarations("maemi", volumes=True)]
    section = recipe.explained(config, "train").splitlines()[::2]
    assert section == [line for line in lines[::2] if line.startswith("train.")]
    with pytest.raises(InputError, match=r"^--show=trian: no key of maemi: train\?"):
        recipe.explained(config, "trian")


def test_the_line_on_a_training_passes_stages_whose_rows_need_earlier_results():
    rows = [Row(f"{i}", "", "train", 0, (f"{i}.png",)) for i in range(6)]
    each = (lambda rows, results: [0, 1], lambda rows, results: results.get("a"), lambda rows, results: [])
    stages = [SimpleNamespace(splits=("train",), rows=choose, steps=lambda n: 10 // n + n) for choose in each]
    line = preview.training_line(recipe.parse(["--config=amae:smoke"], "")[0], stages, rows)
    assert line.startswith("training: 3 stages, 14 steps in all; ")  # 5 + 2, and 1 + 6 of all rows

    def refusing(rows, results):
        raise InputError("too few rows")

    stages[1].rows = refusing
    with pytest.raises(InputError, match="too few rows"):
        [*preview.stage_plans(stages, rows)]


def test_show_and_dry_run_train_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code(train.main, ["--config=amae:smoke", "--show", "pretrain.steps"]) == 0
    assert capsys.readouterr().out.startswith("pretrain.steps = 20  (")
    assert exit_code(train.main, ["--config=amae:smoke", "--dry-run", "--config.pretrain.batch", "8"]) == 0
    said = capsys.readouterr().out
    assert "training: 5 stages, 58 steps in all; the first steps of each stage show how long it takes" in said
    lines = [line.split() for line in said.splitlines()]
    assert ["train", "256", "0", "0"] in lines and ["test", "100", "100", "0"] in lines  # the design's chest phantoms
    assert ["pretrain", "512", "8", "20"] in lines and ["proxy", "256", "32", "10"] in lines
    half = ["--config=amae:small", "--config.data.phantom=chest", "--config.budget=0.5", "--dry-run"]
    assert exit_code(train.main, half) == 0
    assert "; up to about 8 minutes on two idle CPU cores, and more" in capsys.readouterr().out
    for longer in ("replicates=8", "adapt.masks=8", "pretrain.batch=64"):
        assert exit_code(train.main, [*half, f"--config.{longer}"]) == 0
        assert "how long it takes" in capsys.readouterr().out
    given = ["--config=amae:smoke", "--dry-run", "--config.data.manifest=nowhere.csv"]
    assert exit_code(train.main, given) == 2 and "nowhere.csv: not readable" in capsys.readouterr().err
    assert exit_code(train.main, ["--config=ppii:smoke", "--dry-run", "--config.data.calibration=0.998"]) == 2
    why = "data.calibration=0.998 keeps the normal scans of train for p-values: set it lower"
    assert f"stage train: no rows left to train on: {why}" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_the_value_of_a_key_may_follow_a_space_and_is_true_where_there_is_none():
    words = (
        "--config.seed -3 --config.data.allow_leaks --config.budget 2 --config.log_every=5 --config.evaluation.paste"
    )
    config, rest = recipe.parse([AMAE, *words.split(), "--workdir", "x"], "", KNOWN)
    assert (config.seed, config.data.allow_leaks, config.budget, config.log_every) == (-3, True, 2.0, 5)
    assert config.evaluation.paste is True and rest == {"workdir": "x"}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--config.evaluation.mask=3"],
            "--config.evaluation.mask is unknown: did you mean --config.evaluation.masks?",
        ),
        (["--config.Seed=3"], "--config.Seed is unknown: did you mean --config.seed?"),
        (["--config.data=3"], "--config.data is unknown: data is a section; jmae train --show data lists its keys"),
        (["--config.lr=3"], "did you mean --config.adapt.lr or --config.pretrain.lr or "),
        (["--config.pretrin.lr=3"], "--config.pretrin.lr is unknown: did you mean --config.pretrain.lr?"),
        (["--config.mask_ratios=3"], "did you mean --config.adapt.mask_ratio or --config.pretrain.mask_ratio?"),
        (["--config.zzz=3"], "--config.zzz is unknown: no key is like it; jmae train --show lists all"),
        (["--workdirr=x"], "--workdirr is unknown: did you mean --workdir?"),
        (["--config.seed=x"], "--config.seed: 'x' is not a whole number, as 0 is"),
        (["--config.seed=1.5"], "--config.seed: '1.5' is not a whole number"),
        (["--config.budget=fast"], "--config.budget: 'fast' is not a finite number, as 1.0 is"),
        (["--config.budget=nan"], "--config.budget: 'nan' is not a finite number"),
        (["--config.evaluation.paste=maybe"], "--config.evaluation.paste: 'maybe' is not true or false"),
        (["--config.loggers=wandb,comet"], "loggers is ('wandb', 'comet'): one of 'tensorboard', 'wandb', 'mlflow'"),
        (["--config.loggers=tensorboard"], "loggers=tensorboard needs tensorboardX: pip install tensorboardX"),
        (["--config.data.size=64,x"], "--config.data.size: 'x' is not a whole number, as 64 is"),
        (["--config.data.size=1.5,2"], "--config.data.size: '1.5' is not a whole number"),
        (["--config.seed"], "--config.seed: 'true' is not a whole number"),
        (["runs/a"], "'runs/a' is no flag: write --NAME=VALUE"),
        (["--workdir"], "--workdir has no value: write --workdir=VALUE"),
        (["--workdir", "--debug2"], "--workdir has no value"),
        (
            ["--config=configs/amae.py:smole"],
            "configs/amae.py: preset 'smole' is unknown: did you mean smoke? One of paper, small, phantom, smoke",
        ),
        (["--config=configs/mae.py"], "configs/mae.py: no recipe: there are configs/amae.py"),
        (["--config=configs"], "configs: no recipe: there are configs/amae.py"),
        (["--config=pyproject.toml"], "pyproject.toml: no recipe"),
        (["--config=/nowhere/x.py:smoke"], "/nowhere/x.py: no recipe: there is none"),
        (["--config.system=nothing"], "system 'nothing' is unknown: one of amae"),
        (["--config.variant=stage3"], "variant is 'stage3': one of 'stage2'"),
        (["--config.data.phantom="], "no data: set --config.data.manifest=MANIFEST.csv, or data.phantom"),
        (["--config.data.manifest=nowhere.csv"], "nowhere.csv: not readable"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_2(arguments, line, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    where = [] if any("--workdir" in a for a in arguments) else [f"--workdir={tmp_path / 'run'}"]
    assert exit_code(train.main, [AMAE, *where, *arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and line in said, said
    assert not list(tmp_path.glob("run/*.json"))


def test_a_command_without_its_recipe_or_run_is_one_line(capsys, tmp_path):
    assert exit_code(train.main, []) == 2
    assert capsys.readouterr().err == (
        f"no recipe: write --config=NAME[:PRESET]; NAME: {', '.join(recipe.SYSTEMS)}, or a FILE.py\n"
    )
    assert exit_code(evaluate.main, []) == 2
    assert capsys.readouterr().err == "no run folder: write --workdir=DIR\n"
    assert exit_code(evaluate.main, [f"--workdir={tmp_path}"]) == 2
    assert f"{tmp_path}: no config.json: name the folder of a run" in capsys.readouterr().err
    (tmp_path / "run").mkdir(), (tmp_path / "run" / "config.json").touch()  # as quickstart makes it
    assert exit_code(evaluate.main, [f"--workdir={tmp_path}"]) == 2
    assert f"{tmp_path}: no config.json: name {tmp_path / 'run'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("def (", "SyntaxError"),
        ("x = 1", "has no get_config(preset)"),
    ],
)
def test_a_broken_recipe_is_named(text, what, tmp_path):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(InputError) as caught:
        recipe.load(f"{tmp_path / 'broken.py'}:smoke")
    assert str(caught.value).startswith(f"{tmp_path / 'broken.py'}: {what}")


@pytest.mark.parametrize("command", [train, evaluate])
def test_help_is_the_usage_and_debug_shows_the_traceback(command, capsys):
    with pytest.raises(SystemExit) as ended:
        exit_code(command.main, ["--help"])
    assert ended.value.code == 0 and f"python -m {command.__name__}" in capsys.readouterr().out
    assert exit_code(command.main, ["--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_nothing_of_a_run_folder_is_executed(tmp_path, capsys):
    canary = tmp_path / "canary"
    attack = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    run = tmp_path / "run"
    run.mkdir()
    for text in (attack, json.dumps({"system": attack}), '{"py/object": "x"}', "[1]", "[" * 100_000, "\x80", ""):
        (run / "config.json").write_text(text)
        (run / "recipe.py").write_text(attack)
        assert exit_code(evaluate.main, [f"--workdir={run}"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    for value in (attack, f"({attack},)"):
        assert exit_code(train.main, [AMAE, f"--config.data.size={value}"]) == 2
    assert not canary.exists()


def test_the_command_itself_ends_with_its_code():
    """Once in a process of its own: everything above runs `main` within the tests'."""
    done = subprocess.run([sys.executable, "-m", "jmae.train", AMAE, "--config.x=1"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
