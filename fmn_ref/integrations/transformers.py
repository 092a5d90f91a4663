"""Hugging Face Transformers: a callback that records a Trainer's evaluations as rows of a run.

    recorder = RecorderCallback("runs/a")
    trainer = Trainer(..., callbacks=[recorder], compute_metrics=recorder.compute_metrics,
                      preprocess_logits_for_metrics=recorder.preprocess_logits)

Rows of the history are numbered by global step. The Recorder stores the weights of each evaluation beside the Trainer's
own checkpoints, because `save_total_limit` deletes those without regard to what was forgotten. After a training without
the callback, `from_trainer` makes a run of the Trainer's checkpoints; transformers_checkpoints.py holds it.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from .. import _check, _files
from ..metrics.curves import forget_fraction
from ..metrics.history import labels_digest
from ..runs.recorder import Recorder
from ..runs.retention import Keep
from ..runs.run import Run
from ..training import distributed

try:
    from accelerate.state import AcceleratorState
    from transformers import TrainerCallback

    from .transformers_checkpoints import (
        FORWARD_FNS,
        AnyPath,
        Rows,
        causal_lm_forward,
        check_task,
        checked_correctness,
        from_trainer,
        load_fused,
        next_tokens,
        predicted_classes,
        save_fused,
    )
except ImportError as error:
    raise ImportError(f'{error}; pip install "fmn_ref[transformers]"') from error

__all__ = ["RecorderCallback", "causal_lm_forward", "from_trainer", "load_fused", "save_fused"]
logger = logging.getLogger(__name__)


class RecorderCallback(TrainerCallback):
    """Record a row of the history, and the weights, at each evaluation of a Trainer's training.

    Pass it to the Trainer as `callbacks`, its `compute_metrics`, and its `preprocess_logits` as
    `preprocess_logits_for_metrics`, which keeps one number per sample or token in memory instead of all logits. It adds
    "accuracy" and "peak_forget_fraction" (max_e F_e so far) to the metrics, and so to the log and every tracker.

    Parameters
    ----------
    run_dir : path
        Folder of the run. A run in it is continued if the Trainer resumes.
    task : {"classification", "causal_lm"}
        "classification": labels (N,). "causal_lm": labels (N, T); each token with a label other than -100 is a sample.
    prefix : str, default "eval"
        Which evaluation is recorded: "eval_NAME" for NAME in a dict of eval_datasets.
    keep, half, config
        As in `fmn_ref.Recorder`.
    overwrite : bool, default False
        If the Trainer starts at step 0, discard a run in `run_dir` instead of refusing it.

    Attributes
    ----------
    run : Run
        The recorded run with the Trainer's model.

    Raises
    ------
    ValueError
        Here: an argument out of range. While training: no evaluations, or none called `prefix`; a run in `run_dir` that
        is not resumed, is not the checkpoint's, or that another process writes; labels that change or do not fit the
        task; NaN among the logits; weights to keep that are sharded over processes (FSDP, DeepSpeed).

    Notes
    -----
    `predict`, and evaluations before or after the training, are not recorded.
    ``trainer.train(resume_from_checkpoint=True)`` discards the rows after the checkpoint's step and records them again.
    To add metrics of your own: ``compute_metrics=lambda p: {**recorder.compute_metrics(p), **mine(p)}``.

    The first process writes. It holds the folder's lock from the start to the end of the training. The Trainer does not
    tell callbacks of an exception: after one, the lock lasts until the process ends or the callback is deleted.

    Examples
    --------
    See docs/integrations/transformers.md.
    """

    def __init__(
        self,
        run_dir: AnyPath,
        *,
        task: str = "classification",
        prefix: str = "eval",
        keep: str = "all",
        half: bool = False,
        config: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.run_dir, self.prefix, self.overwrite = _files.absolute(run_dir), prefix, overwrite
        self.task = _check.choice(task, tuple(FORWARD_FNS), "task")
        self._stores = Keep.of(keep).rule != "none"
        self._options: dict[str, Any] = {
            "keep": keep,
            "half": half,
            "config": config,
            "forward_fn": FORWARD_FNS[task],
        }
        self._recorder: Recorder | None = None  # in the process that writes, during training
        self._attached = self._training = False
        self._found: set[str] = set()  # names of evaluations during training
        self._began, self._due = 0, False  # first step; whether the Trainer was to evaluate since
        self._latest: Rows | None = None
        self._model: Any = None

    @property
    def run(self) -> Run:
        """The recorded run with the Trainer's model."""
        return Run.open(self.run_dir, self._model, FORWARD_FNS[self.task])

    @staticmethod
    def preprocess_logits(logits: Any, labels: Any) -> Tensor:
        """Predict the class of each sample or token, on the device of the logits; -1 where one is NaN."""
        return predicted_classes(logits)

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """Return the accuracy of an EvalPrediction (logits or classes) and, while training, max_e F_e so far."""
        if not self._attached:
            logger.warning("%s: nothing is recorded, pass callbacks=[recorder] to the Trainer", self.run_dir)
        self._latest = correct, labels = self._score(prediction.predictions, prediction.label_ids)
        found = {"accuracy": float(correct.mean())}
        if self._training:
            peak = distributed.broadcast(self._peak(correct, labels))  # any process may choose the best model by it
            found |= {} if peak is None else {"peak_forget_fraction": peak}
        return found

    def _score(self, outputs: Any, labels: Any) -> Rows:
        if isinstance(labels, list):  # eval_do_concat_batches=False
            corrects, parts = zip(*(self._score(o, y) for o, y in zip(outputs, labels, strict=True)), strict=True)
            return np.concatenate(corrects), np.concatenate(parts)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        if self.task == "causal_lm":
            outputs, labels = next_tokens(outputs, labels)
        elif np.ndim(labels) != 1:
            a = np.asarray(labels)
            tokens = not isinstance(labels, tuple) and a.ndim == 2 and a.shape[1] > 1 and a.dtype.kind in "iu"
            hint = "; of a causal language model? task='causal_lm'" if tokens else ""
            raise ValueError(f"labels: expected shape (n_samples,), got shape {np.shape(labels)}{hint}")
        return checked_correctness(outputs, labels), labels

    def _peak(self, correct: NDArray[np.bool_], labels: Any) -> float | None:
        """Compute max_e F_e with this evaluation as the last row; None for other samples, and in other processes."""
        if self._recorder is None:
            return None
        if not self._recorder.next_epoch:
            return 0.0
        recorded = self._recorder.run.history
        if recorded.digest != labels_digest(labels):
            return None
        history = recorded.select(range(len(recorded)))  # a copy in memory
        history.append(correct)
        return float(forget_fraction(history).max())

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        check_task(self.task, model)
        if args.eval_strategy == "no":
            raise ValueError("eval_strategy: 'no' evaluates nothing; pass eval_strategy='epoch' to TrainingArguments")
        if getattr(args, "train_sampling_strategy", None) == "group_by_length":
            logger.warning("train_sampling_strategy: 'group_by_length' reorders evaluation too: rows are in its order")
        if self._stores and AcceleratorState().distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            hint = "use 'none', and from_trainer on the Trainer's checkpoints"
            raise ValueError(f"keep: no process has all weights to store them; {hint}")
        self._model, self._attached, self._training, self._latest = model, True, True, None
        self._found, self._began, self._due = set(), state.global_step, False
        distributed.on_rank_zero(partial(self._open, state))

    def _open(self, state: Any) -> None:
        """Open the run, and make its history end at the step from which the Trainer goes on."""
        self._recorder = recorder = Recorder(self.run_dir, self._model, **self._options)
        step = state.global_step
        try:
            self._check_same_training(recorder, state)
        except ValueError:
            self._close()
            raise
        dropped = recorder.rewind(step + 1 if step else 0)
        if dropped and step:
            logger.warning("%s: dropped steps %s, recorded after the checkpoint to go on from", self.run_dir, dropped)

    def _close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = None

    def _check_same_training(self, recorder: Recorder, state: Any) -> None:
        """Refuse a run that is not the one of the checkpoint from which the Trainer goes on."""
        if state.global_step == 0 and recorder.next_epoch and not self.overwrite:
            hint = "resume (trainer.train(resume_from_checkpoint=True)), choose another folder, or pass overwrite=True"
            raise ValueError(f"run_dir: {self.run_dir} holds a run, and the Trainer starts at step 0; {hint}")
        peak = f"{self.prefix}_peak_forget_fraction"
        logged = {entry["step"]: entry[peak] for entry in reversed(state.log_history) if peak in entry}
        lost = sorted(logged.keys() - set(recorder.run.history.epochs if recorder.next_epoch else ()))
        if lost:
            hint = "is it another run's? If it is lost, train on without the recorder, and use from_trainer"
            raise ValueError(f"run_dir: {self.run_dir} lacks the checkpoint's steps {lost}; {hint}")
        if logged:
            history, latest = recorder.run.history, max(logged)
            rows = [row for row, epoch in enumerate(history.epochs) if epoch <= latest]
            if abs(forget_fraction(history.select(rows)).max() - logged[latest]) > 1e-3:  # logs may be rounded
                what = "is another run's: it differs from what the checkpoint logged"
                raise ValueError(f"run_dir: {self.run_dir} {what}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._attached = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._due = self._due or control.should_evaluate

    on_epoch_end = on_step_end

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._due and self._found and self.prefix not in self._found:  # the Trainer evaluated, but not `prefix`
            raise ValueError(f"prefix: no evaluation is called {self.prefix!r}, only {sorted(self._found)}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        latest, self._latest = self._latest, None
        if not self._training:
            return
        self._found |= {key.removesuffix("_runtime") for key in metrics if key.endswith("_runtime")}
        if f"{self.prefix}_runtime" not in metrics:
            return
        if latest is None:
            hint = "pass compute_metrics=recorder.compute_metrics to the Trainer, and labels in the eval_dataset"
            raise ValueError(f"compute_metrics: the recorder's was not called; {hint}")
        distributed.on_rank_zero(partial(self._record, state.global_step, *latest))

    def _record(self, step: int, correct: NDArray[np.bool_], labels: Any) -> None:
        assert self._recorder is not None
        if step >= self._recorder.next_epoch:  # else a second evaluation at the same step
            self._recorder.record_correct(step, correct, labels)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False
        self._close()
        if self.prefix not in self._found and state.global_step > self._began and state.is_world_process_zero:
            logger.warning("%s: nothing was recorded: no evaluation called %r", self.run_dir, self.prefix)
