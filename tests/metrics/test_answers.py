"""Metrics of graded answers equal their mean over all possible draws."""

import itertools
from collections import Counter

import numpy as np
import pytest

import fmn_ref as fmn
from fmn_ref.metrics import answers as module

FIELDS = ("accuracy", "forget", "learned", "retained")


@pytest.fixture
def draws(rng):
    """(n_checkpoints, n_questions, n_draws); some questions are never or always right."""
    correct = rng.random((3, 7, 4)) < rng.random((3, 7, 1))
    correct[:, 0], correct[:, 1], correct[0, 2], correct[2, 2] = 0, 1, 1, 0
    return correct


def one_draw_each(correct):
    """Every choice of one draw per checkpoint, as a bool matrix: the same for all questions, as the mean is linear."""
    for choice in itertools.product(range(correct.shape[2]), repeat=len(correct)):
        yield np.stack([rows[:, d] for rows, d in zip(correct, choice, strict=True)])


class TestExpectedCurves:
    @pytest.mark.parametrize("reference", [-1, 0, 1])
    def test_they_are_the_mean_over_all_draws(self, draws, reference):
        found = fmn.expected_curves(draws.mean(-1), reference=reference)
        each = [fmn.forgetting_curves(bits, reference=reference) for bits in one_draw_each(draws)]
        for field in FIELDS:
            np.testing.assert_allclose(getattr(found, field), np.mean([getattr(c, field) for c in each], 0), atol=1e-12)

    def test_groups_and_weights(self, draws, rng):
        groups, weight = ["a", "b", "a", "a", "b", "a", "b"], rng.random(7)
        found = fmn.expected_curves(draws.mean(-1), groups=groups, sample_weight=weight)
        each = [fmn.forgetting_curves(b, groups=groups, sample_weight=weight) for b in one_draw_each(draws)]
        for field in FIELDS:
            np.testing.assert_allclose(getattr(found, field), np.mean([getattr(c, field) for c in each], 0), atol=1e-12)
        assert found.groups.tolist() == ["a", "b"]

    @pytest.mark.parametrize("options", [{}, {"groups": [0, 1, 1, 0, 2, 2, 0]}, {"sample_weight": np.arange(7.0)}])
    def test_rates_of_0_and_1_are_bits(self, draws, options):
        bits = draws[:, :, 0]
        found, expected = fmn.expected_curves(bits, **options), fmn.forgetting_curves(bits, **options)
        np.testing.assert_allclose(found.counts, expected.counts, atol=1e-12)
        np.testing.assert_array_equal(found.total, expected.total)
        np.testing.assert_array_equal(found.n_samples, expected.n_samples)
        assert (found.reference, found.total.dtype if options else type(found.total)) == (
            expected.reference,
            expected.total.dtype if options else type(expected.total),
        )

    def test_few_draws_give_the_value_of_many_on_average(self, rng):
        """Over all pairs of five draws, at each checkpoint: unbiased, the row of the reference too."""
        many = rng.random((2, 1, 5)) < 0.5
        many[:, 0, :2] = [0, 1]
        pairs = list(itertools.combinations(range(5), 2))
        few = [
            fmn.expected_curves(np.stack([many[0][:, a], many[1][:, b]]).mean(-1), n_draws=2)
            for a in map(list, pairs)
            for b in map(list, pairs)
        ]
        expected = fmn.expected_curves(many.mean(-1), n_draws=5)
        for field in FIELDS:
            np.testing.assert_allclose(np.mean([getattr(c, field) for c in few], 0), getattr(expected, field))

    def test_the_row_of_the_reference_compares_two_of_its_draws(self, draws):
        found = fmn.expected_curves(draws.mean(-1), n_draws=4)
        pairs = [draws[-1, :, [a, b]] for a, b in itertools.permutations(range(4), 2)]
        each = [fmn.forgetting_curves(pair) for pair in pairs]
        for field in FIELDS:
            np.testing.assert_allclose(getattr(found, field)[-1], np.mean([getattr(c, field)[0] for c in each]))

    @pytest.mark.parametrize(
        ("rates", "options", "words"),
        [
            ([[0.5, 1.2]], {}, r"rates: .*\[0, 1\], got 1.2 at index \(0, 1\)"),
            ([[0.5], [np.nan]], {}, r"rates: .*got nan at index \(1, 0\)"),
            ([[-1]], {}, r"rates: .*got -1.0"),
            ([0.5, 1], {}, r"rates: .*got shape \(2,\)$"),
            (np.zeros((2, 3, 4)), {}, r"rates: .*correct.mean\(-1\)"),
            (np.zeros((0, 3)), {}, r"rates: .*not empty, got shape \(0, 3\)$"),
            ([["a"]], {}, "rates: .*booleans or numbers"),
            ([[0.5]], {"n_draws": 1}, "n_draws"),
            ([[0.5]], {"n_draws": 2.0}, "n_draws"),
            ([[0.5]], {"reference": 1}, "reference"),
            ([[0.5]], {"groups": [1, 2]}, "groups"),
            ([[0.5]], {"sample_weight": [-1]}, "sample_weight"),
        ],
    )
    def test_bad_rates(self, rates, options, words):
        error = TypeError if "numbers" in words or options == {"n_draws": 2.0} else ValueError
        with pytest.raises(error, match=f"^{words}"):
            fmn.expected_curves(rates, **options)


