"""Files of lm-evaluation-harness give the harness's own numbers; broken or ambiguous ones are refused by name."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import fmn_ref as fmn
from fmn_ref.cli import main

DATA = Path(__file__).parents[1] / "data" / "lm_eval"
RESULTS = json.loads((DATA / "results.json").read_text())["results"]
CHECKPOINTS = ["checkpoint-100", "checkpoint-200", "checkpoint-1000"]


@pytest.fixture
def out(tmp_path):
    """A copy to damage."""
    return shutil.copytree(DATA, tmp_path / "out")


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def samples(folder, task):
    return next(folder.rglob(f"samples_{task}_*.jsonl"))


def change(folder, task="sums_choice", line=1, **values):
    """Replace values of one line of a checkpoint's samples; None deletes one."""
    path = samples(folder, task)
    lines = lines_of(path)
    lines[line] = {k: v for k, v in {**lines[line], **values}.items() if v is not None}
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")


def write(folder, task="t", date="2026-01-01T00-00-00.000001", **values):
    """Answers to one open question, as the harness writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    line = {
        "doc_id": 0,
        "doc": {},
        "target": "4",
        "arguments": {"gen_args_0": {"arg_0": "2+2=", "arg_1": {"until": []}}},
    }
    line |= {
        "resps": [["4"]],
        "filtered_resps": ["4"],
        "filter": "none",
        "metrics": ["exact_match"],
        "exact_match": 1.0,
    }
    path = folder / f"samples_{task}_{date}.jsonl"
    path.write_text(json.dumps({**line, **values}) + "\n")
    return path


class TestWhatTheHarnessWrote:
    @pytest.mark.parametrize(
        ("task", "metric", "kept"),
        [
            ("sums_choice", "acc", "none"),
            ("sums_choice", "acc_norm", "none"),
            ("sums_draws", "exact_match", "draws"),
            ("sums_draws", "exact_match", "maj"),
        ],
    )
    def test_means_are_those_of_its_aggregation(self, task, metric, kept):
        graded = fmn.from_lm_eval(DATA, task=task, metric=metric, filter=kept)
        assert graded.checkpoints == CHECKPOINTS
        expected = [RESULTS[name][task][f"{metric},{kept}"] for name in CHECKPOINTS]
        np.testing.assert_allclose(graded.rates.mean(1), expected, atol=1e-12)
        np.testing.assert_allclose(fmn.expected_curves(graded.rates).accuracy, expected, atol=1e-12)
        np.testing.assert_allclose(fmn.pass_at_k(graded.correct, 1).mean(), expected[-1], atol=1e-12)

    def test_multiple_choice(self):
        graded = fmn.from_lm_eval(DATA, task="sums_choice", metric="acc")
        assert graded.correct.shape == (3, 6, 1)
        assert graded.correct.dtype == bool
        assert graded.n_choices.tolist() == [4] * 6
        assert graded.answers is None
        assert graded.sample_ids == [f"sums_choice/{i}" for i in range(6)]
        bits = [[line["acc"] for line in lines_of(samples(DATA / name, "sums_choice"))] for name in CHECKPOINTS]
        np.testing.assert_array_equal(
            fmn.forgetting_matrix(graded.correct[..., 0]), fmn.forgetting_matrix(np.int64(bits))
        )

    def test_draws_and_their_answers(self):
        graded = fmn.from_lm_eval(DATA, task="sums_draws", filter="draws")
        assert graded.correct.shape == graded.answers.shape == (3, 6, 5)
        assert graded.n_choices.tolist() == [0] * 6
        for e, name in enumerate(CHECKPOINTS):
            for line in lines_of(samples(DATA / name, "sums_draws")):
                if line["filter"] == "draws":
                    (drawn,), i = line["filtered_resps"], line["doc_id"]
                    assert graded.correct[e, i].tolist() == [text == line["target"] for text in drawn]
                    same = graded.answers[e, i][:, None] == graded.answers[e, i]
                    assert same.tolist() == [[a == b for b in drawn] for a in drawn]

    def test_the_majority_of_all_draws_is_the_one_that_it_found(self):
        graded = fmn.from_lm_eval(DATA, task="sums_draws", filter="draws")
        voted = fmn.from_lm_eval(DATA, task="sums_draws", filter="maj").correct[..., 0]
        clear = 0
        for e in range(3):
            found = fmn.maj_at_k(graded.answers, graded.correct, [5 * (row == e) for row in range(3)])
            for i in range(6):
                (_, most), *others = Counter(graded.answers[e, i].tolist()).most_common(2)
                if (
                    not others or most > others[0][1]
                ):  # a tie goes to the first draw there, to each with one chance here
                    assert found[i] == voted[e, i]
                    clear += 1
        assert clear > 10

    def test_questions_of_several_tasks(self, out):
        for name in CHECKPOINTS:
            shutil.copy(samples(out / name, "sums_choice"), out / name / "samples_a_10_2026-01-01T00-00-00.jsonl")
            shutil.copy(samples(out / name, "sums_choice"), out / name / "samples_a_9_2026-01-01T00-00-00.jsonl")
        graded = fmn.from_lm_eval(out, task="a_*", metric="acc")
        assert graded.sample_ids == [f"{task}/{i}" for task in ("a_9", "a_10") for i in range(6)]
        curves = fmn.expected_curves(graded.rates, groups=graded.tasks)
        np.testing.assert_array_equal(curves.forget[0], curves.forget[1])


class TestFolders:
    def test_a_thousand_comes_after_two_hundred(self, out):
        expected = fmn.from_lm_eval(out, task="sums_choice", metric="acc")
        for given in (sorted(map(str, out.glob("check*"))), [out / name for name in reversed(CHECKPOINTS)]):
            found = fmn.from_lm_eval(given, task="sums_choice", metric="acc")
            assert found.checkpoints == CHECKPOINTS
            np.testing.assert_array_equal(found.correct, expected.correct)

    def test_another_name_keeps_its_place(self, out):
        shutil.copytree(out / "checkpoint-1000", out / "base")
        given = [out / name for name in ("base", "checkpoint-1000", "checkpoint-200")]
        assert fmn.from_lm_eval(given, task="sums_choice", metric="acc").checkpoints == [
            "base",
            "checkpoint-200",
            "checkpoint-1000",
        ]

    def test_two_series_of_numbers(self, out):
        names = ["warm-2", "tune-20", "tune-3", "warm-1"]
        for name in names:
            shutil.copytree(out / "checkpoint-100", out / name)
        found = fmn.from_lm_eval([out / name for name in names], task="sums_choice", metric="acc")
        assert found.checkpoints == ["warm-1", "tune-3", "tune-20", "warm-2"]

    def test_the_folders_that_the_harness_adds(self, out, tmp_path):
        for name in CHECKPOINTS:
            (tmp_path / "deep" / name).mkdir(parents=True)
            (out / name).rename(tmp_path / "deep" / name / "org__model")
        assert fmn.from_lm_eval(tmp_path / "deep", task="sums_choice", metric="acc").checkpoints == CHECKPOINTS
        for name in CHECKPOINTS:  # one level more, where the first parts are the same
            (tmp_path / "more" / "a" / name).mkdir(parents=True)
            (tmp_path / "deep" / name / "org__model").rename(tmp_path / "more" / "a" / name / "x")
        shutil.copytree(tmp_path / "more" / "a", tmp_path / "more" / "b")
        names = fmn.from_lm_eval(tmp_path / "more", task="sums_choice", metric="acc").checkpoints
        assert names == [f"{top}/{name}/x" for top in "ab" for name in CHECKPOINTS]

    def test_one_checkpoint(self, out):
        graded = fmn.from_lm_eval(out / "checkpoint-100", task="sums_draws", filter="draws")
        assert graded.checkpoints == ["checkpoint-100"]
        assert fmn.pass_at_k(graded.correct, 5).mean() >= graded.rates.mean()

    def test_each_folder_needs_samples(self, out):
        (out / "empty").mkdir()
        for bad in (out / "empty", out / "none", out / "results.json"):
            with pytest.raises(FileNotFoundError, match=rf"{bad.name}: no samples_\*\.jsonl"):
                fmn.from_lm_eval([out / "checkpoint-100", bad])
        with pytest.raises(FileNotFoundError, match="task like 'gsm8k', but sums_choice, sums_draws"):
            fmn.from_lm_eval(out, task="gsm8k")
        for bad in ([], None, [out, 5]):
            with pytest.raises((ValueError, TypeError), match="folders: expected"):
                fmn.from_lm_eval(bad, task="sums_choice")

    def test_links_in_circles_end(self, out):
        (out / "checkpoint-100" / "loop").symlink_to(out, target_is_directory=True)
        assert fmn.from_lm_eval(out, task="sums_choice", metric="acc").checkpoints == CHECKPOINTS


class TestDraws:
    def test_further_runs_in_a_folder_are_draws(self, tmp_path):
        for step, grades in ((1, "101"), (2, "001")):
            for i, grade in enumerate(grades):
                date = f"2026-01-0{i + 1}T00-00-00.000001"
                text = "4" if grade == "1" else "5"
                write(tmp_path / f"step-{step}", date=date, filtered_resps=[text], exact_match=float(grade))
        graded = fmn.from_lm_eval(tmp_path)
        assert graded.correct.tolist() == [[[True, False, True]], [[False, False, True]]]
        assert np.array_equal(graded.answers == graded.answers[0, 0, 0], graded.correct)

    def test_runs_of_two_models_in_one_folder_are_refused(self, tmp_path):
        """The harness names the folder after the model, without its revision."""
        dates = [f"2026-01-0{i}T00-00-00.000001" for i in (1, 2)]
        for date, args in zip(dates, ("pretrained=p,revision=step1", "pretrained=p,revision=step2"), strict=True):
            write(tmp_path / "p", date=date)
            (tmp_path / "p" / f"results_{date}.json").write_text(json.dumps({"config": {"model_args": args}}))
        with pytest.raises(ValueError, match=r"p: expected one model, .*step1.*step2"):
            fmn.from_lm_eval(tmp_path)
        for seed, date in enumerate(dates):
            args = {"pretrained": "p", "seed": seed}
            (tmp_path / "p" / f"results_{date}.json").write_text(json.dumps({"config": {"model_args": args}}))
        assert fmn.from_lm_eval(tmp_path).correct.shape == (1, 1, 2)

    def test_a_list_of_grades(self, tmp_path):
        write(tmp_path, filtered_resps=[["4", "4.0", "5"]], exact_match=[1, True, 0.0])
        graded = fmn.from_lm_eval(tmp_path)
        assert graded.correct.tolist() == [[[True, True, False]]]
        assert len(set(graded.answers.ravel().tolist())) == 3

    @pytest.mark.parametrize(("drawn", "share"), [(["4", "4.0", "5"], 2 / 3), (["5", "4"], 1.0), (["5", "4"], 0.0)])
    def test_answers_that_do_not_explain_the_grade(self, tmp_path, drawn, share):
        """Graded by other rules than equality: known only if all are right, or all wrong."""
        write(tmp_path, filtered_resps=[drawn], exact_match=share)
        graded = fmn.from_lm_eval(tmp_path)
        assert graded.rates.tolist() == [[share]]
        assert (graded.answers is None) == (0 < share < 1)

    def test_numbers_of_draws_must_agree(self, out):
        change(out / "checkpoint-200", "sums_draws", 0, filtered_resps=[["1", "1"]], exact_match=1.0)
        with pytest.raises(
            ValueError, match="checkpoint-200: expected 5 draws as of the others, got 2 draws of question"
        ):
            fmn.from_lm_eval(out, task="sums_draws", filter="draws")


class TestOtherForms:
    def test_older_files(self, out):
        """Without names of filters and metrics, without hashes, with lists of arguments, without a date in the name."""
        expected = fmn.from_lm_eval(out, task="sums_choice", metric="acc")
        for name in CHECKPOINTS:
            path = samples(out / name, "sums_choice")
            lines = lines_of(path)
            for line in lines:
                line["arguments"] = [list(a.values()) for a in line["arguments"].values()]
                for key in ("filter", "metrics", "doc_hash", "prompt_hash", "target_hash"):
                    del line[key]
            path.unlink()
            old = out / name / "samples_sums_choice.jsonl"
            old.write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = fmn.from_lm_eval(out, task="sums_choice", metric="acc")
        np.testing.assert_array_equal(found.correct, expected.correct)
        assert found.n_choices.tolist() == expected.n_choices.tolist()

    def test_the_order_of_the_lines_does_not_matter(self, out):
        expected = fmn.from_lm_eval(out, task="sums_choice", metric="acc")
        path = samples(out / "checkpoint-200", "sums_choice")
        path.write_text("".join(line + "\n" for line in reversed(path.read_text().splitlines())))
        np.testing.assert_array_equal(fmn.from_lm_eval(out, task="sums_choice", metric="acc").correct, expected.correct)

    def test_one_loglikelihood_is_an_open_question(self, tmp_path):
        """As of lambada: its response is a list of two, which are no draws."""
        request = {"gen_args_0": {"arg_0": "the", "arg_1": " end"}}
        write(tmp_path, arguments=request, filtered_resps=[["-1.5", "True"]], metrics=["acc"], acc=1)
        graded = fmn.from_lm_eval(tmp_path)
        assert (graded.correct.tolist(), graded.n_choices.tolist()) == ([[[True]]], [0])

    def test_mutual_information_asks_twice(self, tmp_path):
        request = {f"gen_args_{i}": {"arg_0": "a", "arg_1": " b"} for i in range(8)}
        write(
            tmp_path, arguments=request, filtered_resps=[["-1", "True"]] * 8, metrics=["acc"], acc=1, acc_mutual_info=1
        )
        assert fmn.from_lm_eval(tmp_path).n_choices.tolist() == [4]

    def test_any_text_is_an_answer(self, tmp_path):
        drawn = ["\ud800", "ü", "a\u2028b", "", "x" * 100_000]
        write(tmp_path, filtered_resps=[drawn], exact_match=0.0)
        assert len(set(fmn.from_lm_eval(tmp_path).answers.ravel().tolist())) == 5


class TestRefused:
    def test_a_choice_is_the_users(self, out):
        for options, words in (
            ({"task": "sums_choice"}, r"metric: choose one of 'acc', 'acc_norm', got None"),
            ({"task": "sums_choice", "metric": "f1"}, r"metric: choose one of .*got 'f1'"),
            ({"task": "sums_draws"}, r"filter: choose one of 'draws', 'maj', got None"),
            ({"task": "sums_draws", "filter": "x"}, r"filter: .*got 'x'"),
        ):
            with pytest.raises(ValueError, match=rf"samples_sums_\w+\.jsonl.*{words}".replace(r"\w+\.", r"[\w.-]+\.")):
                fmn.from_lm_eval(out, **options)

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"acc": 0.5}, "share of 1 draws that is right, got 0.5"),
            ({"acc": float("nan")}, "got nan"),
            ({"acc": -1}, "got -1"),
            ({"acc": 10**400}, "expected the share"),
            ({"acc": "1.0"}, "got '1.0'"),
            ({"acc": [0, 2]}, "grades 0 and 1"),
            ({"acc": []}, "grades 0 and 1"),
            ({"acc": {}}, "expected the share"),
            ({"acc": None}, "missing 'acc'"),
            ({"doc_id": "1"}, "doc_id.*'1'"),
            ({"doc_id": True}, "doc_id.*True"),
            ({"doc_id": 0}, "each once, got 0"),
            ({"doc_id": None}, "missing 'doc_id'"),
            ({"arguments": None}, "missing 'arguments'"),
            ({"arguments": {}}, "index"),
            ({"filtered_resps": []}, "index"),
            ({"metrics": ["pass@8"], "pass@8": 1}, "choose one of 'pass@8'"),
            ({"filter": ["none"]}, "unhashable"),
        ],
        ids=str,
    )
    def test_a_bad_line_is_named(self, out, values, words):
        change(out / "checkpoint-200", line=1, **values)
        with pytest.raises(ValueError, match=rf"samples_sums_choice_.*\.jsonl:2: not a graded answer .*{words}"):
            fmn.from_lm_eval(out, task="sums_choice", metric="acc")

    @pytest.mark.parametrize("raw", [b"{", b"", b"[1]", b"[" * 100_000, b"\xff\xfe", b'{"doc_id": 1'])
    def test_a_torn_line_is_named(self, out, raw):
        path = samples(out / "checkpoint-200", "sums_choice")
        path.write_bytes(path.read_bytes() + raw + b"\n")
        with pytest.raises(ValueError, match=r"samples_sums_choice_.*\.jsonl:7: not a graded answer"):
            fmn.from_lm_eval(out, task="sums_choice", metric="acc")

    def test_pass_at_k_is_no_share_of_draws(self, tmp_path):
        drawn = ["a"] * 3 + ["b"]
        write(tmp_path, filtered_resps=[drawn], metrics=["pass@1", "pass@2"], **{"pass@1": 0.75, "pass@2": 1.0})
        assert fmn.from_lm_eval(tmp_path, metric="pass@1").rates.tolist() == [[0.75]]
        with pytest.raises(ValueError, match=r"pass@2 is not the share of right draws"):
            fmn.from_lm_eval(tmp_path, metric="pass@2")

    def test_an_empty_file(self, out):
        samples(out / "checkpoint-200", "sums_choice").write_bytes(b"")
        with pytest.raises(ValueError, match=r"samples_sums_choice_.*\.jsonl: expected at least one line"):
            fmn.from_lm_eval(out, task="sums_choice", metric="acc")

    def test_questions_must_be_the_same(self, out):
        change(out / "checkpoint-200", doc_hash="0")
        with pytest.raises(
            ValueError, match="checkpoint-200: question sums_choice/1 is not the same as in checkpoint-100"
        ):
            fmn.from_lm_eval(out, task="sums_choice", metric="acc")

    @pytest.mark.parametrize("short", ["checkpoint-100", "checkpoint-200"])
    def test_a_question_that_one_lacks(self, out, short):
        path = samples(out / short, "sums_choice")
        path.write_text("".join(line + "\n" for line in path.read_text().splitlines()[:-1]))
        with pytest.raises(ValueError, match=f"{short}: no answer to question sums_choice/5"):
            fmn.from_lm_eval(out, task="sums_choice", metric="acc")


class TestCommandLine:
    def run(self, capsys, *args):
        assert main([str(a) for a in args]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def test_multiple_choice_goes_to_the_metric(self, capsys, out):
        folders = sorted(out.glob("check*"))
        text = self.run(capsys, "import", "lm-eval", *folders, "--task", "sums_choice", "--metric", "acc")
        assert [line.split()[0] for line in text.splitlines()[1:4]] == CHECKPOINTS
        assert "F_e cor." in text
        graded = fmn.from_lm_eval(out, task="sums_choice", metric="acc")
        content = json.loads(self.run(capsys, "metric", "history.npz", "--json"))
        curves = fmn.forgetting_curves(graded.correct[..., 0])
        assert content["forget_fraction"] == curves.forget.tolist()
        options = ["--task", "sums_choice", "--metric", "acc", "--json"]
        content = json.loads(self.run(capsys, "import", "lm-eval", out, *options))
        np.testing.assert_allclose(content["corrected_forget_fraction"], curves.chance_corrected(4)[0], atol=1e-12)
        assert (content["n_questions"], content["n_draws"], content["tasks"]) == (6, 1, ["sums_choice"])

    def test_draws_go_to_the_metric(self, capsys, out):
        options = ["--task", "sums_draws", "--filter", "draws", "-o", "draws.npz"]
        text = self.run(capsys, "import", "lm-eval", out, *options)
        assert "6 questions, 5 draws per question and checkpoint" in text
        graded = fmn.from_lm_eval(out, task="sums_draws", filter="draws")
        content = json.loads(self.run(capsys, "metric", "draws.npz", "--json"))
        assert content["forget_fraction"] == fmn.expected_curves(graded.rates, n_draws=5).forget.tolist()
        assert content["temporal_forgetting"] == fmn.temporal_forgetting(graded.rates).score
        with np.load("draws.npz") as file:
            np.testing.assert_array_equal(file["answers"], graded.answers)
            assert file["checkpoints"].tolist() == CHECKPOINTS
        for option in (["--csv"], ["--per-sample", "x.csv"], ["--reference", "0"]):
            assert main(["metric", "draws.npz", *option]) == 1
            assert "draws.npz: has several draws" in capsys.readouterr().err
        assert not Path("x.csv").exists()

    @pytest.mark.parametrize(
        ("args", "words"),
        [
            (["lm-eval", "out", "--task", "sums_choice"], "choose one of 'acc', 'acc_norm'"),
            (["lm-eval", "none"], "none: no samples_"),
            (["lm-eval", "out", "-o", "out/checkpoint-100/new.jsonl"], "one of the files to read"),
            (["cartography", "out", "out"], "cartography: expected one path, got 2"),
            (["toneva", "a", "b"], "toneva: expected one path, got 2"),
        ],
    )
    def test_errors_write_nothing(self, capsys, out, args, words):
        before = sorted(out.rglob("*"))
        assert main(["import", *args]) == 1
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
        assert sorted(out.rglob("*")) == before
        assert not Path("history.npz").exists()


def test_the_metric_of_graded_answers_names_the_steps(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["import", "lm-eval", str(DATA), "--task", "sums_choice", "--metric", "acc", "-o", "a.npz"]) == 0
    capsys.readouterr()
    assert main(["metric", "a.npz", "--csv"]) == 0
    assert [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["100", "200", "1000"]
