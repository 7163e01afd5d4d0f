"""Weights & Biases and MLflow get the lines of metrics.jsonl. Modules of this file stand in for both packages."""

import signal
import sys
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict

from jmae import train
from jmae.errors import InputError, Stopped, exit_code
from jmae.loggers import lines_to_loggers, package

LINES = [
    {"stage": "fit", "step": 5, "loss": 0.5, "lr": 0.1, "time": 1.0},
    {"stage": "fit", "step": 10, "loss": 0.25, "lr": 0.05, "time": 2.0},
]
EXPECTED = [(5, "loss", 0.5), (5, "lr", 0.1), (10, "loss", 0.25), (10, "lr", 0.05)]
VARIABLES = ("WANDB_MODE", "WANDB_PROJECT", "MLFLOW_TRACKING_URI")


class Wandb(SimpleNamespace):
    """Stands in for the package wandb: `init`, `Settings`, and a run with `id`, `log`, `mark_preempting`, `finish`."""

    def __init__(self):
        super().__init__(given=[], logged=[], ended=[], id="", preempting=False)

    Settings = staticmethod(dict)

    def init(self, **given):
        assert given["reinit"] == "create_new"  # else a run of the caller is ended
        self.given.append(given)
        self.id, self.preempting = given["id"] or f"run{len(self.given)}", False
        return self

    def log(self, values, step):
        self.logged += [(step, name, value) for name, value in values.items()]

    def mark_preempting(self):
        self.preempting = True

    def finish(self, exit_code):
        self.ended.append(("preempting" if self.preempting else "", exit_code))


class Mlflow(SimpleNamespace):
    """Stands in for the package mlflow and its MlflowClient."""

    entities = SimpleNamespace(
        Metric=lambda key, value, timestamp, step: (step, key, value), Param=lambda key, value: (key, value)
    )

    def __init__(self):
        super().__init__(uri=None, experiments={}, names=[], params={}, batches=[], logged=[], ended=[], resumed=[])

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
        return SimpleNamespace(info=SimpleNamespace(run_id=f"r{len(self.names)}"))

    def update_run(self, run, status):
        assert run in [f"r{i + 1}" for i in range(len(self.names))], "no such run"
        self.resumed.append((run, status))

    def log_batch(self, run, metrics=(), params=()):
        assert run.startswith("r") and 0 < len(metrics) + len(params) <= 100
        self.params |= dict(params)
        self.logged += metrics
        self.batches.append((len(metrics), len(params)))

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
    assert [one["name"] for one in wandb.given] == ["fit from step 0", "fit from step 5"]
    assert wandb.ended == [("", 0)] * 2 and not any(one["id"] or one["resume"] for one in wandb.given)  # offline
    assert mlflow.uri == f"sqlite:///{tmp_path}/mlflow/mlflow.db" and (tmp_path / "mlflow").is_dir()
    assert mlflow.experiments["jmae"].place == f"file://{tmp_path}/mlflow" and mlflow.ended == ["FINISHED"] * 2
    assert mlflow.params == {"loggers": "('wandb', 'mlflow')", "seed": "3", "data.size": "(4, 4)"}
    assert mlflow.batches == [(0, 3), (2, 0), (2, 0), (2, 0), (2, 0)]  # one call a line
    assert mlflow.names == [f"{tmp_path.name}, fit from step 0"] and mlflow.resumed == [("r1", "RUNNING")]
    said = capsys.readouterr().err
    assert f"wandb: kept in {tmp_path}/wandb; nothing is sent." in said and f"mlflow: kept in {tmp_path}/mlflow" in said


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
    assert packages[0].ended == [("", 1)] and packages[1].ended == ["FAILED"]


@pytest.mark.parametrize(
    ("stop", "code"),
    [(Stopped("stopped", signal.SIGTERM), 143), (Stopped("stopped", signal.SIGINT), 130), (KeyboardInterrupt(), 130)],
)
def test_a_stage_that_was_stopped_is_not_one_that_failed(stop, code, packages, tmp_path):
    with pytest.raises(type(stop)), lines_to_loggers(config("wandb", "mlflow"), tmp_path, "fit", 0):
        raise stop
    assert packages[0].ended == [("preempting", code)] and packages[1].ended == ["KILLED"]


def test_a_continuation_goes_on_in_the_run_of_its_stage(packages, tmp_path, monkeypatch):
    wandb, mlflow = packages
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://name:secret@tracker:5000")
    for stage, start in (("fit", 0), ("adapt", 0), ("fit", 5), ("adapt", 2), ("fit", 0), ("fit", 5)):
        with lines_to_loggers(config("wandb", "mlflow"), tmp_path, stage, start):
            pass
    assert [(one["id"], one["resume"]) for one in wandb.given] == [
        (None, None), (None, None), ("run1", "allow"), ("run2", "allow"), (None, None), ("run5", "allow")
    ]  # fmt: skip
    assert [one["name"] for one in wandb.given][1:3] == ["adapt from step 0", None]  # a name would rename the run
    assert mlflow.resumed == [("r1", "RUNNING"), ("r2", "RUNNING"), ("r3", "RUNNING")] and len(mlflow.names) == 3
    assert mlflow.ended == ["FINISHED"] * 6 and "secret" not in (tmp_path / "loggers.json").read_text()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://other:5000")
    with lines_to_loggers(config("mlflow"), tmp_path, "fit", 5):
        pass
    assert len(mlflow.names) == 4  # another server has no such run