class TestChanceCorrection:
    def test_the_formula_of_the_paper(self):
        """As its authors' create_csv.py computes it: forgetting - (1 - before) (1 - after) / (choices - 1), clipped."""
        bits = np.array([[1, 1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]])
        forget, learned = fmn.forgetting_curves(bits).chance_corrected(4)
        np.testing.assert_allclose(forget, [0.2 - 0.5 * 0.6 / 3, 0])
        np.testing.assert_allclose(learned, [0, 0], atol=1e-12)  # 0.1 - 0.1
        np.testing.assert_array_equal(fmn.forgetting_curves(bits).chance_corrected(np.uint8(4))[0], forget)

    @pytest.mark.parametrize("k", [2, 4, 10])
    def test_guessing_forgets_nothing(self, k):
        forget, learned = fmn.expected_curves(np.full((3, 5), 1 / k)).chance_corrected(k)
        np.testing.assert_allclose([forget, learned], 0, atol=1e-12)

    def test_each_group_has_its_number_of_options(self, rng):
        bits, n_choices = rng.random((4, 60)) < 0.6, np.repeat([0, 2, 5], 20)
        curves = fmn.forgetting_curves(bits, groups=n_choices)
        forget, learned = curves.chance_corrected(curves.groups)
        for i, k in enumerate((0, 2, 5)):
            of_group = fmn.forgetting_curves(bits[:, n_choices == k])
            expected = of_group.chance_corrected(k) if k else (of_group.forget, of_group.learned)
            np.testing.assert_allclose((forget[i], learned[i]), expected)

    @pytest.mark.parametrize(
        ("k", "error", "words"),
        [
            (1, ValueError, "n_choices: .* got 1"),
            (-2, ValueError, "n_choices: .* got -2"),
            (2.0, TypeError, "n_choices: .*float64"),
            ("a", TypeError, "n_choices: "),
            ([4, 4], ValueError, r"n_choices: .* one number or shape \(\), got \[4, 4\]"),
        ],
    )
    def test_bad_numbers_of_options(self, k, error, words):
        with pytest.raises(error, match=f"^{words}"):
            fmn.forgetting_curves([[1, 0]]).chance_corrected(k)
        with pytest.raises(error, match=r"^n_choices: .*(shape \(1,\)|integers|numbers), got"):
            fmn.forgetting_curves([[1, 0]], groups=[3, 3]).chance_corrected(k)


