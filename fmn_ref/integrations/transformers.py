"""Hugging Face Transformers: what a Trainer evaluates and what it saved, as a run; results as save_pretrained folders.

    recorder = RecorderCallback("runs/a")
    trainer = Trainer(..., callbacks=[recorder], compute_metrics=recorder.compute_metrics,
                      preprocess_logits_for_metrics=recorder.preprocess_logits)

Rows of the history are numbered by global step. The Recorder stores the weights of each evaluation beside the Trainer's
own checkpoints: those come and go by save_strategy and save_total_limit, which know nothing of what was forgotten;
`keep="budget:n"` decides by the history. Where the Trainer's are all there is, `from_trainer` makes a run of them.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .. import _check
from ..fusion.plan import FusionPlan
from ..metrics.curves import correctness, forget_fraction
from ..metrics.history import labels_digest
from ..runs import checkpoints
from ..runs.recorder import Recorder, Run
from ..runs.retention import Keep
from ..training import data, distributed
from ..training.ensemble import FusedModel, plan_checkpoints

try:
    from accelerate.state import AcceleratorState
    from safetensors import SafetensorError
    from safetensors.torch import load_model
    from transformers import PreTrainedModel, TrainerCallback
except ImportError as error:
    raise ImportError(f'{error}; pip install "fmn_ref[transformers]"') from error

logger = logging.getLogger(__name__)
AnyPath = str | os.PathLike[str]


def causal_lm_forward(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """A `forward_fn` that makes each token a sample: logits (n_tokens, vocabulary), labels (n_tokens,).

    Logits at a position are for the next position's label; labels of -100 are left out.
    """
    if not isinstance(batch, Mapping) or "labels" not in batch:
        raise ValueError(f"batch: expected a dict with a key 'labels', got {type(batch).__name__}")
    output = model(**{k: v for k, v in batch.items() if k != "labels"})
    logits, labels = _tokens(output.logits, batch["labels"])
    return logits, labels.long()


_FORWARD = {"classification": None, "causal_lm": causal_lm_forward}


def _tokens(outputs: Any, labels: Any) -> tuple[Any, Any]:
    """(N, T, ...) and (N, T), arrays or tensors -> (n_tokens, ...) and (n_tokens,): shifted, without -100."""
    if labels.ndim != 2 or outputs.shape[:2] != labels.shape:
        got = f"{tuple(labels.shape)} for outputs of shape {tuple(outputs.shape)}"
        raise ValueError(f"labels: expected shape (n_sequences, n_tokens), got {got}")
    known = labels[:, 1:] != -100
    return outputs[:, :-1][known], labels[:, 1:][known]


class RecorderCallback(TrainerCallback):
    """Records a row of the history, and the weights, at each evaluation of a Trainer's training.

    Give it to the Trainer as `callbacks`, its `compute_metrics`, and its `preprocess_logits` as
    `preprocess_logits_for_metrics`: then a number for each sample or token is kept in memory, not all logits.
    "accuracy" and "peak_forget_fraction" (of the rows so far, against this one) join the metrics, and so the log and
    every tracker. `predict`, and evaluations before or after the training, are not recorded.

    Parameters
    ----------
    run_dir : path
        Of the run (docs/formats.md).
    task : str
        "classification": labels (N,). "causal_lm": labels (N, T), the tokens; a sample is a token that is predicted
        from those before it, without labels of -100.
    prefix : str
        The evaluation to record: "eval_NAME" for NAME of a dict of eval_datasets.
    keep, half, config
        As `Recorder`; keep="all", "none" or "budget:n".
    overwrite : bool
        Start over where `run_dir` holds a run and the Trainer does not resume; False: refuse that.

    Raises
    ------
    ValueError
        An argument out of range. While training: no evaluations, or none called `prefix`; a run in `run_dir` that is
        not resumed, or not the one of the checkpoint; labels that change or do not fit the task; NaN among the logits;
        weights to be kept that are spread over processes (FSDP, DeepSpeed).

    Notes
    -----
    ``trainer.train(resume_from_checkpoint=True)`` drops the rows after the checkpoint's step and records them anew. In
    several processes the first one writes. With metrics of your own:
    ``compute_metrics=lambda p: {**recorder.compute_metrics(p), **mine(p)}``.

    Examples
    --------
    docs/integrations/transformers.md; the tests run it.
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
        self.run_dir, self.prefix, self.keep, self.overwrite = Path(run_dir), prefix, keep, overwrite
        self.task = _check.choice(task, tuple(_FORWARD), "task")
        self._make_recorder = partial(
            Recorder, keep=_by_value(keep), half=half, config=config, forward_fn=_FORWARD[task]
        )
        self._recorder: Recorder | None = None  # in the process that writes
        self._attached = self._training = False
        self._found: set[str] = set()  # names of evaluations while training
        self._began, self._due = 0, False  # the step it began with; whether the Trainer was to evaluate since
        self._latest: tuple[NDArray[np.bool_], Any] | None = None
        self._model: Any = None

    @property
    def run(self) -> Run:
        """What was recorded, with the Trainer's model."""
        return Run.open(self.run_dir, self._model, _FORWARD[self.task])

    @staticmethod
    def preprocess_logits(logits: Any, labels: Any) -> Tensor:
        """The likeliest class of each sample or token, found where the logits are; -1 where one is NaN."""
        scores: Tensor = logits[0] if isinstance(logits, (tuple, list)) else logits  # hidden states may follow
        highest, classes = scores.max(-1)
        return classes.masked_fill(highest.isnan(), -1)

    def compute_metrics(self, prediction: Any) -> dict[str, float]:
        """{"accuracy": ...} of an EvalPrediction, of logits or classes; "peak_forget_fraction" too while training."""
        if not self._attached:
            logger.warning("%s: nothing is recorded, pass callbacks=[recorder] to the Trainer", self.run_dir)
        self._latest = right, labels = self._correctness(prediction.predictions, prediction.label_ids)
        found = {"accuracy": float(right.mean())}
        if self._training:
            peak = distributed.broadcast(self._peak(right, labels))  # any process may choose the best model by it
            found |= {} if peak is None else {"peak_forget_fraction": peak}
        return found

    def _correctness(self, outputs: Any, labels: Any) -> tuple[NDArray[np.bool_], Any]:
        if isinstance(labels, list):  # eval_do_concat_batches=False
            parts = [self._correctness(o, y) for o, y in zip(outputs, labels, strict=True)]
            return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        if self.task == "causal_lm":
            outputs, labels = _tokens(outputs, labels)
        elif np.ndim(labels) != 1:
            a = np.asarray(labels)
            tokens = not isinstance(labels, tuple) and a.ndim == 2 and a.shape[1] > 1 and a.dtype.kind in "iu"
            hint = "; of a causal language model? task='causal_lm'" if tokens else ""
            raise ValueError(f"labels: expected shape (n_samples,), got shape {np.shape(labels)}{hint}")
        return _right(outputs, labels), labels

    def _peak(self, right: NDArray[np.bool_], labels: Any) -> float | None:
        """With this evaluation as the last row; None where it cannot be one: other samples, another process."""
        if self._recorder is None:
            return None
        if not self._recorder.next_epoch:
            return 0.0
        recorded = self._recorder.run.history
        if recorded.digest != labels_digest(labels):
            return None
        history = recorded.select(range(len(recorded)))  # bits, in memory
        history.append(right)
        return float(forget_fraction(history).max())

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.eval_strategy == "no":
            raise ValueError("eval_strategy: 'no' evaluates nothing; pass eval_strategy='epoch' to TrainingArguments")
        if getattr(args, "train_sampling_strategy", None) == "group_by_length":
            logger.warning("train_sampling_strategy: 'group_by_length' reorders evaluation too: rows are in its order")
        if self.keep != "none" and AcceleratorState().distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            hint = "use 'none', and from_trainer on the Trainer's checkpoints"
            raise ValueError(f"keep: no process has all weights to store them; {hint}")
        self._model, self._attached, self._training, self._latest = model, True, True, None
        self._found, self._began, self._due = set(), state.global_step, False
        distributed.on_rank_zero(partial(self._open, state))

    def _open(self, state: Any) -> None:
        self._recorder = self._make_recorder(self.run_dir, self._model)
        self._continue(self._recorder, state)

    def _continue(self, recorder: Recorder, state: Any) -> None:
        """Make the history end at the step from which the Trainer goes on."""
        step = state.global_step
        if step == 0 and recorder.next_epoch and not self.overwrite:
            hint = "resume (trainer.train(resume_from_checkpoint=True)), choose another folder, or pass overwrite=True"
            raise ValueError(f"run_dir: {self.run_dir} holds a run, and the Trainer starts at step 0; {hint}")
        peak = f"{self.prefix}_peak_forget_fraction"
        evaluated = {entry["step"]: entry[peak] for entry in reversed(state.log_history) if peak in entry}
        lost = sorted(evaluated.keys() - set(recorder.run.history.epochs if recorder.next_epoch else ()))
        if lost:
            hint = "is it another run's? If it is lost, train on without the recorder, and use from_trainer"
            raise ValueError(f"run_dir: {self.run_dir} lacks the checkpoint's steps {lost}; {hint}")
        if evaluated:
            history, latest = recorder.run.history, max(evaluated)
            rows = [row for row, epoch in enumerate(history.epochs) if epoch <= latest]
            if abs(forget_fraction(history.select(rows)).max() - evaluated[latest]) > 1e-3:  # some round what they log
                raise ValueError(
                    f"run_dir: {self.run_dir} is another run's: it differs from what the checkpoint logged"
                )
        dropped = recorder.rewind(step + 1 if step else 0)
        if dropped and step:
            logger.warning("%s: dropped steps %s, recorded after the checkpoint to go on from", self.run_dir, dropped)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._attached = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._due = self._due or control.should_evaluate

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._due = self._due or control.should_evaluate

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._due and self._found and self.prefix not in self._found:  # the Trainer's own evaluations lack it
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

    def _record(self, step: int, right: NDArray[np.bool_], labels: Any) -> None:
        assert self._recorder is not None
        if step >= self._recorder.next_epoch:  # not there already
            self._recorder.record_correct(step, right, labels)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False
        if self.prefix not in self._found and state.global_step > self._began and state.is_world_process_zero:
            logger.warning("%s: nothing was recorded: no evaluation called %r", self.run_dir, self.prefix)


