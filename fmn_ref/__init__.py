"""fmn_ref: what a network forgot while it was trained, and how to get it back.

Metrics, history, fusion and noise need NumPy alone; the names below that train or evaluate networks load torch on first
use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .fusion import expectation as expectation
from .fusion.expectation import expected_gain
from .fusion.fuse import best_epsilon, fuse
from .fusion.plan import FusionPlan
from .kernels.backend import Backend, backend
from .metrics.curves import (
    ForgettingCurves,
    SampleStatistics,
    correctness,
    forget_fraction,
    forgetting_curves,
    forgetting_matrix,
    learned_fraction,
    sample_statistics,
)
from .metrics.history import CorrectnessHistory
from .reporting.recovery import Recovery, recovery
from .runs.importers import epoch_files, from_cartography, from_logits, from_toneva
from .runs.recorder import Recorder
from .runs.run import Run
from .training.noise import asymmetric_noise, symmetric_noise, transition_noise

if TYPE_CHECKING:
    from .reporting.comparison import Comparison, compare, compare_probabilities
    from .training.augmentation import crop_flip
    from .training.distill import Sweep, distill, tune_distillation
    from .training.ensemble import FusedModel, averaged_model
    from .training.predictions import Probabilities
    from .training.recipe import Recipe
    from .training.train import train

__version__ = "0.1.0"

_LAZY = {
    "Comparison": "reporting.comparison",
    "FusedModel": "training.ensemble",
    "Probabilities": "training.predictions",
    "Recipe": "training.recipe",
    "Sweep": "training.distill",
    "averaged_model": "training.ensemble",
    "compare": "reporting.comparison",
    "compare_probabilities": "reporting.comparison",
    "crop_flip": "training.augmentation",
    "distill": "training.distill",
    "train": "training.train",
    "tune_distillation": "training.distill",
}

__all__ = [
    "Backend",
    "Comparison",
    "CorrectnessHistory",
    "ForgettingCurves",
    "FusedModel",
    "FusionPlan",
    "Probabilities",
    "Recipe",
    "Recorder",
    "Recovery",
    "Run",
    "SampleStatistics",
    "Sweep",
    "asymmetric_noise",
    "averaged_model",
    "backend",
    "best_epsilon",
    "compare",
    "compare_probabilities",
    "correctness",
    "crop_flip",
    "distill",
    "epoch_files",
    "expected_gain",
    "forget_fraction",
    "forgetting_curves",
    "forgetting_matrix",
    "from_cartography",
    "from_logits",
    "from_toneva",
    "fuse",
    "learned_fraction",
    "recovery",
    "sample_statistics",
    "symmetric_noise",
    "train",
    "transition_noise",
    "tune_distillation",
]


def _probabilities(run: Run, data: Any, **options: Any) -> Any:
    from .training.predictions import Probabilities

    return Probabilities(run, data, **options)


Run.evaluate = staticmethod(_probabilities)  # the room of runs lies below the one that evaluates networks


def __dir__() -> list[str]:
    return [*globals(), *__all__, "plot"]


def __getattr__(name: str) -> Any:
    if name == "plot":
        return importlib.import_module(".reporting.plot", __name__)
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
