"""Figures of the curves and of the classes: what they draw, read back from matplotlib's artists."""

import numpy as np
import pytest
from inputs import history_of

import fmn_ref as fmn
from fmn_ref.reporting import plot

pytest.importorskip("matplotlib")
from matplotlib.text import Text


def drawn(figure):
    """Lines of a figure by their labels."""
    return {line.get_label(): line for line in figure.axes[0].lines}


def legend(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def texts(figure):
    return [text.get_text() for text in figure.axes[0].texts]


# --- curves ---

FORGETTING = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 0, 1], [0, 0, 1, 1, 0]], bool)  # accuracy 0.4, 0.8, 0.4


def test_levels_are_drawn_and_labelled(tmp_path):
    figure = plot.curves(FORGETTING, fused=0.875, student=np.float32(0.75))
    lines = drawn(figure)
    assert list(lines["fused: 87.5%"].get_ydata()) == [0.875] * 2
    assert list(lines["student: 75.0%"].get_ydata()) == [0.75] * 2
    assert lines["fused: 87.5%"].get_color() != lines["student: 75.0%"].get_color()
    assert legend(figure)[:2] == ["fused: 87.5%", "student: 75.0%"]
    figure.savefig(tmp_path / "f.png")
    assert not any(label.startswith(("fused", "student")) for label in legend(plot.curves(FORGETTING)))


def test_the_peak_and_the_gap(tmp_path):
    figure = plot.curves(history_of(FORGETTING, tmp_path / "h.fmnh", epochs=[10, 20, 50]))
    dot = drawn(figure)["peak: 80.0% at epoch 20"]
    assert (list(dot.get_xdata()), list(dot.get_ydata())) == ([20], [0.8])
    assert "peak: 80.0% at epoch 20" in legend(figure)
    assert texts(figure) == ["peak above final:\n40.0 points\n\nforget fraction\nat the peak:\n60.0%"]
    bar = figure.axes[0].lines[-1]
    assert list(bar.get_ydata()) == [0.4, 0.8]
    assert min(bar.get_xdata()) > 1  # right of the axes


@pytest.mark.parametrize(
    ("correct", "gap"),
    [
        ([[1, 0, 0], [1, 1, 0]], []),  # the last epoch is the peak
        ([[1, 0, 0]], []),
        ([[1]], []),
        ([[0, 0], [0, 0]], []),
        # F_e is largest at epoch 0, accuracy at epoch 1
        (
            [[1, 1, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 0]],
            ["peak above final:\n20.0 points\n\nforget fraction\nat the peak:\n20.0%"],
        ),
        ([[1], [0]], ["peak above final:\n100.0 points\n\nforget fraction\nat the peak:\n100.0%"]),
        ([[1, 0], [0, 1]], ["peak above final:\n0.0 points\n\nforget fraction\nat the peak:\n50.0%"]),  # other samples
    ],
)
def test_figures_of_small_runs(tmp_path, correct, gap):
    figure = plot.curves(np.array(correct, bool), fused=1, student=0)
    figure.savefig(tmp_path / "f.png")
    assert texts(figure) == gap
    assert all(float(tick).is_integer() for tick in figure.axes[0].get_xticks())


@pytest.mark.parametrize("n_right", [(50, 20), (99, 98), (2, 1), (100, 0)])
def test_labels_do_not_lie_over_each_other(n_right):
    from matplotlib.text import Text

    figure = plot.curves([np.arange(100) < n for n in n_right], fused=0.81, student=0.8)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    title = next(t for t in axes.findobj(Text) if t.get_text().startswith("Accuracy"))
    labels = [title, axes.get_legend(), *axes.texts, axes.xaxis.label, axes]
    boxes = [label.get_window_extent() for label in labels]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[i + 1 :])
        assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert 0 <= box.y0 < box.y1 <= figure.bbox.y1


@pytest.mark.parametrize("name", ["fused", "student"])
def test_wrong_levels(name):
    with pytest.raises(ValueError, match=rf"{name}: expected a value in \[0, 1\], got 87.5"):
        plot.curves(FORGETTING, **{name: 87.5})
    with pytest.raises(TypeError, match=f"{name}: expected a number, got str"):
        plot.curves(FORGETTING, **{name: "0.5"})
    with pytest.raises(ValueError, match=name):
        plot.curves(FORGETTING, **{name: float("nan")})


# --- classes ---


def bars(figure):
    """{name: height} of the bars, in their order."""
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_xticklabels()]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    np.testing.assert_allclose(centres, axes.get_xticks())
    return dict(zip(names, [bar.get_height() for bar in axes.patches], strict=True))


