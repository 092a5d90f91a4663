"""Programs that `power_loss` interrupts: what each writes below a folder, and what must be there after a power loss.

A job calls `done(what)` when a call of the package has returned. Called again after a power loss, it goes on, and must
end with the bits of the unbroken program. Its check gets what was done before the loss.
"""

import functools
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from networks import RECIPE, make_data, make_model
from training_runs import fresh, same_weights, trained

import fmn_ref as fmn
from fmn_ref.reporting.report import write_report
from fmn_ref.runs import checkpoints

EPOCHS = 5
LABELS = np.arange(600) % 4
BATCHES = 8  # of an epoch of `trained`
ENSEMBLES = [fmn.FusionPlan.from_weights(w, EPOCHS) for w in ({1: 0.5, 2: 0.5}, {2: 0.25, 3: 0.25, 4: 0.5})]
JOBS = {}


def job(check):
    """Register a job with its check."""

    def register(function):
        JOBS[function.__name__] = function, check
        return function

    return register


def row(epoch, version=0):
    """Predictions of an epoch."""
    return np.random.default_rng([epoch, version]).integers(0, 4, len(LABELS))


def check_history(history, epochs, versions=None):
    """The history begins with the epochs, and with the right rows."""
    assert history.epochs[: len(epochs)] == tuple(epochs)
    for i, epoch in enumerate(history.epochs):
        version = (versions or {}).get(epoch, 0)
        np.testing.assert_array_equal(history[i], row(epoch, version) == LABELS)


def check_alone(folder, done):
    path = folder.parent.with_suffix(".fmnh")
    if done or path.exists():
        check_history(fmn.CorrectnessHistory.open(path), range(len(done)))


@job(check_alone)
def alone(folder, done):
    """A history without a run."""
    path = folder.parent.with_suffix(".fmnh")
    opens = fmn.CorrectnessHistory.open(path) if path.exists() else fmn.CorrectnessHistory(len(LABELS), path)
    for epoch in range(len(opens), 12):
        opens.append(row(epoch) == LABELS, epoch)
        done(epoch)


def record(folder, done, keep="all", **options):
    with fmn.Recorder(folder, fresh().eval(), keep, **options) as recorder:
        for epoch in range(recorder.next_epoch, EPOCHS + 3):
            recorder.model.load_state_dict(fresh(epoch).state_dict())
            recorder.record(epoch, row(epoch), LABELS)
            done(epoch)


def check_recorded(folder, done):
    if done:
        run = fmn.Run.open(folder, make_model())
        check_history(run.history, done)
        for epoch in run.kept.history.epochs:
            assert same_weights(checkpoints.load_into(run.model, run.checkpoint(epoch)), fresh(epoch))


def check_all_recorded(folder, done):
    check_recorded(folder, done)
    if done:
        assert set(done) <= set(fmn.Run.open(folder).kept.history.epochs)


@job(check_all_recorded)
def recorder(folder, done):
    record(folder, done)


@job(check_recorded)
def budget(folder, done):
    record(folder, done, "budget:2")


def check_arrays(folder, done):
    if done:
        run = fmn.Run.open(folder)
        check_history(run.history, done)
        for epoch in done:
            np.testing.assert_array_equal(np.load(run.checkpoint(epoch) / "w.npy"), row(epoch))


@job(check_arrays)
def foreign(folder, done):
    """Checkpoints that are folders, written by somebody who has not heard of fsync."""
    epoch = 0

    def save(path):
        path.mkdir()
        np.save(path / "w.npy", row(epoch))

    with fmn.Recorder(folder, save=save, suffix=".arrays") as recorder:
        for epoch in range(recorder.next_epoch, EPOCHS):
            recorder.record(epoch, row(epoch), LABELS)
            done(epoch)


def check_other_epochs(folder, done):
    """Rows of discarded epochs, and their checkpoints, do not come back."""
    if "discards" not in done:
        check_all_recorded(folder, done)
    elif done[-1] not in ("discards", "discarded"):
        run, again = fmn.Run.open(folder), done[done.index("discarded") + 1 :]
        kept = range(again[0])
        check_history(run.history, [*kept, *again], dict.fromkeys(range(again[0], EPOCHS), 1))
        assert [e for e in run.history.epochs if run.folder.checkpoint(e).exists()] == list(kept)


@job(check_other_epochs)
def rewound(folder, done):
    """The epochs from 2 on are recorded again, without checkpoints."""
    with fmn.Recorder(folder, fresh().eval()) as recorder:
        for epoch in range(recorder.next_epoch, 2 if recorder.next_epoch else EPOCHS):
            recorder.model.load_state_dict(fresh(epoch).state_dict())
            recorder.record(epoch, row(epoch), LABELS)
            done(epoch)
        done("discards")
        recorder.rewind(2)
        done("discarded")
    record_others(fmn.Recorder(folder, keep="none"), 2, done)


def record_others(recorder, first, done):
    with recorder:
        for epoch in range(first, EPOCHS):
            recorder.record(epoch, row(epoch, 1), LABELS)
            done(epoch)


@job(check_other_epochs)
def overwritten(folder, done):
    """A run takes the place of another one."""
    if not folder.exists():
        with fmn.Recorder(folder, fresh().eval()) as recorder:
            for epoch in range(EPOCHS):
                recorder.model.load_state_dict(fresh(epoch).state_dict())
                recorder.record(epoch, row(epoch), LABELS)
                done(epoch)
    done("discards")
    recorder = fmn.Recorder(folder, keep="none", overwrite=True)
    done("discarded")
    record_others(recorder, 0, done)


