"""What a command says on stderr. Its work goes on where nobody listens any more."""

from __future__ import annotations

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn


def show(text: str) -> None:
    """Write to what sys.stderr is at the time: a progress bar replaces it while it shows.

    A terminal may be closed, and Ctrl-C ends `tee` as well: training has to save all the same.
    """
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)


def leave(code: int) -> NoReturn:
    """End an interrupted process as Python does, but for what C++ libraries do at its very end.

    With Ray at work that crashed one time in seven: a Ctrl-C ended with 139 in place of 130.
    """
    atexit._run_exitfuncs()  # Ray's processes end here, temporary folders go
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody may listen any more
            stream.flush()
    os._exit(code)
