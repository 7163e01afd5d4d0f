"""What a training run shows and obeys while it runs: its progress, a profile, and signals."""

import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from jmae.errors import InputError
from jmae.processes import agreement
from jmae.run_folder import CLOCK, log
from jmae.tables import counted
from jmae.waiting import at_work

SECONDS_BETWEEN_LINES = 10  # where standard error is no terminal
PACE_AFTER = 3  # seconds of steps before a pace is shown, checkpoints included; the first steps tell little
SHOWN = 3  # metrics of a line
BAR = 10  # characters of the bar on a terminal
BESIDE = BAR + len("0:00:00") + 3  # characters of the bar, the time so far and the spaces
NOT_SHOWN = ("stage", "step", "lr", "grad_norm", *CLOCK)


@contextmanager
def signals() -> Iterator[Callable[[bool], signal.Signals | None]]:
    """Gives a function that tells which of SIGTERM and SIGINT (Ctrl-C) has arrived.

    The second Ctrl-C interrupts at once. Outside this context either signal ends the process at once, which a shell
    sees as 143 or 130, too. Nothing but the steps since the last checkpoint is lost with it.

    Several processes learn at the same call that one of them has got a signal. A call knows the signals from before the
    previous call. The last call, which its argument names, knows all.
    """
    arrived: list[signal.Signals] = []
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {n: signal.getsignal(n) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}

    def note(number: int, _: Any) -> None:
        arrived.append(signal.Signals(number))
        if number == signal.SIGINT:
            signal.signal(number, before[signal.SIGINT])
            log("Ctrl-C: saving after this step; once more stops at once")

    try:
        for number in before:
            signal.signal(number, note)
        if jax.process_count() == 1:
            yield lambda last: arrived[0] if arrived else None
        else:
            agreed = agreement()
            first = lambda: arrived[0] if arrived else 0
            yield lambda last: signal.Signals(found) if (found := agreed(first(), last)) else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def progress(
    stage: str, start: int, steps: int, words: Mapping[str, str] = MappingProxyType({}), later: int = 0
) -> Iterator[Callable[[Mapping], None]]:
    """Gives a function that shows a line of metrics: a bar on a terminal, else a plain line now and then.

    `words` are `Stage.words`; `later` is how many stages follow. A step is compiled before the first line. The pace is
    measured from that line on.
    """
    console, marks, shown = Console(stderr=True), list[tuple[float, int]](), [-1e9]
    rest = f", then {counted(later, 'stages')}" if later else ""
    texts = [TextColumn(f"{{task.{name}}}") for name in ("description", "fields[text]")]
    columns = texts[0], BarColumn(BAR), TimeElapsedColumn(), texts[1]
    terminal = console.is_terminal and jax.process_index() == 0
    compiling = nullcontext(lambda: None) if terminal else at_work(f"{stage}: compiling")
    with compiling as compiled, Progress(*columns, console=console, disable=not terminal) as bar:
        task = bar.add_task(f"{stage} {start}/{steps}", total=steps, completed=start, text="compiling")

        def show(line: Mapping) -> None:
            compiled()
            step, figures, pace, left = line["step"], metrics_texts(line, words), "", ""
            marks.append((time.monotonic(), step))
            seconds, done = marks[-1][0] - marks[0][0], step - marks[0][1]
            if done and seconds > PACE_AFTER:
                pace, left = f"{done / seconds:.2f} steps/s", f"{time_left((steps - step) * seconds / done)}{rest}"
            if terminal:
                head = "  ".join(filter(None, (f"{stage} {step}/{steps}", left)))
                text = fitting(filter(None, (*figures[:1], pace, *figures[1:])), console.width - len(head) - BESIDE)
                bar.update(task, completed=step, description=head, text=text)
            elif figures and (marks[-1][0] - shown[0] > SECONDS_BETWEEN_LINES or step == steps):
                shown[0] = marks[-1][0]
                log("  ".join(filter(None, (f"{stage} {step}/{steps}", *figures, pace, left))))

        yield show


def time_left(seconds: float) -> str:
    """Seconds in words, from two minutes on as minutes."""
    return f"{seconds:.0f} s left" if seconds < 120 else f"{seconds / 60:.0f} min left"


def fitting(texts: Iterable[str], room: int) -> str:
    """As many of the texts, from the first on, as fit whole into `room` characters."""
    line = ""
    for text in texts:
        longer = f"{line}  {text}" if line else text
        if len(longer) > room:
            break
        line = longer
    return line


def metrics_texts(line: Mapping, words: Mapping[str, str]) -> list[str]:
    """The first metrics of a line in plain words, the loss before the others and what is best so far behind them."""
    names = sorted((name for name in line if name not in NOT_SHOWN), key=lambda name: (name != "loss", "best" in name))
    return [f"{plain_name(name, words)} {line[name]:.4f}" for name in names[:SHOWN]]


def plain_name(name: str, words: Mapping[str, str]) -> str:
    """What a metric of the training is, in the words of its stage; without words its name."""
    stem, _, channel = name.rpartition("_")
    if channel.isdecimal() and stem in words:
        return f"{words[stem]}, channel {channel}"
    return words.get(name, name)


def profiled_steps(config: ConfigDict) -> tuple[int, int] | None:
    """The first and last step that `config.profile`, "FROM:TO", asks to profile. Raises InputError for another form."""
    if not config.profile:
        return None
    found = re.fullmatch(r"(\d+):(\d+)", config.profile)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise InputError(f"profile is {config.profile!r}: write FROM:TO, two steps, as 20:30")
    return int(found[1]), int(found[2])


@contextmanager
def profiling(config: ConfigDict, workdir: Path, stage: str) -> Iterator[Callable[[int, Any], None]]:
    """Gives a function (steps done, arrays of the last step) that starts and ends the profile of `config.profile`.

    The trace lies in profile/STAGE of the run folder, for TensorBoard or Perfetto.
    """
    steps, running = profiled_steps(config), False

    def follow(done: int, arrays: Any) -> None:
        nonlocal running
        if steps and not running and steps[0] - 1 <= done < steps[1]:
            jax.block_until_ready(arrays)
            jax.profiler.start_trace(str(workdir / "profile" / stage))
            running = True
        elif steps and running and done >= steps[1]:
            jax.block_until_ready(arrays)
            jax.profiler.stop_trace()
            running = False
            log(f"{stage}: profile of steps {steps[0]} to {done}: {workdir / 'profile' / stage}")

    try:
        yield follow
    finally:
        if running:
            jax.profiler.stop_trace()
