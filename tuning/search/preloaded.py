"""What workers load ahead of their first trial. One of them also checks the backbones, for which it has torch."""

import fcntl
import os
from contextlib import suppress

FEW_CORES = 2  # of which the driver takes one meanwhile

with open(__file__) as turn:
    if (os.cpu_count() or 1) <= FEW_CORES:
        with suppress(OSError):  # a file system without locks, or without them on files that are only read
            fcntl.flock(turn, fcntl.LOCK_EX)  # one worker after the other, or both would have loaded only at the end
    import tuning.search.trainable
    import tuning.search.worker  # noqa: F401
    from tuning.training.checking import answer

answer()
