"""Gradient boosting (scikit-learn, XGBoost, LightGBM): what a model predicts after each round, as arrays.

A round is here what an epoch is elsewhere: the model after r rounds is the first r trees of the final one, so nothing
needs to be recorded while it is trained. History, curves and fusion are the core functions on the array.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _check
from ..runs.importers import softmax

Margins = Iterator[NDArray[Any]]


def staged_probabilities(model: Any, x: Any, every: int = 1) -> NDArray[np.float32]:
    """What a fitted classifier predicts after each `every`-th round of boosting, and after the last.

    Rounds count all trees there are, those after an early stop's best round too. Each tree is evaluated once:
    XGBoost's and LightGBM's margins are added up slice by slice, and the sum is compared with the library's own.

    Parameters
    ----------
    model
        GradientBoostingClassifier, HistGradientBoostingClassifier or whatever else has `staged_predict_proba`;
        XGBClassifier or xgboost.Booster; LGBMClassifier or lightgbm.Booster.
    x : (n_samples, n_features)
        What the model predicts from; for XGBoost a DMatrix too.
    every : int >= 1
        Row i is the model after (i + 1) * every rounds, the last row after all.

    Returns
    -------
    (n_rows, n_samples, n_classes) float32
        Two columns for two classes. Columns are in the order of `model.classes_`: where these are not 0, 1, ..., labels
        are ``np.searchsorted(model.classes_, y)``.

    Raises
    ------
    TypeError
        Not such a model.
    ValueError
        A model that is not fitted, no classifier with one loss over all classes (one-versus-all, regression, ranking),
        or none whose first rounds stay as they were: dart, random forest, gblinear.

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
    names = {c.__module__.partition(".")[0] for c in type(model).__mro__}
    if hasattr(model, "staged_predict_proba"):
        return np.stack(list(_every(model.staged_predict_proba(x), every)))
    if type(model).__name__ == "XGBRFClassifier":
        raise ValueError("model: expected boosting, got a random forest")
    if "xgboost" in names:
        margins = _xgboost(model, x, every)
    elif "lightgbm" in names:
        margins = _lightgbm(model, x, every)
    else:
        kinds = "XGBoost, LightGBM or a scikit-learn classifier with staged_predict_proba"
        hint = "of a Pipeline or a search, pass the classifier inside"
        raise TypeError(f"model: expected a boosted classifier of {kinds}, got {type(model).__name__}; {hint}")
    return np.stack([_probabilities(m) for m in margins])


def _every(rows: Iterator[Any], every: int) -> Iterator[NDArray[np.float32]]:
    """Each `every`-th, and the last."""
    i = 0
    for i, p in enumerate(rows, 1):
        last = p
        if i % every == 0:
            yield np.asarray(p, np.float32)
    if i % every:
        yield np.asarray(last, np.float32)


def _slices(n_rounds: int, every: int) -> list[tuple[int, int]]:
    """(first, one past the last) rounds that each row adds."""
    if n_rounds < 1:
        raise ValueError("model: expected a fitted one, got none with a round of boosting")
    return list(pairwise([*range(0, n_rounds, every), n_rounds]))


def _xgboost(model: Any, x: Any, every: int) -> Margins:
    from xgboost import DMatrix

    booster, options = model, {}
    if hasattr(model, "get_booster"):
        booster = model.get_booster()
        options = {k: getattr(model, k) for k in ("missing", "enable_categorical", "feature_types")}
    learner = json.loads(booster.save_config())["learner"]
    objective, kind = learner["objective"]["name"], learner["gradient_booster"]["name"]
    if objective not in ("binary:logistic", "binary:logitraw", "multi:softprob", "multi:softmax"):
        raise ValueError(f"model: expected a classifier by logistic loss or softmax, got objective {objective!r}")
    if kind != "gbtree":
        raise ValueError(f"model: expected trees that stay as they are (gbtree), got booster {kind!r}")
    if type(x).__name__ == "QuantileDMatrix":
        raise TypeError("x: expected features or a DMatrix, got a QuantileDMatrix, which cannot be evaluated in slices")
    data = x.slice(np.arange(x.num_row())) if isinstance(x, DMatrix) else DMatrix(x, **options)  # a copy: it is changed
    whole = booster.predict(data, output_margin=True, iteration_range=(0, booster.num_boosted_rounds()))
    if whole.ndim != (1 if objective.startswith("binary") else 2):
        raise ValueError(f"model: expected one label per sample, got margins of shape {whole.shape} by {objective}")
    for begin, end in _slices(booster.num_boosted_rounds(), every):
        margin = booster.predict(data, output_margin=True, iteration_range=(begin, end))
        yield margin
        data.set_base_margin(margin)  # to which the next trees are added, in the library's own order
    _verify(margin, whole)


def _lightgbm(model: Any, x: Any, every: int) -> Margins:
    booster = model if hasattr(model, "model_to_string") else model.booster_
    text = booster.model_to_string(num_iteration=1)
    objective = re.findall(r"^objective=(\w+)", text, re.MULTILINE)
    kind = re.findall(r"^\[boosting: (\w+)\]", text, re.MULTILINE)
    if objective not in (["binary"], ["multiclass"]):
        raise ValueError(f"model: expected objective 'binary' or 'multiclass', got {', '.join(objective) or 'none'}")
    if kind and kind[0] in ("dart", "rf"):
        raise ValueError(f"model: expected trees that stay as they are (gbdt), got boosting {kind[0]!r}")
    sharpness = float(next(iter(re.findall(r"^objective=binary sigmoid:(\S+)", text, re.MULTILINE)), 1))
    n, margin = booster.current_iteration(), 0.0
    for begin, end in _slices(n, every):
        margin = margin + booster.predict(x, raw_score=True, start_iteration=begin, num_iteration=end - begin)
        yield sharpness * np.asarray(margin)
    _verify(np.asarray(margin), booster.predict(x, raw_score=True, start_iteration=0, num_iteration=n))


def _verify(margin: NDArray[Any], whole: NDArray[Any]) -> None:
    if not np.allclose(margin, whole, rtol=1e-4, atol=1e-4):
        off = float(np.abs(margin - whole).max())
        raise ValueError(f"model: its rounds do not add up to its own prediction (off by {off:.3g})")


def _probabilities(margin: NDArray[Any]) -> NDArray[np.float32]:
    """(n_samples, n_classes) float32 from (n_samples, n_classes) margins, or (n_samples,) of the second of two."""
    if margin.ndim == 1:
        margin = np.stack([np.zeros_like(margin), margin], axis=1)
    return softmax(margin, "margins")
