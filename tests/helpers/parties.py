"""Processes that use one run folder at the same time: each stops halfway, and goes on when it is told to."""

import multiprocessing
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from networks import RECIPE, make_data, make_model
from training_runs import fresh, trained

import fmn_ref as fmn
from fmn_ref.reporting import report

EPOCHS = 5
BATCHES = 8  # of an epoch
LABELS = make_data()[1][1]
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["torch", "torch._dynamo", "fmn_ref.training.distill", "fmn_ref.training.existing", "fmn_ref.reporting.report"]
)


def stopping(halfway, folder):
    """An augmentation that stops in the third epoch, when the two before it are on disk."""
    batches = [0]

    def augment(x):
        batches[0] += 1
        if batches[0] == 3 * BATCHES:
            while not all((folder / name).exists() for name in ("resume.pt", "resume.previous.pt")):
                time.sleep(0.01)
            halfway()
        return x

    return augment


def recorder(folder, halfway):
    with fmn.Recorder(folder) as mine:
        mine.record(mine.next_epoch, LABELS, LABELS)
        halfway()
        mine.record(mine.next_epoch, LABELS, LABELS)


def train(folder, halfway):
    trained(folder, EPOCHS, augment=stopping(halfway, folder))


def distill(folder, halfway):
    train_set, val, _ = make_data()
    options = {"val_data": val, "augment": stopping(halfway, folder), "targets": "online", "run_dir": folder}
    fmn.distill(make_model(), fresh(3), train_set, epochs=EPOCHS, **options, **RECIPE)


def rewind(folder, halfway):
    with fmn.Recorder(folder) as mine:
        for _ in range(2 if mine.next_epoch == 0 else 0):
            mine.record(mine.next_epoch, LABELS, LABELS)
        halfway()
        mine.rewind(mine.next_epoch - 1)


def bring(folder, halfway):
    source = folder.with_name(f"{folder.name}-source")
    source.mkdir(exist_ok=True)
    for epoch in range(3):
        if not (source / f"epoch_{epoch}.pt").exists():
            torch.save(fresh(epoch).state_dict(), source / f"epoch_{epoch}.pt")
    calls = []

    def forward(model, batch):
        calls.append(1)
        if len(calls) == 3:
            halfway()
        return model(batch[0]), batch[1]

    fmn.from_checkpoints(source, make_model(), make_data()[1], folder, forward_fn=forward, progress=False)


def reader(folder, halfway):
    run = fmn.Run.open(folder, make_model())
    before = run.history.correct()
    halfway()
    np.testing.assert_array_equal(run.history.correct(), before)


def reports(folder, halfway):
    real = report.forgetting_curves

    def curves(history):
        halfway()
        return real(history)

    output = folder.with_name(f"{folder.name}.html")
    with mock.patch.object(report, "forgetting_curves", curves):
        report.write_report(folder, output)
    assert output.read_text().rstrip().endswith("</html>")


WRITERS = {f.__name__: f for f in (recorder, train, distill, rewind, bring)}
ROLES = WRITERS | {f.__name__: f for f in (reader, reports)}


class Party:
    """A process in a role. It stops halfway if it is to; `end` lets it go on, and returns its error, or ""."""

    def __init__(self, role, folder, stops=False):
        self._connection, other = PROCESSES.Pipe()
        self.process = PROCESSES.Process(target=_act, args=(other, role, Path(folder), stops))
        self.process.start()
        other.close()
        if stops:
            assert self._connection.recv() == "halfway"

    def end(self):
        try:
            self._connection.send("go on")
            return self._connection.recv()
        finally:
            self.kill()

    def kill(self):
        self.process.kill()
        self.process.join()


def _act(connection, role, folder, stops):
    torch.set_num_threads(1)

    def halfway():
        if stops:
            connection.send("halfway")
            connection.recv()

    try:
        ROLES[role](folder, halfway)
        connection.send("")
    except (ValueError, OSError) as error:
        connection.send(f"{type(error).__name__}: {error}")