def test_class_names():
    y, right = np.array([2, 0, 2, 5, 0]), np.array([[1, 1, 0, 1, 1], [0, 1, 0, 0, 0]], bool)
    figure = plot.per_class(right, y, class_names=["a", "b", "c", "d", "e", "f", "g"])
    assert bars(figure) == {"a": 0.5, "c": 0.5, "f": 1.0}
    assert list(figure.axes[0].lines[0].get_ydata()) == [0.6] * 2
    numbered = plot.per_class(right, y).axes[0].patches
    assert [bar.get_x() + bar.get_width() / 2 for bar in numbered] == [0, 2, 5]
    assert [bar.get_height() for bar in numbered] == [0.5, 0.5, 1.0]


def test_of_many_classes_the_most_forgotten_are_shown(tmp_path, rng):
    y = np.arange(3000) % 1000
    right = np.stack([np.ones(3000, bool), ~((y % 50 == 7) | ((y == 123) & (np.arange(3000) < 1000)))])
    figure = plot.per_class(right, y, class_names=[f"number {i}" for i in range(1000)])
    shown = bars(figure)
    assert len(shown) == plot.CLASSES == 25
    expected = {f"number {i}": 1.0 for i in range(7, 1000, 50)} | {"number 123": 1 / 3}
    assert {name: height for name, height in shown.items() if height} == pytest.approx(expected)
    numbers = [int(name.split()[1]) for name in shown]
    assert numbers == sorted(numbers)
    assert figure.axes[0].get_title("left") == "Most forgotten: 25 of 1,000 classes"
    figure.savefig(tmp_path / "f.png")


def test_long_and_awkward_names(tmp_path):
    names = ["$x^$", "\\bad{", "two\nlines", "half \ud800", "x" * 100_000, "_", " "]
    figure = plot.per_class(np.ones((2, 7), bool), np.arange(7), class_names=names)
    shown = ["$x^$", "\\bad{", "two\N{REPLACEMENT CHARACTER}lines", "half \N{REPLACEMENT CHARACTER}", "x" * 23 + "…"]
    assert list(bars(figure)) == [*shown, "_", "6"]
    figure.savefig(tmp_path / "f.png")  # mathematics between dollar signs would not parse
    axes = figure.axes[0]
    assert axes.get_window_extent().height > 0.3 * figure.bbox.height


def test_named_labels_do_not_lie_over_each_other():
    from matplotlib.transforms import Affine2D

    y = np.arange(25)
    figure = plot.per_class(np.ones((2, 25), bool), y, class_names=["a name that is quite long"] * 25)
    figure.draw_without_rendering()
    labels = figure.axes[0].get_xticklabels()
    upright = Affine2D().rotate_deg(-45)
    places = np.array([upright.transform(label.get_transform().transform(label.get_position())) for label in labels])
    distance = -np.diff(places[:, 1])  # between the baselines of slanted neighbours
    assert distance.min() > labels[0].get_fontsize() * figure.dpi / 72


@pytest.mark.parametrize(
    ("names", "error", "words"),
    [
        (["a"], ValueError, "class_names: expected at least 2 names, got 1"),
        (["a", 1], TypeError, "class_names: expected a list of strings, got list"),
        ("ab", TypeError, "class_names: expected a list of strings, got str"),
    ],
)
def test_wrong_class_names(names, error, words):
    with pytest.raises(error, match=words):
        plot.per_class([[True, True]], [0, 1], class_names=names)


def test_no_text_is_a_formula(rng):
    """matplotlib 3.11 loses 2 kB of memory with each formula that it draws."""
    plan = fmn.FusionPlan.from_weights({0: 0.5, 2: 0.5}, 3)
    answers = rng.random((3, 8, 4)) < 0.5
    seen = fmn.recovery(FORGETTING, {"KF": [0, 1, 1, 1, 0]}, [1] * 5)
    figures = [plot.curves(FORGETTING), plot.matrix(FORGETTING), plot.plan_weights(plan), plot.last_correct(FORGETTING)]
    for figure in [*figures, plot.per_class(FORGETTING, range(5)), plot.recovery(seen), plot.pass_at_k(answers)]:
        figure.draw_without_rendering()  # makes the labels of the ticks
        words = [text.get_text() for text in figure.findobj(Text)]
        assert any(words)
        assert not [text for text in words if "$" in text]


def test_public_name():
    assert fmn.plot is plot