def jitter(done):
    """An augmentation that tells, at the first batch of an epoch, that the last but one is on disk."""
    batches = [0]

    def augment(x):
        if batches[0] % BATCHES == 0 and batches[0] >= 2 * BATCHES:
            done(batches[0] // BATCHES - 2)
        batches[0] += 1
        return x + 0.1 * torch.randn_like(x)

    return augment


def check_trained(folder, done):
    if done:
        run = fmn.Run.open(folder, make_model())
        n = max((what + 1 for what in done if isinstance(what, int)), default=0)
        n = EPOCHS if done[-1] in ("trained", "plan", "report") else n
        assert len(run.history) >= n
        assert len(run.kept.history) == len(run.history)
        for path in run.checkpoints:
            checkpoints.load(path)
    if "plan" in done:
        fmn.FusionPlan.load(folder / "plan.json")
    if "report" in done:
        assert (folder / "report.html").read_text().rstrip().endswith("</html>")


@job(check_trained)
def training(folder, done):
    """Train, discard the last epoch, train it again, fuse, report."""
    _, val, _ = make_data()
    trained(folder, EPOCHS, augment=jitter(done))
    done("trained")
    done("rewinds")
    with fmn.Recorder(folder) as recorder:
        recorder.rewind(EPOCHS - 1)
    run = trained(folder, EPOCHS, augment=jitter(lambda what: None))
    fmn.fuse(run.probabilities(val), val[1], correct=run.history).save(folder / "plan.json")
    done("plan")
    write_report(folder, folder / "report.html")
    done("report")


@functools.cache
def inputs():
    """A finished run outside the folders of the jobs, and validation data."""
    return trained(Path(os.environ["FMN_CRASH_INPUTS"]), EPOCHS), make_data()[1]


def check_distilled(folder, done):
    if done:
        run = fmn.Run.open(folder, make_model())
        assert len(run.history) >= max((what + 1 for what in done if isinstance(what, int)), default=EPOCHS)
    if "distilled" in done:
        assert len(list((folder / "targets").glob("[!.]*"))) == 3 * 2 + 1


@job(check_distilled)
def distillation(folder, done):
    """With every file that `distill` can write."""
    run, val = inputs()
    options = {"targets": "cached-views", "views": 3, "top_k": 2, "kd_weight": 0.7, "ema_decay": 0.9}
    recorded = {"val_data": val, "keep": "budget:2", "patience": 100, "run_dir": folder}
    teacher, more = fmn.FusedModel(ENSEMBLES[0], run), options | recorded | RECIPE
    fmn.distill(fresh(2), teacher, make_data()[0], epochs=EPOCHS, augment=shift, **more)
    done("distilled")


def shift(x):
    return x + 0.1 * torch.randn_like(x)


def check_imported(folder, done):
    if done:
        run, (original, val) = fmn.Run.open(folder, make_model()), inputs()
        np.testing.assert_array_equal(run.history.packed, original.history.packed)
        probs = original.probabilities(val)
        for i in range(EPOCHS):
            np.testing.assert_allclose(run.probabilities(val)[i], probs[i], atol=1e-3)


def bring(folder, done, **options):
    run, val = inputs()
    source = run.folder.checkpoints
    fmn.from_checkpoints(source, make_model(), val, folder, progress=False, **options)
    done("imported")


@job(check_imported)
def references(folder, done):
    bring(folder, done, keep_predictions=True)


@job(check_imported)
def copies(folder, done):
    bring(folder, done, link=False)


def check_ensemble(folder, done):
    """One of the two ensembles, and nothing between them."""
    if not done and not (folder / "plan.json").exists():
        return
    run, val = inputs()
    if "second" in done or (folder / "plan.json").exists():
        found = fmn.FusedModel.load(folder, make_model())(val[0])
        assert any(torch.equal(found, fmn.FusedModel(plan, run)(val[0])) for plan in ENSEMBLES)


@job(check_ensemble)
def ensemble(folder, done):
    """An ensemble takes the place of another one."""
    run = inputs()[0]
    for plan, name in zip(ENSEMBLES, ("first", "second"), strict=True):
        fmn.FusedModel(plan, run).save(folder)
        done(name)


def check_averaged(folder, done):
    folder = folder.parent
    if done or folder.exists():
        config = json.loads((folder / "config.json").read_text())
        assert config == {"architecture": "two layers"}
        assert len((folder / "model.safetensors").read_bytes()) > 2000


@job(check_averaged)
def averaged(folder, done):
    """A folder of safetensors, with a configuration from beside the checkpoints."""
    paths = inputs()[0].checkpoints[-2:]
    source = paths[0].parent.parent / "source"
    if not source.exists():
        fmn.average_checkpoints(paths[:1], {0: 1.0}, source, progress=False)
        (source / "config.json").write_text(json.dumps({"architecture": "two layers"}))
    folder = folder.parent
    if not folder.exists():
        fmn.average_checkpoints([source, source], {0: 0.5, 1: 0.5}, folder, progress=False)
    done("averaged")


def main():
    """Run every job: FOLDER LOG, where what is done is logged."""
    torch.set_num_threads(1)
    root, log = Path(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT)
    for name, (work, _) in JOBS.items():
        os.write(log, repr((name, None)).encode())
        work(root / name / "run", lambda what, name=name: os.write(log, repr((name, what)).encode()))


if __name__ == "__main__":
    main()
