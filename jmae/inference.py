"""Scoring with a trained run: its weights, one scorer for images and volumes, and the results of many rows in order.

A `Scorer` prepares cases and turns them into results. `score_rows` does so for many rows: it prepares ahead, scores in
batches, and splits the rows over processes.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jmae import checkpoint
from jmae.data.cases import Cases
from jmae.data.files import Image
from jmae.data.manifest import Row
from jmae.data.opening import WORKERS
from jmae.data.preparation import Prepared, open_case, prepared_case, soft_masks
from jmae.errors import InputError
from jmae.passes import BatchPass, Pass, SweepPass, local_mesh
from jmae.processes import gather
from jmae.results import Result
from jmae.run_folder import log, resuming
from jmae.scoring import case_score
from jmae.sharding import device_mesh, replicated
from jmae.system import Results, System, stage_keys
from jmae.tables import counted
from jmae.waiting import at_work


def restore_stages(config: ConfigDict, system: System, workdir: Path) -> Results:
    """The stages' results that the score reads, from the run folder's last checkpoints, on each of this process's
    devices. `fitting.restore_results` adds what the score has learned from images.

    Raises:
      InputError: a stage has no checkpoint, or has not finished.
    """
    results, resume = dict[str, Any](), resuming(workdir)
    place = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(device_mesh()))
    for number, stage in enumerate(system.stages):
        if stage.name not in system.uses:
            continue
        init = lambda key, results, stage=stage: stage.init(key, results, 1)
        target = jax.eval_shape(init if config.replicates == 1 else jax.vmap(init), stage_keys(config, number), results)
        target = jax.tree.map(place, target)
        found = checkpoint.restore(workdir / "checkpoints" / stage.name, target, config=None, log=log)
        if not found:
            raise InputError(f"{workdir}: stage {stage.name} has no checkpoint: train it: {resume}")
        checkpoint.refuse_unfinished(workdir / "checkpoints" / stage.name, found[0], found[2])
        results[stage.name] = stage.result(found[1])
    if jax.process_count() == 1:
        return results
    return jax.device_put(jax.tree.map(lambda x: x.addressable_data(0), results), replicated(local_mesh()))


# --- the scorer -------------------------------------------------------------------------------------------------------


class Started(NamedTuple):
    """Cases whose pass has been dispatched."""

    cases: Sequence[Prepared]
    handle: Any  # handle of the pass
    time: float


class Scorer:
    """The score of a trained run, of images or volumes: `prepare` cases, then `score` up to any number of them.

    `dispatch` and `fetch` are the two halves of `score`: the host may work between them. `cases` are those that the
    command has read; without them each case is read when it is prepared.
    """

    def __init__(self, config: ConfigDict, system: System, results: Results, cases: Cases | None = None):
        self.config, self.system, self.cases = config, system, cases
        self.passes: Pass = (
            SweepPass(config, system.sweep, results) if system.sweep else BatchPass(config, system, results)
        )
        self.last_fetch, self.said_soft = 0.0, False

    @property
    def at_once(self) -> int:
        """Cases that one pass takes."""
        return self.passes.at_once

    def progress(self, what: str) -> str:
        """What is done, for a line of the log, which says so while a program is compiled."""
        return f"{what} (compiling)" if self.passes.compiling else what

    def with_results(self, results: Results) -> "Scorer":
        """A scorer with the same programs and with other results, whose arrays have the same shapes and places."""
        other = copy(self)
        other.passes = copy(self.passes)
        other.passes.results = results
        return other

    def prepare(self, row: Row, stored: Image | None = None, region: np.ndarray | None = None) -> Prepared:
        """Reads a case and prepares it as the recipe says.

        Args:
          row: the case.
          stored: its image, where it has been read.
          region: bool on the image's own grid, in place of the region that the row names; for volumes alone.

        Raises:
          InputError: "FILE: what: remedy".
        """
        if self.cases and stored is None:
            return self.cases.case(row)
        data = self.config.data
        case = open_case(row, data, stored, region)
        if case.soft and not self.said_soft:
            self.said_soft = True
            log(f"{row.id or row.image[0]}: {soft_masks(1, data.mask_threshold)}")
        return prepared_case(row, data, case)

    def dispatch(self, cases: Sequence[Prepared], draw: str = "", repeats: int | None = None) -> Started:
        """Starts a pass over cases and does not wait for it.

        Args:
          cases: prepared cases.
          draw: name of other random masks; "" for those of the evaluation.
          repeats: sweeps over each volume; None for the system's own number.

        Raises:
          InputError: a case does not fit in the device's memory.
        """
        return Started(cases, self.passes.dispatch(cases, repeats, draw), time.monotonic())

    def fetch(self, started: Started) -> list[Result]:
        """Waits for a pass; gives the result of each of its cases. Raises InputError as `dispatch`."""
        arrays, seconds = self.fetch_arrays(started)
        return [self.result(case, each, seconds) for case, each in zip(started.cases, arrays, strict=True)]

    def fetch_arrays(self, started: Started) -> tuple[list[dict[str, Any]], float]:
        """(the arrays of each case of a pass, seconds a case). The clock starts when the device was free."""
        arrays = self.passes.fetch(started.handle)
        began, self.last_fetch = max(started.time, self.last_fetch), time.monotonic()
        return arrays, (self.last_fetch - began) / len(started.cases)

    def result(self, case: Prepared, arrays: Mapping[str, Any], seconds: float = 0.0) -> Result:
        """A case's result from the arrays of a pass.

        ours: the score of a volume's map follows `evaluation.case_score`, where the papers score voxels only. Without
        that key it is "top": the mean of the highest values in the region, a share `evaluation.top` of them. Where the
        recipe has the key, a map of an image gets such a score, too, if the pass gives none.
        """
        evaluation, region = self.config.evaluation, case.volume and case.volume.region
        rule, above = evaluation.get("case_score", "top"), evaluation.get("part_above", 0.0)
        scores = dict(arrays.get("scores", {}))
        for name, maps in arrays["maps"].items():
            if name not in scores and (case.volume or "case_score" in evaluation):
                of = lambda m: case_score(rule, m, region, share=evaluation.top, above=above)
                scores[name] = np.array([of(m) for m in maps])
        further = arrays.get("reconstruction"), arrays.get("confidence"), arrays.get("pictures", {})
        return Result(
            case, arrays["maps"], scores, *further, seconds, arrays.get("score_error"), arrays.get("measured")
        )

    def example(self, case: Prepared, point: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Pictures (h, w, 1) of one window around a voxel of a volume: each channel, what the network saw of it under
        one mask, and its prediction. Empty where the system has none."""
        if not isinstance(self.passes, SweepPass) or not self.system.sweep or not self.system.sweep.example:
            return {}
        arrays = self.passes.example(case, point)
        names = "a window", "the masked window", "the reconstructed window"
        channels = range(arrays[0].shape[-1])
        of = lambda c: f" of channel {c}" if len(channels) > 1 else ""
        return {f"{name}{of(c)}": array[..., [c]] for c in channels for name, array in zip(names, arrays, strict=True)}

    def score(self, cases: Sequence[Prepared], draw: str = "", repeats: int | None = None) -> list[Result]:
        """The results of prepared cases. Arguments and errors are those of `dispatch`."""
        return self.fetch(self.dispatch(cases, draw, repeats))