class TestTemporalForgetting:
    def test_it_is_the_mean_over_all_draws(self, draws):
        each = [fmn.sample_statistics(bits) for bits in one_draw_each(draws)]
        ever, score, of_errors = fmn.temporal_forgetting(draws.mean(-1))
        assert ever == pytest.approx(np.mean([s.correctness > 0 for s in each]))
        assert score == pytest.approx(np.mean([s.forgotten for s in each]))
        assert of_errors == pytest.approx(score / (1 - draws[-1].mean()))

    def test_without_errors_there_is_no_share_of_them(self):
        ever, score, of_errors = fmn.temporal_forgetting([[True, False], [True, True]])
        assert (ever, score) == (1, 0)
        assert np.isnan(of_errors)


def all_draws(n_draws, budget):
    """Every choice of `budget[e]` of the draws of each checkpoint."""
    return itertools.product(*(itertools.combinations(range(n_draws), k) for k in budget))


BUDGETS = [(1, 1, [0, 0, 1]), (3, 1, [0, 0, 3]), (3, 2, [0, 1, 2]), (5, 3, [1, 2, 2]), (12, 3, [4, 4, 4])]
BUDGETS += [([2, 0, 1], 1, [2, 0, 1]), (1, 3, [0, 0, 1]), ([0, 0, 4], 1, [0, 0, 4])]


class TestPassAtK:
    @pytest.mark.parametrize(("k", "last", "budget"), BUDGETS)
    def test_it_is_the_mean_over_all_draws(self, draws, k, last, budget):
        found = fmn.pass_at_k(draws, k, last=last)
        for i in range(draws.shape[1]):
            each = [any(draws[e, i, d] for e, ds in enumerate(c) for d in ds) for c in all_draws(4, budget)]
            assert found[i] == pytest.approx(np.mean(each))

    def test_the_last_checkpoint_alone_counts_by_default(self, draws):
        np.testing.assert_array_equal(fmn.pass_at_k(draws, 2), fmn.pass_at_k(draws[-1:], 2))
        np.testing.assert_array_equal(fmn.maj_at_k(draws, draws, 3), fmn.maj_at_k(draws[-1:], draws[-1:], 3))

    def test_many_draws_neither_overflow_nor_underflow(self):
        correct = np.zeros((1, 1, 2000), bool)
        correct[..., :7] = True
        expected = 1 - np.prod([(1993 - i) / (2000 - i) for i in range(500)])
        assert fmn.pass_at_k(correct, 500)[0] == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("k", "last", "words"),
        [
            (0, 1, "k: .*1, 4"),
            (5, 1, "k: .*1, 4"),
            (13, 3, "k: .*1, 12"),
            (2.0, 1, "k"),
            (True, 1, "k"),
            (2, 4, "last"),
            (2, 0, "last"),
            ([1, 2], 1, "k: expected 3"),
            ([0, 0, 0], 1, "k: expected 0 to 4"),
            ([0, 5, 0], 1, "k: expected 0 to 4"),
            ([0, -1, 2], 1, "k: "),
            ([0.0, 1.0, 2.0], 1, "k: "),
        ],
    )
    def test_bad_budgets(self, draws, k, last, words):
        error = TypeError if k is True or np.asarray(k).dtype.kind == "f" else ValueError
        for function in (fmn.pass_at_k, lambda *a, **o: fmn.maj_at_k(draws, *a, **o)):
            with pytest.raises(error, match=f"^{words}"):
                function(draws, k, last=last)

    @pytest.mark.parametrize(
        ("correct", "words"),
        [
            ([[1, 0]], r"correct\[..., None\]"),
            ([[[1, 2]]], "expected 0 and 1"),
            ([[[0.5]]], "float64"),
            (np.zeros((2, 0, 3), int), "not empty"),
        ],
    )
    def test_bad_draws(self, correct, words):
        with pytest.raises((ValueError, TypeError), match=f"^correct: .*{words}"):
            fmn.pass_at_k(correct, 1)


def most_common(answers):
    return Counter(answers).most_common(1)[0][0]  # of equally frequent ones the first, as lm-evaluation-harness does