def _by_value(keep: str) -> str:
    if Keep.of(keep).rule == "every":  # counts epochs, and rows are numbered by steps here
        raise ValueError(f"keep: expected 'all', 'none' or 'budget:n', got {keep!r}")
    return keep


def _right(classes: Any, labels: Any) -> NDArray[np.bool_]:
    """`correctness` of scores, or of what `preprocess_logits` made of them."""
    if classes.ndim == 1 and (classes < 0).any():
        raise ValueError(f"logits: expected numbers, got NaN for sample {int((classes < 0).argmax())}")
    return correctness(classes, labels)


@torch.no_grad()
def from_trainer(
    output_dir: AnyPath,
    run_dir: AnyPath,
    model: nn.Module,
    eval_data: Any,
    *,
    task: str = "classification",
    keep: str = "all",
    half: bool = False,
    batch_size: int = 256,
) -> Run:
    """Make a run of the checkpoints that a Trainer saved: what each gets right on `eval_data`, and its weights.

    They are evaluated in the order of their steps, one in memory at a time; interrupted, the same call goes on (and
    evaluates the latest of those once more, to see that nothing has changed). ``run.probabilities(data)`` is the
    (E, N, K) that `fuse` takes, and everything else takes the run. Weights are copied: the Trainer's may go.

    Parameters
    ----------
    output_dir : path
        With checkpoint-STEP/model.safetensors, in shards or not.
    run_dir : path
        Of the run to be made.
    model : nn.Module
        Of the checkpoints' architecture, on the device to use; its weights do not matter and do not change.
    eval_data
        A DataLoader that does not shuffle (``trainer.get_eval_dataloader()``), or a torch Dataset of dicts with
        "labels" and `batch_size`.
    task, keep, half
        As `RecorderCallback`.

    Raises
    ------
    FileNotFoundError
        No checkpoint there.
    ValueError
        A checkpoint is damaged or does not fit the model; NaN among its logits; `run_dir` holds a run of another
        `output_dir`, of a training that was done again since, or of other `eval_data`.
    """
    data.check_module(model, "model")
    found = [p for p in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    folders = dict(sorted((int(p.name[11:]), p) for p in found))
    if not folders:
        raise FileNotFoundError(f"{output_dir}: no checkpoint-STEP there")
    forward_fn = _FORWARD[_check.choice(task, tuple(_FORWARD), "task")]
    model = copy.deepcopy(model)
    batches = data.Batches(eval_data, batch_size, data.device_of(model))
    config = {"output_dir": str(Path(output_dir).resolve()), "task": task}
    recorder = Recorder(run_dir, model, _by_value(keep), half=half, config=config, forward_fn=forward_fn)

    def evaluate(step: int) -> tuple[NDArray[np.bool_], Any]:
        _load_into(model, folders[step])
        with data.evaluating(model):
            outputs = (data.forward(model, batch, forward_fn) for batch in batches)
            pairs = [(RecorderCallback.preprocess_logits(scores, y), y) for scores, y in outputs]
        classes, labels = (torch.cat(parts).cpu().numpy() for parts in zip(*pairs, strict=True))
        return _right(classes, labels), labels

    done = [step for step in folders if step < recorder.next_epoch]
    if done:
        history, step = recorder.run.history, done[-1]
        right, labels = evaluate(step)
        same = history.digest == labels_digest(labels) and set(done) <= set(history.epochs)
        if same:
            row = history.epochs.index(step)
            kept = recorder.run.checkpoints[row]  # else the bits: devices may round otherwise
            same = _holds(kept, model) if kept.is_file() else np.mean(history[row] != right) < 0.05
        if not same:
            hint = "or of other eval_data; choose another folder"
            raise ValueError(f"run_dir: {run_dir} holds a run of other checkpoints than {output_dir}'s, {hint}")
    for step in folders:
        if step >= recorder.next_epoch:
            recorder.record_correct(step, *evaluate(step))
    return recorder.run


def _holds(path: Path, model: nn.Module) -> bool:
    """Whether a checkpoint is of these very weights, in 16 bits or more."""
    stored, state = checkpoints.load(path), checkpoints.unwrap(model).state_dict()
    tensors = [k for k, v in state.items() if isinstance(v, Tensor)]
    return stored.keys() == state.keys() and all(
        torch.allclose(stored[k].float(), state[k].cpu().float(), rtol=1e-3, atol=1e-7, equal_nan=True) for k in tensors
    )


def _load_into(model: nn.Module, folder: Path) -> None:
    if isinstance(model, PreTrainedModel):
        model.load_state_dict(_from_pretrained(type(model), folder).state_dict())
        return
    with _named(folder):
        load_model(model, folder / "model.safetensors")


def _from_pretrained(model_class: Any, folder: Path) -> Any:
    """It knows shards, tied weights and old names; but what is missing it would make up."""
    if not (folder / "config.json").is_file():  # from_pretrained would look for it elsewhere
        raise ValueError(f"{folder}: no model there (config.json is missing)")
    with _named(folder):
        model, info = model_class.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    faults = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if faults:
        raise ValueError(f"{folder}: does not fit {type(model).__name__}: {faults}")
    return model


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}: not a readable checkpoint of this model: {error}") from None


