"""What a command says on stderr. Its work goes on where nobody listens any more."""

from __future__ import annotations

import os
import sys


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
