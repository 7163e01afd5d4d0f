"""Reasons to doubt a training, and trainings that are too short."""

import runpy

import numpy as np
import pytest

from jmae import recipe
from jmae.doubts import LINES, caveats, doubts, doubts_line, spiked
from jmae.report import short_training
from jmae.system import load_system


def config(name: str, *changes: str):
    return recipe.parse([f"--config={name}", *(f"--config.{one}" for one in changes)], "")[0]


@pytest.mark.parametrize("level", [0.002, 5.0, -3.0])
def test_a_rise_in_the_last_steps_is_found_and_noise_is_not(level):
    rng = np.random.default_rng(0)
    quiet = level + 0.03 * abs(level) * rng.normal(size=(300, LINES + 5))
    assert not any(spiked(losses) for losses in quiet)
    falling = np.linspace(2, 1, LINES + 5) * abs(level)
    assert not spiked(falling) and not spiked([1.0] * LINES + [1.2])
    assert all(spiked([*losses, level + 0.5 * abs(level)]) for losses in quiet)
    assert not spiked([1.0] * (LINES - 1) + [9.0])  # too few lines to know


def test_a_network_that_learnt_nothing_is_named():
    (stage,) = load_system(config("maemi:smoke")).stages
    line = lambda step, value: {"stage": "train", "step": step, "explained_variance_0": value}
    (found,) = doubts([line(10, 0.3), line(20, -2.0464)], [stage])
    assert found == "the network has learnt little: explained share of the variance of hidden voxels (1 is perfect): -2"
    assert doubts_line([found]).startswith("warning: the training may have failed: the network has learnt little")
    both = {**line(20, -1.0), "explained_variance_1": 0.2}
    assert doubts([both], [stage]) == doubts([{**line(20, -1.0), "stage": "other"}], [stage]) == []
    assert doubts_line([]) == ""


def test_a_network_that_finds_drawn_anomalies_no_better_than_a_constant_map_is_named():
    (stage,) = load_system(config("ppii:smoke")).stages
    line = lambda value, **more: {"stage": "train", "step": 9, "dice": 0.9, "best_dice": value, **more}
    (found,) = doubts([line(0.25, dice_of_constant=0.31)], [stage])
    assert found.endswith("learnt little: best Dice so far: 0.25, Dice of the best constant map: 0.31")
    assert doubts([line(0.32, dice_of_constant=0.31)], [stage]) == doubts([line(0.01)], [stage]) == []


def test_a_rise_names_its_stage():
    (stage,) = load_system(config("ppii:smoke")).stages
    lines = [{"stage": "train", "step": k, "loss": 1.0 if k < 30 else 2.0} for k in range(31)]
    assert doubts(lines, [stage]) == ["stage train ended with a rise of its loss, from 1 to 2"]
    assert doubts(lines[:-1], [stage]) == []


def test_few_steps_are_a_short_training():
    for name in recipe.SYSTEMS:
        said = short_training(config(f"{name}:smoke"))
        assert f"of the steps of {name}:small" in said and "small is the shortest preset" in said
        for whole in set(runpy.run_path(f"configs/{name}.py")["PRESETS"]) - {"smoke", "smoke_ddad"}:
            assert short_training(config(f"{name}:{whole}")) == ""
    assert short_training(config("maemi:small", "train.steps=100")).startswith("2 % of the steps of maemi")
    assert "25 % of the recipe's steps" in short_training(config("ppii:small", "budget=0.25"))


def test_a_terminal_says_that_a_training_was_short_and_then_its_doubts():
    short, doubtful = caveats(config("ppii:small", "budget=0.25"), ["stage a ended badly"])
    assert short.startswith("short training: 25 % of") and "stage a ended badly" in doubtful
    assert caveats(config("ppii:small"), []) == []
