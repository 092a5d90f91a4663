"""Gradient boosting (scikit-learn, XGBoost, LightGBM): predictions after each round, as arrays.

A boosting round takes the place of an epoch. The model after r rounds is the first r trees of the final model, so
nothing needs to be recorded during training. Use the core functions on the array for history, curves and fusion.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from ..runs.importers import softmax

Margins = Iterator[NDArray[Any]]  # an array per row of the result: (n_samples,) for two classes, else a column each


def staged_probabilities(model: Any, x: Any, every: int = 1) -> NDArray[np.float32]:
    """Predict `x` after each `every`-th round of boosting, and after the last.

    All rounds of the model count, also those after the best round of an early stop. Each tree is evaluated once: the
    margins of XGBoost and LightGBM are added up slice by slice, and the sum is compared with the library's own.

    Parameters
    ----------
    model : fitted classifier
        XGBClassifier, xgboost.Booster, LGBMClassifier, lightgbm.Booster, or a scikit-learn classifier with
        `staged_predict_proba`, such as HistGradientBoostingClassifier.
    x : (n_samples, n_features)
        Features, as the model's own `predict` takes them; for XGBoost also a DMatrix.
    every : int, default 1
        Row i of the result is the model after (i + 1) * every rounds; the last row is the model after all rounds.

    Returns
    -------
    (n_rows, n_samples, n_classes) float32
        Two columns for two classes. Columns are in the order of `model.classes_`. If the classes are not 0, 1, ...,
        compute the labels with ``np.searchsorted(model.classes_, y)``.

    Raises
    ------
    TypeError
        `model` is not one of these classifiers.
    ValueError
        The model is not fitted. It does not classify by one loss over all classes (one-versus-all, regression,
        ranking). Or its first rounds do not stay as they were (dart, random forest, gblinear).

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.ensemble import GradientBoostingClassifier
    >>> x, y = load_iris(return_X_y=True)
    >>> probs = staged_probabilities(GradientBoostingClassifier(n_estimators=5).fit(x, y), x, every=2)
    >>> probs.shape  # after 2, 4 and 5 rounds
    (3, 150, 3)
    """
    every = _check.number(every, 1, 2**31, "every", int)
    packages = {c.__module__.partition(".")[0] for c in type(model).__mro__}
    if hasattr(model, "staged_predict_proba"):
        return np.stack(list(_each_nth(model.staged_predict_proba(x), every)))
    if type(model).__name__ == "XGBRFClassifier":
        raise ValueError("model: expected boosting, got a random forest")
    if "xgboost" in packages:
        margins = _xgboost_margins(model, x, every)
    elif "lightgbm" in packages:
        margins = _lightgbm_margins(model, x, every)
    else:
        kinds = "XGBoost, LightGBM or a scikit-learn classifier with staged_predict_proba"
        hint = "of a Pipeline or a search, pass the classifier inside"
        raise TypeError(f"model: expected a boosted classifier of {kinds}, got {type(model).__name__}; {hint}")
    return np.stack([_class_probabilities(m) for m in margins])


def _each_nth(stages: Iterable[Any], n: int) -> Iterator[NDArray[np.float32]]:
    """Yield each n-th array, and the last one."""
    i = 0
    for i, stage in enumerate(stages, 1):
        if i % n == 0:
            yield np.asarray(stage, np.float32)
    if i % n:
        yield np.asarray(stage, np.float32)


def _round_ranges(n_rounds: int, every: int) -> list[tuple[int, int]]:
    """List the (first, one past the last) rounds that each row of the result adds."""
    if n_rounds < 1:
        raise ValueError("model: expected a fitted one, got none with a round of boosting")
    return list(pairwise([*range(0, n_rounds, every), n_rounds]))


def _xgboost_margins(model: Any, x: Any, every: int) -> Margins:
    booster = model.get_booster() if hasattr(model, "get_booster") else model
    objective, n_rounds = _xgboost_objective(booster), booster.num_boosted_rounds()
    data = _xgboost_data(model, x)
    expected = booster.predict(data, output_margin=True, iteration_range=(0, n_rounds))
    if expected.ndim != (1 if objective.startswith("binary") else 2):
        raise ValueError(f"model: expected one label per sample, got margins of shape {expected.shape} by {objective}")
    for first, end in _round_ranges(n_rounds, every):
        margin = booster.predict(data, output_margin=True, iteration_range=(first, end))
        yield margin
        data.set_base_margin(margin)  # XGBoost adds the next trees to it, in its own order
    _check_sum(margin, expected)


def _xgboost_objective(booster: Any) -> str:
    """Return the objective of a classifier by trees; ValueError for another model."""
    learner = json.loads(booster.save_config())["learner"]
    objective, kind = learner["objective"]["name"], learner["gradient_booster"]["name"]
    if objective not in ("binary:logistic", "binary:logitraw", "multi:softprob", "multi:softmax"):
        raise ValueError(f"model: expected a classifier by logistic loss or softmax, got objective {objective!r}")
    if kind != "gbtree":
        raise ValueError(f"model: expected trees that stay as they are (gbtree), got booster {kind!r}")
    return str(objective)


def _xgboost_data(model: Any, x: Any) -> Any:
    """Make a DMatrix whose base margins may be changed."""
    from xgboost import DMatrix

    if type(x).__name__ == "QuantileDMatrix":
        raise TypeError("x: expected features or a DMatrix, got a QuantileDMatrix, which cannot be evaluated in slices")
    if isinstance(x, DMatrix):
        return x.slice(np.arange(x.num_row()))  # a copy
    names = ("missing", "enable_categorical", "feature_types") if hasattr(model, "get_booster") else ()
    return DMatrix(x, **{name: getattr(model, name) for name in names})


def _lightgbm_margins(model: Any, x: Any, every: int) -> Margins:
    booster = model if hasattr(model, "model_to_string") else model.booster_
    sigmoid, n_rounds, margin = _lightgbm_sigmoid(booster), booster.current_iteration(), 0.0
    for first, end in _round_ranges(n_rounds, every):
        margin = margin + booster.predict(x, raw_score=True, start_iteration=first, num_iteration=end - first)
        yield sigmoid * np.asarray(margin)
    _check_sum(np.asarray(margin), booster.predict(x, raw_score=True, start_iteration=0, num_iteration=n_rounds))


def _lightgbm_sigmoid(booster: Any) -> float:
    """Return the factor that turns raw scores into margins; ValueError if the model is no classifier by gbdt."""
    text = booster.model_to_string(num_iteration=1)
    objective = re.findall(r"^objective=(\w+)", text, re.MULTILINE)
    kind = re.findall(r"^\[boosting: (\w+)\]", text, re.MULTILINE)
    if objective not in (["binary"], ["multiclass"]):
        raise ValueError(f"model: expected objective 'binary' or 'multiclass', got {', '.join(objective) or 'none'}")
    if kind and kind[0] in ("dart", "rf"):
        raise ValueError(f"model: expected trees that stay as they are (gbdt), got boosting {kind[0]!r}")
    return float(next(iter(re.findall(r"^objective=binary sigmoid:(\S+)", text, re.MULTILINE)), 1))


def _check_sum(margin: NDArray[Any], expected: NDArray[Any]) -> None:
    """Compare the sum of all rounds with the library's own prediction."""
    if not np.allclose(margin, expected, rtol=1e-4, atol=1e-4):
        off = float(np.abs(margin - expected).max())
        raise ValueError(f"model: its rounds do not add up to its own prediction (off by {off:.3g})")


def _class_probabilities(margin: NDArray[Any]) -> NDArray[np.float32]:
    """Turn margins (n_samples, n_classes), or (n_samples,) of the second of two classes, into probabilities."""
    if margin.ndim == 1:
        margin = np.stack([np.zeros_like(margin), margin], axis=1)
    return softmax(margin, "margins")
