"""Boosting: every row is what the library itself predicts after so many rounds."""

import doctest
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("sklearn")
from inputs import history_of
from pages import blocks, n_lines
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.ensemble import (
    AdaBoostClassifier,
    GradientBoostingClassifier,
    GradientBoostingRegressor,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
)

import fmn_ref as fmn
from fmn_ref.integrations import boosting
from fmn_ref.integrations.boosting import staged_probabilities

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "integrations" / "boosting.md"
LOADERS = {"digits": load_digits, "breast_cancer": load_breast_cancer}
N = 12  # rounds


def data(name, n_train=250):
    x, y = LOADERS[name](return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    train, rest = order[:n_train], order[n_train : n_train + 200]
    n_classes = y.max() + 1
    return (x[train], fmn.symmetric_noise(y[train], 0.3, n_classes, seed=0)), (x[rest], y[rest])


def xgboost():
    return pytest.importorskip("xgboost")


def lightgbm():
    return pytest.importorskip("lightgbm")


def sklearn_models(x, y):
    yield GradientBoostingClassifier(n_estimators=N, max_depth=2, random_state=0)
    yield HistGradientBoostingClassifier(max_iter=N, early_stopping=False)
    yield AdaBoostClassifier(n_estimators=N, random_state=0)


@pytest.mark.parametrize("name", LOADERS)
def test_scikit_learn(name):
    (x, y), (x_val, _) = data(name)
    for model in sklearn_models(x, y):
        expected = np.array(list(model.fit(x, y).staged_predict_proba(x_val)), np.float32)
        found = staged_probabilities(model, x_val)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(staged_probabilities(model, x_val, every=5), expected[[4, 9, 11]])
        np.testing.assert_array_equal(staged_probabilities(model, x_val, every=4), expected[[3, 7, 11]])
        np.testing.assert_array_equal(staged_probabilities(model, x_val, every=100), expected[[11]])


def with_xgboost(name, **options):
    (x, y), (x_val, _) = data(name)
    return xgboost().XGBClassifier(n_estimators=N, max_depth=3, n_jobs=1, **options).fit(x, y), x_val


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("options", [{}, {"num_parallel_tree": 3, "subsample": 0.7}], ids=["trees", "forests"])
def test_xgboost(name, options):
    model, x_val = with_xgboost(name, **options)
    expected = np.array([model.predict_proba(x_val, iteration_range=(0, i + 1)) for i in range(N)])
    found = staged_probabilities(model, x_val)
    assert (found.shape, found.dtype) == (expected.shape, np.float32)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(staged_probabilities(model, x_val, every=5), found[[4, 9, 11]])
    given = xgboost().DMatrix(x_val)
    np.testing.assert_array_equal(staged_probabilities(model.get_booster(), given), found)
    assert given.get_base_margin().size == 0


def test_xgboost_starts_from_base_margins():
    (x, y), (x_val, _) = data("breast_cancer")
    xgb, rng = xgboost(), np.random.default_rng(0)
    train, given = (xgb.DMatrix(a, base_margin=rng.normal(size=len(a))) for a in (x, x_val))
    train.set_label(y)
    booster = xgb.train({"objective": "binary:logistic", "max_depth": 3}, train, N)
    before = given.get_base_margin()
    found = staged_probabilities(booster, given)
    np.testing.assert_array_equal(given.get_base_margin(), before)
    for i in (0, 5, 11):
        expected = booster.predict(given, iteration_range=(0, i + 1))
        np.testing.assert_allclose(found[i, :, 1], expected, atol=1e-6)


def test_missing_values_and_categories():
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    color = rng.integers(0, 3, 300)
    table = pandas.DataFrame({"color": pandas.Categorical(color), "size": rng.normal(size=300)})
    y = (color == 1) ^ (table["size"] > 0)
    table.loc[::7, "size"] = np.nan
    models = [HistGradientBoostingClassifier(max_iter=N, categorical_features="from_dtype")]
    models += [xgboost().XGBClassifier(n_estimators=N, enable_categorical=True, tree_method="hist")]
    models += [lightgbm().LGBMClassifier(n_estimators=N, verbose=-1)]
    for model in models:
        found = staged_probabilities(model.fit(table, y.astype(int)), table)
        np.testing.assert_allclose(found[-1], model.predict_proba(table), atol=1e-6)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("options", [{}, {"sigmoid": 2.5}, {"data_sample_strategy": "goss"}], ids=str)
def test_lightgbm(name, options):
    (x, y), (x_val, _) = data(name)
    model = lightgbm().LGBMClassifier(n_estimators=N, num_leaves=7, n_jobs=1, verbose=-1, **options).fit(x, y)
    booster = model.booster_
    second = [booster.predict(x_val, num_iteration=i + 1) for i in range(N)]
    expected = np.array([p if p.ndim == 2 else np.stack([1 - p, p], axis=1) for p in second])
    found = staged_probabilities(model, x_val)
    assert (found.shape, found.dtype) == (expected.shape, np.float32)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(staged_probabilities(booster, x_val, every=4), found[[3, 7, 11]])
    loaded = lightgbm().Booster(model_str=booster.model_to_string())
    np.testing.assert_array_equal(staged_probabilities(loaded, x_val), found)


def test_rounds_after_an_early_stop_count():
    (x, y), (x_val, y_val) = data("digits")
    model = xgboost().XGBClassifier(n_estimators=200, early_stopping_rounds=3, n_jobs=1)
    model.fit(x, y, eval_set=[(x_val, y_val)], verbose=False)
    found = staged_probabilities(model, x_val)
    assert len(found) == model.get_booster().num_boosted_rounds() == model.best_iteration + 4
    np.testing.assert_allclose(found[model.best_iteration], model.predict_proba(x_val), atol=1e-6)


def test_history_curves_plan_and_fusion_are_the_core_functions():
    """Against predictions that the library made from nothing after each round."""
    (x, y), (x_val, y_val) = data("digits")
    model = HistGradientBoostingClassifier(max_iter=40, early_stopping=False).fit(x, y)
    dumped = np.array([p.astype(np.float32) for p in model.staged_predict_proba(x_val)])
    probs = staged_probabilities(model, x_val)
    right = dumped.argmax(-1) == y_val
    history = history_of(fmn.correctness(probs, y_val))
    np.testing.assert_array_equal(history.packed, np.packbits(right, axis=1, bitorder="little"))
    forget = np.array([(row & ~right[-1]).mean() for row in right])
    np.testing.assert_array_equal(fmn.forget_fraction(history), forget)
    assert forget.max() > 0
    plan, expected = (fmn.fuse(p, y_val, correct=right, method="auto") for p in (probs, dumped))
    assert plan == expected
    np.testing.assert_array_equal(plan.apply(probs), expected.apply(dumped))


def refused(match, model, x, error=ValueError, every=1):
    with pytest.raises(error, match=match):
        staged_probabilities(model, x, every)


def test_models_that_are_refused():
    (x, y), _ = data("digits", 60)
    binary = y % 2
    refused("RandomForestClassifier", RandomForestClassifier().fit(x, y), x, TypeError)
    refused("GradientBoostingRegressor", GradientBoostingRegressor(n_estimators=2).fit(x, y), x, TypeError)
    refused("not fitted", GradientBoostingClassifier(), x)
    fitted = GradientBoostingClassifier(n_estimators=2).fit(x, binary)
    refused("every", fitted, x, every=0)
    refused("every", fitted, x, TypeError, every=1.5)


def test_xgboost_models_that_are_refused():
    (x, y), _ = data("digits", 60)
    xgb, y = xgboost(), y % 2
    small = {"n_estimators": 2, "n_jobs": 1}
    refused("need to call fit", xgb.XGBClassifier(), x)
    refused("reg:squarederror", xgb.XGBRegressor(**small).fit(x, y), x)
    refused("binary:hinge", xgb.XGBClassifier(objective="binary:hinge", **small).fit(x, y), x)
    refused("'dart'", xgb.XGBClassifier(booster="dart", **small).fit(x, y), x)
    refused("random forest", xgb.XGBRFClassifier(**small).fit(x, y), x)
    refused("one label per sample", xgb.XGBClassifier(**small).fit(x, np.stack([y, 1 - y], axis=1)), x)


def test_lightgbm_models_that_are_refused():
    (x, y), _ = data("digits", 60)
    lgb = lightgbm()
    small = {"n_estimators": 2, "n_jobs": 1, "verbose": -1}
    refused("Need to call fit", lgb.LGBMClassifier(), x)
    refused("regression", lgb.LGBMRegressor(**small).fit(x, y), x)
    refused("multiclassova", lgb.LGBMClassifier(objective="multiclassova", **small).fit(x, y), x)
    refused("'dart'", lgb.LGBMClassifier(boosting_type="dart", **small).fit(x, y), x)
    forest = lgb.LGBMClassifier(boosting_type="rf", subsample=0.5, subsample_freq=1, **small).fit(x, y)
    refused("'rf'", forest, x)


def test_the_guide(capsys):
    (x, y), (x_select, y_select) = data("digits")
    x_test, y_test = (a[450:] for a in load_digits(return_X_y=True))
    (code,) = blocks(DOCS.read_text())
    assert n_lines(code) <= 10
    model = HistGradientBoostingClassifier(max_iter=20, early_stopping=False).fit(x, y)
    names = {"model": model, "x_select": x_select, "y_select": y_select, "x_test": x_test}
    exec(code, names)
    assert names["fused"].shape == (len(y_test), 10)
    assert (names["fused"].argmax(1) == y_test).mean() > 0.5
    assert doctest.testmod(boosting).failed == 0
    capsys.readouterr()


def test_the_guide_quotes_the_committed_results():
    from fmn_ref.benchmarks.experiments import boosting as benchmark

    result = json.loads((ROOT / "benchmarks" / "results" / "boosting.json").read_text())
    assert result["rounds"] == benchmark.ROUNDS
    assert {len(cell["seeds"]) for cell in result["cells"]} == {benchmark.SEEDS}
    text = DOCS.read_text()
    for table in benchmark.markdown(result).split("\n\n"):
        assert table in text


def test_the_benchmark(tmp_path, monkeypatch):
    """Small; its accuracies are those of the plan and of single rounds."""
    xgboost(), lightgbm(), pytest.importorskip("matplotlib")
    from fmn_ref.benchmarks.experiments import boosting as benchmark

    monkeypatch.setattr(benchmark, "SIZES", {"breast_cancer": (200, 150)})
    monkeypatch.setattr(benchmark, "RATES", (0.4,))
    result = benchmark.benchmark(str(tmp_path), rounds=10, seeds=2)
    assert json.loads((tmp_path / "boosting.json").read_text()) == result
    assert (tmp_path / "boosting.png").stat().st_size > 1000
    assert [cell["library"] for cell in result["cells"]] == list(benchmark.LIBRARIES)
    found = result["cells"][0]["seeds"][1]
    parts = benchmark.draw_sets("breast_cancer", 0.4, 1)
    rows = [set(map(bytes, np.ascontiguousarray(x))) for x, _ in parts.values()]
    assert rows[0].isdisjoint(rows[1] | rows[2])
    assert rows[1].isdisjoint(rows[2])
    (x_select, y_select), (x_test, y_test) = parts["select"], parts["test"]
    model = benchmark.make_classifier("scikit-learn", 10, 1).fit(*parts["train"])
    probs = np.array(list(model.staged_predict_proba(x_select)), np.float32)
    test_probs = np.array(list(model.staged_predict_proba(x_test)), np.float32)
    right = test_probs.argmax(-1) == y_test
    accuracy = found["test_accuracy"]
    assert accuracy["final round"] == pytest.approx(right[-1].mean(), abs=1e-6)
    best = (probs.argmax(-1) == y_select).mean(1).argmax()
    assert (found["stopped_at"], accuracy["early stopping"]) == (best + 1, pytest.approx(right[best].mean(), abs=1e-6))
    fused = fmn.fuse(probs, y_select, method="auto").apply(test_probs)
    assert accuracy["auto"] == pytest.approx((fused.argmax(1) == y_test).mean(), abs=1e-6)
    assert found["peak_forget"] == max((row & ~right[-1]).mean() for row in right)
    assert "| breast_cancer | 40% | scikit-learn |" in benchmark.markdown(result)