def test_a_run_of_mlflow_that_is_gone_begins_anew_with_a_line(packages, tmp_path, monkeypatch, capsys):
    with lines_to_loggers(config("mlflow"), tmp_path, "fit", 0):
        pass
    monkeypatch.setattr(Mlflow, "update_run", fail)
    with lines_to_loggers(config("mlflow"), tmp_path, "fit", 5):
        pass
    assert len(packages[1].names) == 2
    assert "mlflow: its run r1 cannot go on (no space left): a new one begins" in capsys.readouterr().err


def test_a_damaged_list_of_runs_is_one_line(packages, tmp_path):
    (tmp_path / "loggers.json").write_text("{")
    line = r"loggers.json: not read \(.*\): delete it, then loggers begin new runs$"
    with pytest.raises(InputError, match=line), lines_to_loggers(config("mlflow"), tmp_path, "fit", 5):
        pass


def fail(*_, **__):
    raise RuntimeError("no space left\non the device")


def test_a_logger_that_fails_later_is_dropped_with_a_line(packages, tmp_path, monkeypatch, capsys):
    wandb, mlflow = packages
    with lines_to_loggers(config("mlflow", "wandb"), tmp_path, "fit", 0) as write:
        write(LINES[0])
        with monkeypatch.context() as patch:
            patch.setattr(Mlflow, "log_batch", fail)
            write(LINES[1])
        write(LINES[1] | {"step": 15})
    assert mlflow.logged == EXPECTED[:2] and mlflow.ended == ["FINISHED"]
    assert [step for step, *_ in wandb.logged] == [5, 5, 10, 10, 15, 15]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    line = "warning: loggers=mlflow failed at step 10 (no space left): it gets no further lines; metrics.jsonl has all"
    assert said == [line]


@pytest.mark.parametrize("error", [None, ValueError, Stopped("stopped", signal.SIGINT)])
def test_a_logger_that_fails_at_its_end_hides_no_error_and_ends_the_others(
    error, packages, tmp_path, monkeypatch, capsys
):
    def block():
        with lines_to_loggers(config("wandb", "mlflow"), tmp_path, "fit", 0):
            if error:
                raise error

    monkeypatch.setattr(Mlflow, "set_terminated", fail)
    if error:
        with pytest.raises(error if isinstance(error, type) else Stopped):
            block()
    else:
        block()
    assert len(packages[0].ended) == 1
    said = "warning: loggers=mlflow failed at its end (no space left); metrics.jsonl has all\n"
    assert capsys.readouterr().err.endswith(said)


def test_long_recipes_reach_mlflow_in_batches_of_100(packages, tmp_path):
    long = config("mlflow")
    long.more = {f"key{i}": i for i in range(250)}
    with lines_to_loggers(long, tmp_path, "fit", 0):
        pass
    assert packages[1].batches == [(0, 100), (0, 100), (0, 53)] and packages[1].params["more.key249"] == "249"


@pytest.mark.parametrize(("given", "seen"), [(None, "true"), ("false", "false")])
def test_usage_data_of_mlflow_are_off_before_its_import(given, seen, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", given or "")
    if given is None:
        monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY")
    (tmp_path / "mlflow.py").write_text("import os\nseen = os.environ.get('MLFLOW_DISABLE_TELEMETRY')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.delitem(sys.modules, "mlflow")
    assert package("mlflow").seen == seen


def test_lines_name_commands_that_a_shell_takes(packages, tmp_path, capsys):
    folder = tmp_path / "my runs"
    with lines_to_loggers(config("wandb", "mlflow"), folder, "fit", 0):
        pass
    said = capsys.readouterr().err
    assert f"`wandb sync '{folder}/wandb'/offline-run-*`" in said
    assert f"--backend-store-uri 'sqlite:///{folder}/mlflow/mlflow.db'" in said


def events_of(file):
    """The events of a file of TensorBoard. Each follows its length (8) and a checksum (4), a checksum (4) ends it."""
    from tensorboardX.proto.event_pb2 import Event

    data, events = file.read_bytes(), []
    while data:
        n = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + n]))
        data = data[16 + n :]
    return events


def test_tensorboard_hides_what_a_killed_run_wrote_beyond_its_checkpoint(tmp_path):
    with lines_to_loggers(config("tensorboard"), tmp_path, "fit", 3) as write:  # goes on from the checkpoint of step 3
        for step in (4, 5):
            write({"stage": "fit", "step": step, "loss": 1.0})
    (file,) = (tmp_path / "tensorboard" / "fit").iterdir()
    told = [(one.step, one.session_log.status, len(one.summary.value)) for one in events_of(file)]
    start, no_log = 1, 0  # SessionLog.START makes TensorBoard drop the events from its step on, in all files before
    assert (4, start, 0) in told and told[-3:] == [(4, start, 0), (4, no_log, 1), (5, no_log, 1)]


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
