"""The end of a command line: an exit status and, where something went wrong, one line on standard error.

The status is 0; 1 for a run that failed or a file that is no good; 2 for arguments that cannot be used; 143 after
SIGTERM; 141, without a line, where nothing reads the output any more. Nothing here imports torch.
"""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence

from cutdiff.cli.arguments import BadArgument
from cutdiff.parallel import stopping
from cutdiff.parallel.lines import NoReader, open_streams, output_lost, say, write, write_line
from cutdiff.parallel.process import Ended, RankLost, process

LONGEST = 500
"""The most characters of a message that was not written for the user."""
UNREAD = 128 + signal.SIGPIPE
"""The exit status where nothing reads the output any more, which is no error."""
Errors = tuple[type[Exception], ...]


class Failure(Exception):
    """A run that failed for a reason that is understood; the message is the line that the user reads."""


def exit_status(
    run: Callable[[], object], argv: Sequence[str] | None, *, bad_arguments: Errors = (), failures: Errors = ()
) -> int:
    """Call `run` and return the exit status of the command line; an error becomes one line on standard error.

    Errors of the types `bad_arguments` give status 2 and those of `failures` give status 1, each with its own message,
    as Failure always does, and BadArgument, which has a status. The line of any other error names its type, too, and
    the status is 1. With --debug in `argv` the traceback is printed first.
    """
    open_streams()
    debug = "--debug" in (sys.argv if argv is None else argv)
    if not debug:
        # As it is imported, torch reads whether to warn, as of a connection that a process of the run has closed.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        try:
            run()
        except (Exception, KeyboardInterrupt, stopping.Terminated) as error:
            if debug:
                write_line(traceback.format_exc(), sys.stderr)
            return _status(error, bad_arguments, failures)
        finally:
            write("", sys.stdout)  # --help leaves its text to the end of the process, where nobody handles an error
    except NoReader:
        return UNREAD
    return int(output_lost())


def _status(error: BaseException, bad_arguments: Errors, failures: Errors) -> int:
    """Say in one line why the run ends, and return the exit status."""
    if isinstance(error, NoReader):
        raise error
    if isinstance(error, (BadArgument, *bad_arguments)):
        return _complain(str(error), getattr(error, "status", BadArgument.status))
    if isinstance(error, (Failure, RankLost, *failures)):
        return _complain(str(error), 1)
    match error:
        case Ended():
            return 1
        case KeyboardInterrupt():
            # CPython remembers an interrupt that passed through an exec of text, which imports have, and would at last
            # end by SIGINT although it was caught; the next such exec makes it forget.
            exec("")
            return _end_by(signal.SIGINT)
        case stopping.Terminated():
            return _end_by(signal.SIGTERM)
        case _:  # the last line of defence: one line instead of a traceback
            message = textwrap.shorten(f"{type(error).__name__}: {error}", LONGEST, placeholder=" …")
            return _complain(f"the run failed: {message}", 1)


def _end_by(number: signal.Signals) -> int:
    """Every process receives the signal, and the first one says so."""
    status, message = stopping.ENDS[number]
    return status if process() else _complain(message, status)


def _complain(message: str, status: int) -> int:
    rank = f"rank {process()}: " * (process() > 0)
    say(f"{rank}{message}")
    return status
