"""What workers load ahead of their first trial. One of them also checks the backbones, for which it has torch."""

import tuning.search.trainable
import tuning.search.worker  # noqa: F401
from tuning.training.checking import answer

answer()
