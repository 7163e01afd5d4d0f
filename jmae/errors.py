"""What can go wrong that is not a bug, and the exit code of each; every command ends through `exit_code`."""

import difflib
import functools
import os
import select
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


class InputError(Exception):
    """The input or the environment is wrong. The message is one line a problem: what, where, the remedy."""

    code = 2


class NonFiniteLoss(Exception):
    """Training stopped on a loss or gradient that is not finite; the last good step is kept."""

    code = 3


class Stopped(Exception):
    """A signal, SIGTERM or SIGINT, arrived and the state is saved."""

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.code = 128 + number


def shortly(function: Function) -> Function:
    """A function that users call: what it raises on purpose has a traceback without the library's inner calls.

    Python does not print the exception behind it either; `error.__context__` keeps that one, with its traceback.
    """

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except (InputError, NonFiniteLoss, Stopped) as error:
            raise error.with_traceback(None) from None

    return cast(Function, called)


def has_no_reader(stream: int) -> bool:
    """Whether a file descriptor is a pipe that no process reads any more, as in `jmae systems | head -1`."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def nearest(name: str, known: Sequence[str]) -> str:
    """The most similar of the known names; one with the same letters in another order before all others."""
    turned = [one for one in known if sorted(one) == sorted(name)]
    return (turned or difflib.get_close_matches(name, known, n=1, cutoff=0.0))[0]


def exit_code(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Runs a command; what it raises on purpose becomes one line on standard error and its exit code.

    With `--debug` among the arguments the traceback is shown as well.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        code = main([a for a in arguments if a != "--debug"]) or 0
        if sys.stdout:  # None where the shell has closed it
            sys.stdout.flush()
        return code
    except BrokenPipeError:
        if not (ended := [stream for stream in (1, 2) if has_no_reader(stream)]):
            raise  # another pipe or connection has failed
        for stream in ended:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)  # for what Python flushes at its end
        return 141  # 128 + SIGPIPE, as of other programs
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print("interrupted: no file is half-written; the same command can be run again", file=sys.stderr)
        return 130
    except (InputError, NonFiniteLoss, Stopped) as error:
        if debug:
            traceback.print_exc()
        print(error, file=sys.stderr)
        return error.code
