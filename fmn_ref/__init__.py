"""fmn_ref: what a network forgot while it was trained, and how to get it back.

Metrics, history, fusion and noise need NumPy alone; the names below that train or evaluate networks load torch on first
use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import expectation as expectation
from ._backend import Backend, backend
from .expectation import expected_gain
from .fusion import best_epsilon, fuse
from .history import CorrectnessHistory
from .importers import epoch_files, from_cartography, from_logits, from_toneva
from .metrics import (
    ForgettingCurves,
    SampleStatistics,
    correctness,
    forget_fraction,
    forgetting_curves,
    forgetting_matrix,
    learned_fraction,
    sample_statistics,
)
from .noise import asymmetric_noise, symmetric_noise, transition_noise
from .plan import FusionPlan
from .recorder import Recorder, Run
from .recovery import Recovery, recovery

if TYPE_CHECKING:
    from .augmentation import crop_flip
    from .comparison import Comparison, compare, compare_probabilities
    from .distillation import Sweep, distill, tune_distillation
    from .ensemble import FusedModel, Probabilities, averaged_model
    from .recipe import Recipe
    from .training import train

__version__ = "0.1.0"

_LAZY = {
    "Comparison": "comparison",
    "FusedModel": "ensemble",
    "Probabilities": "ensemble",
    "Recipe": "recipe",
    "Sweep": "distillation",
    "averaged_model": "ensemble",
    "compare": "comparison",
    "compare_probabilities": "comparison",
    "crop_flip": "augmentation",
    "distill": "distillation",
    "train": "training",
    "tune_distillation": "distillation",
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


def __dir__() -> list[str]:
    return [*globals(), *__all__, "plot"]


def __getattr__(name: str) -> Any:
    if name == "plot":
        return importlib.import_module(".plot", __name__)
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
