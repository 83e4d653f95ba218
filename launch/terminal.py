"""What a command says on stderr. Its work goes on where nobody listens any more."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
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

    With Ray at work that crashed at times: a Ctrl-C ended with 139 in place of 130. Outside of any
    ``except``, or frames of the work, with the pools that they hold, are still there.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends at once, not in a traceback
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()  # Ray's processes end here, temporary folders go
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or None
            stream.flush()
    os._exit(code)
