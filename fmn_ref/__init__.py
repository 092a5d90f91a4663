"""fmn_ref: measure what a network forgot during training, and recover it from the run's own checkpoints.

Metrics, history, fusion and noise need only NumPy. Names that train or evaluate networks load torch on first use; the
rooms above `runs` load when one of their names is used.
"""

from __future__ import annotations

import importlib
import itertools
from typing import TYPE_CHECKING, Any

from . import _check
from .kernels.backend import Backend, backend
from .metrics.curves import (
    ForgettingCurves,
    correctness,
    forget_fraction,
    forgetting_curves,
    forgetting_matrix,
    learned_fraction,
)
from .metrics.history import CorrectnessHistory
from .metrics.samples import SampleStatistics, sample_statistics
from .runs.recorder import Recorder
from .runs.run import Run

if TYPE_CHECKING:
    from .fusion.epsilon import best_epsilon
    from .fusion.expectation import expected_gain
    from .fusion.fuse import fuse
    from .fusion.plan import FusionPlan
    from .metrics.answers import expected_curves, maj_at_k, pass_at_k, temporal_forgetting
    from .reporting.comparison import Comparison, compare, compare_probabilities
    from .reporting.recovery import Recovery, recovery
    from .runs.importers import epoch_files, from_cartography, from_logits, from_toneva
    from .runs.lm_eval import GradedAnswers, from_lm_eval
    from .training.augmentation import crop_flip
    from .training.averages import average_checkpoints
    from .training.distill import Sweep, distill, tune_distillation
    from .training.ensemble import FusedModel, averaged_model
    from .training.existing import from_checkpoints
    from .training.noise import asymmetric_noise, symmetric_noise, transition_noise
    from .training.predictions import Probabilities
    from .training.recipe import Recipe
    from .training.train import train

__version__ = "0.1.0rc1"

# Names that load their module on first use; a module's own name stands for the module.
_LAZY = {
    "fusion.baselines": ("baselines",),
    "fusion.epsilon": ("best_epsilon",),
    "fusion.expectation": ("expectation", "expected_gain"),
    "fusion.fuse": ("fuse",),
    "fusion.plan": ("FusionPlan",),
    "metrics.answers": ("expected_curves", "maj_at_k", "pass_at_k", "temporal_forgetting"),
    "reporting.comparison": ("Comparison", "compare", "compare_probabilities"),
    "reporting.plot": ("plot",),
    "reporting.recovery": ("Recovery", "recovery"),
    "reporting.report": ("report",),
    "runs.checkpoints": ("checkpoints",),
    "runs.importers": ("epoch_files", "from_cartography", "from_logits", "from_toneva"),
    "runs.lm_eval": ("GradedAnswers", "from_lm_eval"),
    "training.augmentation": ("crop_flip",),
    "training.averages": ("average_checkpoints",),
    "training.existing": ("from_checkpoints",),
    "training.distill": ("Sweep", "distill", "tune_distillation"),
    "training.ensemble": ("FusedModel", "averaged_model"),
    "training.noise": ("asymmetric_noise", "symmetric_noise", "transition_noise"),
    "training.predictions": ("Probabilities",),
    "training.recipe": ("Recipe",),
    "training.train": ("train",),
}

__all__ = ["Backend", "Comparison", "CorrectnessHistory", "ForgettingCurves", "FusedModel", "FusionPlan"]
__all__ += ["GradedAnswers", "Probabilities", "Recipe", "Recorder", "Recovery", "Run", "SampleStatistics", "Sweep"]
__all__ += ["asymmetric_noise", "average_checkpoints", "averaged_model", "backend", "best_epsilon", "compare"]
__all__ += ["compare_probabilities", "correctness", "crop_flip", "distill", "epoch_files", "expected_curves"]
__all__ += ["expected_gain", "forget_fraction", "forgetting_curves", "forgetting_matrix", "from_cartography"]
__all__ += ["from_checkpoints", "from_lm_eval", "from_logits", "from_toneva", "fuse", "learned_fraction", "maj_at_k"]
__all__ += ["pass_at_k", "recovery", "sample_statistics", "symmetric_noise", "temporal_forgetting", "train"]
__all__ += ["transition_noise"]
__all__ += ["tune_distillation"]


def _evaluate_run(run: Run, data: Any, **options: Any) -> Any:
    from .training.predictions import Probabilities

    return Probabilities(run, data, **options)


Run.evaluate = staticmethod(_evaluate_run)  # the room of runs lies below the one that evaluates networks


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *itertools.chain(*_LAZY.values())})


def __getattr__(name: str) -> Any:
    for path, names in _LAZY.items():
        if name in names:
            with _check.naming_packages(f"fmn_ref.{name}"):
                module = importlib.import_module(f".{path}", __name__)
            globals()[name] = value = getattr(module, name, module)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
