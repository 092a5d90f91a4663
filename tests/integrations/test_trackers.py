"""Values in the files of trackers after a training with RecorderCallback, read back with their own readers."""

import csv
import logging
from pathlib import Path

import numpy as np
import pytest

L = pytest.importorskip("lightning")
pytest.importorskip("matplotlib")

import torch  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger  # noqa: E402
from networks import make_data, make_model  # noqa: E402
from pages import block  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

import fmn_ref as fmn  # noqa: E402
from fmn_ref.integrations.lightning import RecorderCallback  # noqa: E402

GUIDE = Path(__file__).parents[2] / "docs" / "integrations" / "lightning.md"
EPOCHS = 5
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = make_model()

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        return {"logits": self.net(batch[0])}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.2, momentum=0.9)


def fit(folder, *loggers):
    train, val, _ = make_data()
    torch.manual_seed(1)
    recorder = RecorderCallback(folder / "run")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=EPOCHS, logger=loggers, callbacks=[recorder], accelerator="cpu", **quiet)
    trainer.fit(Net(), *(DataLoader(TensorDataset(*data), 32) for data in (train, val)))
    return trainer, recorder.run


def peaks(run):
    correct = run.history.correct()
    found = [fmn.forget_fraction(correct[: e + 1]).max() for e in range(EPOCHS)]
    assert found[-1] > 0
    return pytest.approx(found, rel=1e-6)  # trackers and Lightning have 32 bits


def test_tensorboard_and_csv(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, table = TensorBoardLogger(tmp_path, "board"), CSVLogger(tmp_path, "table")
    trainer, run = fit(tmp_path, board, table)
    guide(trainer=trainer, run=run, board=board)
    board.finalize("success")
    events = EventAccumulator(board.log_dir).Reload()
    assert [e.value for e in events.Scalars("peak_forget_fraction")] == peaks(run)
    curve = events.Scalars("forget_fraction")
    assert [e.step for e in curve] == list(run.history.epochs)
    np.testing.assert_allclose([e.value for e in curve], fmn.forget_fraction(run.history), rtol=1e-6)
    (image,) = events.Images("forgetting")
    assert image.encoded_image_string.startswith(b"\x89PNG")
    with open(Path(table.log_dir) / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["peak_forget_fraction"]]
    assert [float(row["peak_forget_fraction"]) for row in rows] == peaks(run)
    assert [int(row["epoch"]) for row in rows] == list(range(EPOCHS))


@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")
@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow(tmp_path, monkeypatch, store):
    pytest.importorskip("mlflow")
    if store == "sqlite":  # which mlflow-skinny does not bring
        pytest.importorskip("alembic")
        pytest.importorskip("sqlalchemy")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    uri = (tmp_path / "ml").as_uri() if store == "file" else f"sqlite:///{tmp_path}/mlflow.db"
    mlflow = MLFlowLogger("forgetting", tracking_uri=uri, artifact_location=(tmp_path / "artifacts").as_uri())
    trainer, run = fit(tmp_path, mlflow)
    guide(trainer=trainer, run=run, mlflow=mlflow)
    again = MlflowClient(uri)
    assert [m.value for m in again.get_metric_history(mlflow.run_id, "peak_forget_fraction")] == peaks(run)
    curve = sorted((m.step, m.value) for m in again.get_metric_history(mlflow.run_id, "forget_fraction"))
    assert curve == list(enumerate(fmn.forget_fraction(run.history)))
    assert [a.path for a in again.list_artifacts(mlflow.run_id)] == ["forgetting.png"]


def guide(**names):
    """The guide's lines as they are written, but for the tracker that is not there."""
    code = block(GUIDE.read_text(), "## Trackers")
    lines = [line for line in code.splitlines() if "experiment" not in line or line.split(".")[0] in names]
    assert len(lines) == 6
    exec("\n".join(lines), {"fmn": fmn, **names})