# --- many rows --------------------------------------------------------------------------------------------------------

Failed = Callable[[Row, Exception], None]


def score_rows(
    scorer: Scorer,
    rows: Sequence[Row],
    *,
    failed: Failed | None = None,
    ready: Callable[[Prepared], None] = lambda case: None,
) -> Iterator[Result]:
    """The results of rows in their order.

    Threads prepare the next group of rows while one is scored, and each group is dispatched before the previous one is
    fetched. Where there are several processes, each scores its share of every group, and all yield all results.

    Args:
      failed: called with a row that cannot be read or scored, which is then left out; None raises its error.
      ready: called with each prepared case before its scoring starts.

    Raises:
      InputError: without `failed`, the error of the first row that cannot be read or scored.
    """
    done, before = 0, None

    def finished(started: Waiting | None) -> Iterator[Result]:
        nonlocal done
        for result in _finish(scorer, started, failed):
            done += 1
            yield result

    with at_work(lambda: scorer.progress(f"{done} of {counted(len(rows), 'cases')} scored")):
        for cases in prepared_groups(scorer, rows, failed):
            for case in cases:
                ready(case)
            started = _start(scorer, cases, failed)
            yield from finished(before)
            before = started
        yield from finished(before)


def prepared_groups(scorer: Scorer, rows: Sequence[Row], failed: Failed | None = None) -> Iterator[list[Prepared]]:
    """The prepared cases, in groups of as many rows as the processes score at once; each group is prepared ahead of its
    use."""
    size = scorer.at_once * jax.process_count()
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]

    def attempt(row: Row) -> Prepared | Exception:
        try:
            return scorer.prepare(row)
        except Exception as error:  # whatever a case does to the libraries, the others go on
            if failed is None:
                raise
            return error

    with ThreadPoolExecutor(WORKERS) as pool:
        for group, found in zip(groups, lookahead(lambda g: list(pool.map(attempt, g)), groups), strict=True):
            cases = []
            for row, one in zip(group, found, strict=True):
                if isinstance(one, Prepared):
                    cases.append(one)
                elif failed:
                    failed(row, one)
            if cases:
                yield cases


Waiting = tuple[Sequence[Prepared], Started | None]


def _start(scorer: Scorer, cases: Sequence[Prepared], failed: Failed | None) -> Waiting:
    """(cases, the started pass of this process's share of them; None where it failed)."""
    n, own = jax.process_count(), jax.process_index()
    last = len(cases) - 1  # this case fills the shares up to equal lengths
    share = [cases[min(k * n + own, last)] for k in range(-(-len(cases) // n))]
    try:
        return cases, scorer.dispatch(share)
    except InputError as error:
        _fail(cases, error, failed)
        return cases, None


def _finish(scorer: Scorer, waiting: Waiting | None, failed: Failed | None) -> list[Result]:
    cases, started = waiting or ((), None)
    if started is None:
        return []
    try:
        if jax.process_count() == 1:
            return scorer.fetch(started)
        arrays, seconds = scorer.fetch_arrays(started)
    except InputError as error:
        _fail(cases, error, failed)
        return []
    stacked = jax.tree.map(lambda *x: np.stack(x), *arrays) | {"seconds": np.float32(seconds)}
    each, results = gather(stacked), []
    for i, case in enumerate(cases):
        k, process = divmod(i, jax.process_count())
        found = dict(each[process])
        seconds = float(found.pop("seconds"))
        results.append(scorer.result(case, jax.tree.map(itemgetter(k), found), seconds / jax.process_count()))
    return results


def _fail(cases: Sequence[Prepared], error: InputError, failed: Failed | None) -> None:
    if failed is None:
        raise error
    for case in cases:
        failed(case.row, error)


def lookahead(function: Callable, items: Sequence) -> Iterator[Any]:
    """`function` of each item in order. A thread computes the next one while the caller uses one."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for item in items:
            following = pool.submit(function, item)
            if waiting:
                yield waiting.result()
            waiting = following
        if waiting:
            yield waiting.result()
