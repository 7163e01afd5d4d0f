"""Weights & Biases and MLflow get the lines of metrics.jsonl. Modules of this file stand in for both packages."""

import sys
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from jmae import train
from jmae.errors import InputError, exit_code
from jmae.loggers import lines_to_loggers

LINES = [
    {"stage": "fit", "step": 5, "loss": 0.5, "lr": 0.1, "time": 1.0},
    {"stage": "fit", "step": 10, "loss": 0.25, "lr": 0.05, "time": 2.0},
]
EXPECTED = [(5, "loss", 0.5), (5, "lr", 0.1), (10, "loss", 0.25), (10, "lr", 0.05)]
VARIABLES = ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI")


class Wandb(SimpleNamespace):
    """Stands in for the package wandb: `init`, `Settings`, and a run with `log` that is a context."""

    def __init__(self):
        super().__init__(given=[], logged=[], ended=[])

    Settings = staticmethod(dict)

    def init(self, **given):
        self.given.append(given)
        return self

    def log(self, values, step):
        self.logged += [(step, name, value) for name, value in values.items()]

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        self.ended.append(kind)


class Mlflow(SimpleNamespace):
    """Stands in for the package mlflow and its MlflowClient."""

    def __init__(self):
        super().__init__(uri=None, experiments={}, names=[], params={}, logged=[], ended=[])

    def MlflowClient(self, uri):
        self.uri = uri
        return self

    def get_experiment_by_name(self, name):
        return self.experiments.get(name)

    def create_experiment(self, name, artifact_location):
        self.experiments[name] = SimpleNamespace(experiment_id="7", place=artifact_location)
        return "7"

    def create_run(self, experiment, run_name):
        assert experiment == "7"
        self.names.append(run_name)
        return SimpleNamespace(info=SimpleNamespace(run_id="r"))

    def log_param(self, run, key, value):
        self.params[key] = value

    def log_metric(self, run, key, value, step):
        self.logged.append((step, key, value))

    def set_terminated(self, run, status):
        self.ended.append(status)


@pytest.fixture
def packages(monkeypatch):
    """The stand-ins, in the place of the packages."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    found = Wandb(), Mlflow()
    monkeypatch.setitem(sys.modules, "wandb", found[0])
    monkeypatch.setitem(sys.modules, "mlflow", found[1])
    return found


def config(*loggers):
    return ConfigDict({"loggers": loggers, "seed": 3, "data": {"size": (4, 4)}})


def test_both_get_every_line_in_the_run_folder_and_send_nothing(packages, tmp_path, capsys):
    wandb, mlflow = packages
    for start in (0, 5):
        with lines_to_loggers(config("wandb", "mlflow"), tmp_path, "fit", start) as write:
            for line in LINES:
                write(line)
    assert wandb.logged == mlflow.logged == EXPECTED * 2
    given = wandb.given[0]
    assert given["mode"] == "offline" and given["dir"] == str(tmp_path) and given["config"]["seed"] == 3
    assert [one["name"] for one in wandb.given] == ["fit from step 0", "fit from step 5"] and wandb.ended == [None] * 2
    assert mlflow.uri == f"sqlite:///{tmp_path}/mlflow/mlflow.db" and (tmp_path / "mlflow").is_dir()
    assert mlflow.experiments["jmae"].place == f"file://{tmp_path}/mlflow" and mlflow.ended == ["FINISHED"] * 2
    assert mlflow.params == {"loggers": ("wandb", "mlflow"), "seed": 3, "data.size": (4, 4)}
    assert mlflow.names[1] == f"{tmp_path.name}, fit from step 5"
    said = capsys.readouterr().err
    assert f"wandb: kept in {tmp_path}/wandb, nothing is sent" in said and f"mlflow: kept in {tmp_path}/mlflow" in said


def test_their_own_variables_send_the_lines_elsewhere(packages, tmp_path, monkeypatch, capsys):
    wandb, mlflow = packages
    for name, value in zip(VARIABLES, ("online", "chests", "http://tracker:5000"), strict=True):
        monkeypatch.setenv(name, value)
    with lines_to_loggers(config("wandb", "mlflow"), tmp_path, "fit", 0):
        pass
    assert (wandb.given[0]["mode"], wandb.given[0]["project"]) == ("online", "chests")
    assert mlflow.uri == "http://tracker:5000" and mlflow.experiments["jmae"].place is None
    assert not (tmp_path / "mlflow").exists() and "kept" not in capsys.readouterr().err


def test_a_stage_that_fails_ends_as_failed(packages, tmp_path):
    with pytest.raises(ValueError), lines_to_loggers(config("wandb", "mlflow"), tmp_path, "fit", 0):
        raise ValueError
    assert packages[0].ended == [ValueError] and packages[1].ended == ["FAILED"]


def test_a_logger_that_does_not_start_is_one_line(packages, tmp_path, monkeypatch):
    def refuse(**_):
        raise RuntimeError("api_key not configured (no-tty)\ncall wandb login")

    monkeypatch.setattr(packages[0], "init", refuse)
    line = r"^loggers=wandb does not start \(api_key not configured \(no-tty\)\): correct that, or leave it out$"
    with pytest.raises(InputError, match=line), lines_to_loggers(config("wandb"), tmp_path, "fit", 0):
        pass


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_one_line_before_anything_is_read(name, tmp_path, monkeypatch, capsys):
    package = {"tensorboard": "tensorboardX"}.get(name, name)
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ["--config=amae:smoke", f"--config.loggers={name}", f"--workdir={tmp_path / 'run'}"]
    assert exit_code(train.main, arguments) == 2
    assert capsys.readouterr().err == f"loggers={name} needs {package}: pip install {package}\n"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