class TestMajAtK:
    @pytest.fixture
    def answers(self, rng, draws):
        """Right answers are 0 or 1, wrong ones 2 to 4."""
        return np.where(draws, rng.integers(0, 2, draws.shape), rng.integers(2, 5, draws.shape))

    @pytest.mark.parametrize(("k", "last", "budget"), [b for b in BUDGETS if b[0] != 12])
    def test_it_is_the_mean_over_all_draws_in_every_order(self, draws, answers, k, last, budget):
        found = fmn.maj_at_k(answers, draws, k, last=last)
        for i in (0, 2, 5):
            each = []
            for chosen in all_draws(4, budget):
                drawn = [answers[e, i, d] for e, ds in enumerate(chosen) for d in ds]
                each.append(np.mean([most_common(order) < 2 for order in itertools.permutations(drawn)]))
            assert found[i] == pytest.approx(np.mean(each))

    def test_strings_and_numbers_are_the_same(self, draws, answers):
        expected = fmn.maj_at_k(answers, draws, 4, last=2)
        np.testing.assert_array_equal(fmn.maj_at_k(answers.astype(str), draws, 4, last=2), expected)

    def test_random_draws_come_close_where_there_are_too_many(self, draws, answers, monkeypatch):
        exact = fmn.maj_at_k(answers, draws, 5, last=3)
        assert 0.1 < exact[3] < 0.9
        monkeypatch.setattr(module, "EXACT", 0)
        sampled = fmn.maj_at_k(answers, draws, 5, last=3, seed=1)
        np.testing.assert_allclose(sampled, exact, atol=4 * 0.5 / np.sqrt(module.SAMPLES))
        assert not np.array_equal(sampled, exact)
        np.testing.assert_array_equal(fmn.maj_at_k(answers, draws, 5, last=3, seed=1), sampled)
        unseeded = fmn.maj_at_k(answers, draws, 5, last=3)
        np.testing.assert_array_equal(fmn.maj_at_k(answers, draws, 5, last=3, seed=0), unseeded)
        assert fmn.maj_at_k(answers, draws, 5, last=3, seed=2**64).shape == (7,)

    def test_up_to_20000_ways_are_enumerated_and_more_are_sampled_4096_times(self):
        """Ways of counting the votes: one more than each answer's number, multiplied."""

        def shares(numbers, k):
            answers = np.repeat(np.arange(len(numbers)), numbers)[None, None]
            return [float(fmn.maj_at_k(answers, answers == len(numbers) - 1, k, seed=seed)[0]) for seed in (0, 1)]

        exact = shares([1] * 5 + [4] * 4, 5)  # 2^5 * 5^4
        assert exact[0] == exact[1]
        sampled = shares([143, 143], 143)  # 144^2 = 20 736
        assert sampled[0] != sampled[1]
        assert all((4096 * share).is_integer() for share in sampled)

    def test_many_draws_take_no_longer(self, rng):
        """64 draws from each of eight checkpoints, most answers different: 10^100 ways to draw 64 of them."""
        correct = rng.random((8, 3, 64)) < 0.3
        answers = np.where(correct, -1, rng.integers(0, 1000, correct.shape))
        assert fmn.maj_at_k(answers, correct, 64, last=8).tolist() == [1, 1, 1]

    def test_an_answer_is_right_or_wrong(self):
        with pytest.raises(ValueError, match=r"^correct: question 1 has the answer 7 both right and wrong"):
            fmn.maj_at_k([[[1, 2], [7, 7]]], [[[0, 1], [0, 1]]], 1)

    def test_bad_seeds(self, draws):
        for bad, error in ((-1, ValueError), (2**64 + 1, ValueError), (None, TypeError), (0.5, TypeError)):
            with pytest.raises(error, match=r"^seed"):
                fmn.maj_at_k(draws, draws, 1, seed=bad)

    def test_bad_answers(self, draws):
        for bad, error in (
            (np.zeros(draws.shape), TypeError),
            (np.zeros((3, 7), int), ValueError),
            (np.full(draws.shape, None), TypeError),
        ):
            with pytest.raises(error, match=r"^answers"):
                fmn.maj_at_k(bad, draws, 1)