def save_fused(folder: AnyPath, plan: FusionPlan, run: Run, processing_class: Any = None) -> None:
    """Write a fused model: plan.json, and for each of its checkpoints a subfolder that from_pretrained loads.

    member_00003 is row 3 of the run. A fused model that is there is replaced. The tokenizer, or another
    `processing_class`, is saved beside them, where from_pretrained finds it. One averaged model needs nothing but
    ``fmn_ref.averaged_model(run, plan.weights, None).save_pretrained(folder)``.

    Raises
    ------
    TypeError
        The run's model is no PreTrainedModel.
    ValueError, FileNotFoundError
        As `FusedModel`.
    """
    original, paths = plan_checkpoints(plan, run)
    if not isinstance(original, PreTrainedModel):
        raise TypeError(f"run: expected a model with save_pretrained, got {type(original).__name__}")
    model, target = copy.deepcopy(original), Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / "plan.json").unlink(missing_ok=True)  # never a plan beside the members of another
    for member in target.glob("member_*"):
        shutil.rmtree(member)
    for row, path in paths.items():
        checkpoints.load_into(model, path).save_pretrained(target / f"member_{row:05d}")  # type: ignore[operator]
    if processing_class is not None:
        processing_class.save_pretrained(target)
    plan.save(target / "plan.json")


def load_fused(folder: AnyPath, model_class: Any) -> FusedModel:
    """What `save_fused` wrote, as a `FusedModel`.

    model_class : AutoModelForSequenceClassification, AutoModelForCausalLM, or another class with from_pretrained

    Raises
    ------
    FileNotFoundError
        No plan.json there.
    ValueError
        A file is damaged, or a member is missing or does not fit the class; it is named.
    """
    source = Path(folder)
    weights = FusionPlan.load(source / "plan.json").weights
    members = [_from_pretrained(model_class, source / f"member_{row:05d}") for row in weights]
    return FusedModel.of_members(members, weights.values())
