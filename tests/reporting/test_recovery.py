"""Forgotten and recovered samples, counted one by one in a loop."""

import csv
import io

import numpy as np
import pytest
from inputs import history_of, random_probs

import fmn_ref as fmn


def by_hand(correct, right, inside):
    """The counts of one predictor over the samples `inside`, one after the other."""
    n = dict.fromkeys(("samples", "final", "forgotten", "recovered", "new", "lost", "right"), 0)
    for i in inside:
        known = any(row[i] for row in correct)
        final = correct[-1][i]
        n["samples"] += 1
        n["final"] += final
        n["forgotten"] += known and not final
        n["recovered"] += known and not final and right[i]
        n["new"] += not known and right[i]
        n["lost"] += final and not right[i]
        n["right"] += right[i]
    return n


@pytest.fixture
def data(rng):
    """(history, labels, predictions, right) of hard samples: some are never learned, most are forgotten."""
    p, labels = random_probs(rng, n_epochs=3, n_samples=200)
    scores = random_probs(rng, n_epochs=1, n_samples=200)[0][0]
    predictions = {"fused": p.mean(0), "student": scores, "classes": p[0].argmax(1), "final_again": p[-1]}
    right = {name: (p.argmax(1) if p.ndim == 2 else p) == labels for name, p in predictions.items()}
    return fmn.correctness(p, labels), labels, predictions, right


def test_counts_against_a_loop(data):
    correct, labels, predictions, right = data
    r = fmn.recovery(correct, predictions, labels, groups=labels)
    assert isinstance(r, fmn.Recovery)
    total = r.counts()
    assert list(total) == list(predictions)
    for name in predictions:
        assert total[name] == by_hand(correct.tolist(), right[name].tolist(), range(200))
        for group in range(5):
            inside = np.flatnonzero(labels == group)
            assert r.counts(group)[name] == by_hand(correct.tolist(), right[name].tolist(), inside)
    assert min(total["student"].values()) > 0  # nothing above was trivial
    assert total["final_again"]["recovered"] == total["final_again"]["new"] == total["final_again"]["lost"] == 0


def test_what_is_gained_and_lost_adds_up(data):
    correct, labels, predictions, _ = data
    r = fmn.recovery(correct, predictions, labels, groups=labels % 3)
    for group in (None, 0, 1, 2):
        for n in r.counts(group).values():
            assert n["final"] + n["new"] + n["recovered"] - n["lost"] == n["right"]
    for name, total in r.counts().items():
        parts = [r.counts(group)[name] for group in range(3)]
        assert {key: sum(part[key] for part in parts) for key in total} == total
    assert set(r.counts(7)["fused"].values()) == {0}


def test_kinds_of_histories(data):
    correct, labels, predictions, _ = data
    history = history_of(correct, labels=labels)
    expected = fmn.recovery(correct, predictions, labels).counts()
    for given in (history, correct.astype(int), correct.tolist()):
        assert fmn.recovery(given, predictions, labels).counts() == expected
    assert fmn.recovery(correct[-1:], predictions, labels).counts()["fused"]["forgotten"] == 0
    with pytest.raises(ValueError, match=r"correct.*other labels"):
        fmn.recovery(history, predictions, labels[::-1])


def test_markdown(data):
    correct, labels, predictions, _ = data
    head, _, *rows = fmn.recovery(correct, predictions, labels).to_markdown().splitlines()
    names = [c.strip() for c in head.strip("|").split("|")]
    assert len(rows) == 4
    n = fmn.recovery(correct, predictions, labels).counts()["fused"]
    assert rows[0] == f"| fused | {' | '.join(str(n[c]) for c in names[1:])} |"
    r = fmn.recovery(correct, predictions, labels, groups=labels)
    head, _, *rows = r.to_markdown().splitlines()
    assert len(rows) == 4 * (1 + 5)
    assert rows[0].startswith("| fused | all | 200 |")
    assert rows[7].startswith(f"| student | 0 | {(labels == 0).sum()} |")


def test_csv_is_keyed_by_the_ids(data):
    correct, labels, predictions, right = data
    ids = [f'img "{i}", left' for i in range(200)]
    r = fmn.recovery(correct, predictions, labels, groups=labels, sample_ids=ids)
    rows = list(csv.DictReader(io.StringIO(r.to_csv())))
    assert list(rows[0]) == ["sample_id", "group", "final", "forgotten", *predictions]
    assert [row["sample_id"] for row in rows] == ids
    assert [int(row["group"]) for row in rows] == labels.tolist()
    assert [row["final"] == "1" for row in rows] == correct[-1].tolist()
    assert [row["forgotten"] == "1" for row in rows] == (correct.any(0) & ~correct[-1]).tolist()
    for name in predictions:
        assert [row[name] == "1" for row in rows] == right[name].tolist()
    plain = fmn.recovery(correct, predictions, labels).to_csv().splitlines()
    assert plain[0].startswith("sample_id,final,")
    assert [line.split(",")[0] for line in plain[1:]] == [str(i) for i in range(200)]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"predictions": {"fused": [0, 1]}}, ValueError, "3 samples|labels|fused"),
        ({"predictions": {"fused": [[0, 1, 1], [0, 1, 1]]}}, ValueError, "fused.*one prediction per sample"),
        ({"predictions": {"fused": [0.5, 0.5, 0.5]}}, ValueError, "shape"),
        ({"predictions": {"fused": np.zeros((3, 1))}}, ValueError, "labels"),
        ({"predictions": [[0, 1, 1]]}, TypeError, "predictions"),
        ({"predictions": {"final": [0, 1, 1]}}, ValueError, "'final'"),
        ({"predictions": {"sample_id": [0, 1, 1]}}, ValueError, "'sample_id'"),
        ({"labels": [0, 1]}, ValueError, "labels"),
        ({"labels": [0, 1, -1]}, ValueError, "labels"),
        ({"groups": [0, 1]}, ValueError, "groups"),
        ({"groups": [0.5, 1, 1]}, TypeError, "groups"),
        ({"sample_ids": ["a"]}, ValueError, "sample_ids: expected 3, got 1"),
        ({"correct": [[0, 1, 2]]}, ValueError, "correct"),
        ({"correct": [0, 1, 1]}, ValueError, "correct"),
        ({"correct": np.zeros((0, 3), bool)}, ValueError, "correct"),
    ],
)
def test_bad_input(change, error, words):
    given = {"correct": [[1, 1, 0], [1, 0, 0]], "predictions": {"fused": [0, 1, 0]}, "labels": [0, 1, 1]}
    assert fmn.recovery(**given).counts()["fused"]["recovered"] == 1
    with pytest.raises(error, match=words):
        fmn.recovery(**given | change)


def test_a_group_without_groups():
    r = fmn.recovery([[1, 0]], {"fused": [0, 1]}, [0, 1])
    with pytest.raises(ValueError, match="groups"):
        r.counts(1)
