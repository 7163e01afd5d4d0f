"""What processes exchange and say, here of one process that plays several."""

import threading

import jax
import numpy as np
import pytest

from jmae import recipe, sharding, train
from jmae.errors import InputError


@pytest.fixture
def two(monkeypatch):
    """Gives a function that calls another in two processes, here threads: (results, the shapes they gathered)."""
    slots, meet, shapes = [None, None], threading.Barrier(2), []
    mine = threading.local()

    def gather(array):
        slots[mine.number] = array
        shapes.append(array.shape)
        meet.wait(20)
        out = np.stack(slots)
        meet.wait(20)
        return out

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(sharding.multihost_utils, "process_allgather", gather)

    def run(function):
        results = [None, None]

        def one(number):
            mine.number = number
            results[number] = function(number)

        threads = [threading.Thread(target=one, args=(number,)) for number in (0, 1)]
        [thread.start() for thread in threads]
        [thread.join(30) for thread in threads]
        return results, shapes

    return run


def test_all_have_what_each_gives_in_pieces_whose_lengths_are_powers_of_two(two, monkeypatch):
    monkeypatch.setattr(sharding, "PIECE", 2**10)
    values = [{"map": np.arange(700)}, None]
    results, shapes = two(lambda number: sharding.of_all(values[number]))
    for result in results:
        np.testing.assert_array_equal(result[0]["map"], values[0]["map"])
        assert result[1] is None
    lengths = {shape[0] for shape in shapes[2:]}
    assert lengths <= {2**k for k in range(11)} and 2**10 in lengths and len(shapes) > 6


def test_a_length_above_32_bits_is_told_whole(monkeypatch):
    long, told = 2**33 + 5, []
    monkeypatch.setattr(jax, "process_count", lambda: 2)

    class Long(bytes):
        def __len__(self):
            return long

    def gather(array):
        told.append(array)
        raise InterruptedError

    monkeypatch.setattr(sharding.pickle, "dumps", lambda value: Long())
    monkeypatch.setattr(sharding.multihost_utils, "process_allgather", gather)
    with pytest.raises(InterruptedError):
        sharding.of_all(None)
    assert told[0].dtype == np.int32 and int(told[0][0]) * sharding.PIECE + int(told[0][1]) == long


def test_a_lost_process_is_told_with_the_first_line_of_the_error(monkeypatch):
    said = []

    def leave(error):
        said.append(str(error))
        raise SystemExit(2)

    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    for name, stand_in in (("join", lambda number: None), ("leave", leave)):
        monkeypatch.setattr(sharding, name, stand_in)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(SystemExit), sharding.joined():
        raise RuntimeError("\nUNAVAILABLE: NCCL ran out of memory\nmore")
    with pytest.raises(SystemExit), sharding.joined():
        raise InputError("a line of its own")
    assert said == [f"{sharding.LOST}: UNAVAILABLE: NCCL ran out of memory", "a line of its own"]


@pytest.mark.parametrize("given, index, seconds", [("0", 1, 3), ("1", 0, 1), (None, 0, 3), (None, 1, 1)])
def test_the_first_process_leaves_last_also_where_jax_numbers_them(monkeypatch, given, index, seconds):
    slept = []

    def end(code):
        raise SystemExit(code)

    monkeypatch.delenv("JAX_PROCESS_ID", raising=False)
    if given:
        monkeypatch.setenv("JAX_PROCESS_ID", given)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(sharding.time, "sleep", slept.append)
    monkeypatch.setattr(sharding.os, "_exit", end)
    with pytest.raises(SystemExit) as ended:
        sharding.leave(InputError("wrong"))
    assert ended.value.code == 2 and slept == [seconds]
    with pytest.raises(SystemExit):
        sharding.leave(InputError(f"{sharding.LOST}: UNAVAILABLE"))
    assert slept == [seconds]


def test_what_several_processes_cannot_evaluate_is_said_before_anything_is_read(monkeypatch, tmp_path):
    config, _ = recipe.parse(["--config=configs/maemi.py:smoke", "--config.evaluation.convergence=2"], "")
    config.evaluation.repeats = 2
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(train, "load_rows", lambda *args: pytest.fail("data were read"))
    with pytest.raises(InputError, match=r"evaluation\.convergence is of one process: set it to 0"):
        train.run(config, tmp_path)
