"""RecorderCallback: the history is that of logits dumped by hand; kills, two processes, safetensors, the guide.

This file is also what the subprocesses run: test_transformers.py FOLDER kills | processes
"""

import importlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))  # a subprocess has no conftest

import torch  # noqa: E402
from folders import contents, flip_bit  # noqa: E402
from fresh_process import record_in_another_process  # noqa: E402
from pages import blocks, n_lines  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402

import fmn_ref as fmn  # noqa: E402
from fmn_ref.integrations.transformers import (  # noqa: E402
    RecorderCallback,
    causal_lm_forward,
    from_trainer,
    load_fused,
    save_fused,
)

GUIDE = (Path(__file__).parents[2] / "docs" / "integrations" / "transformers.md").read_text()
STEPS = 6  # in an epoch of the classifier
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class Samples(Dataset):
    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


def sentences(n, seed, wrong=0.0):
    """The first token says the class; `wrong` of the labels are drawn anew."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 40, (n, 6)), rng.integers(0, 4, n)
    x[:, 0] = 40 + np.where(rng.random(n) < 0.8, y, rng.integers(0, 4, n))
    y = np.where(rng.random(n) < wrong, rng.integers(0, 4, n), y)
    return Samples([{"input_ids": torch.tensor(a), "labels": torch.tensor(b)} for a, b in zip(x, y, strict=True)])


def texts(n, seed):
    """Sequences of different lengths, in which a token tells the next one four times in five; the prompt is -100."""
    rng = np.random.default_rng(seed)
    samples = []
    for length in rng.integers(5, 12, n):
        x = [int(rng.integers(0, 20))]
        while len(x) < length:
            x.append((3 * x[-1] + 1) % 20 if rng.random() < 0.8 else int(rng.integers(0, 20)))
        samples.append({"input_ids": x, "labels": [-100, -100, *x[2:]]})
    return Samples(samples)


def collate(samples):
    width = max(len(s["input_ids"]) for s in samples)
    padded = {"input_ids": 0, "labels": -100}
    batch = {k: torch.tensor([s[k] + [pad] * (width - len(s[k])) for s in samples]) for k, pad in padded.items()}
    batch["attention_mask"] = torch.tensor([[int(i < len(s["input_ids"])) for i in range(width)] for s in samples])
    return batch


def classifier(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(BertConfig(vocab_size=44, max_position_embeddings=8, num_labels=4, **sizes))


def gpt2(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=1, n_head=2))


def llama(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, max_position_embeddings=16, **sizes))


TRAIN, VAL = sentences(16 * STEPS, 1, wrong=0.4), sentences(90, 2)


def arguments(folder, **changes):
    options = {"num_train_epochs": 12, "learning_rate": 1e-2, "eval_strategy": "epoch", "save_strategy": "epoch"}
    options |= {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 32, "lr_scheduler_type": "constant"}
    options |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "seed": 3}
    return TrainingArguments(str(folder / "out"), **(options | changes))


def trainer_of(folder, recorder, model=None, data=(TRAIN, VAL), callbacks=(), preprocess=True, **changes):
    options = {"preprocess_logits_for_metrics": recorder.preprocess_logits} if preprocess else {}
    options |= {k: changes.pop(k) for k in ("compute_metrics", "data_collator", *options) if k in changes}
    return Trainer(
        model or classifier(),
        arguments(folder, **changes),
        train_dataset=data[0],
        eval_dataset=data[1],
        callbacks=[recorder, *callbacks],
        **({"compute_metrics": recorder.compute_metrics} | options),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A classifier's training, with the logits of each evaluation dumped by hand: (trainer, recorder, (E, N, K))."""
    folder = tmp_path_factory.mktemp("trained")
    recorder, dumped = RecorderCallback(folder / "run"), []

    def compute(prediction):
        dumped.append(prediction.predictions.copy())
        return {"mine": 1.0, **recorder.compute_metrics(prediction)}

    trainer = trainer_of(folder, recorder, compute_metrics=compute, preprocess=False)
    trainer.train()
    return trainer, recorder, np.stack(dumped)


def labels_of(samples):
    return np.array([int(s["labels"]) for s in samples])


def evaluations(trainer):
    return [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]


def test_classification_is_what_was_dumped_by_hand(trained):
    trainer, recorder, logits = trained
    run, y = recorder.run, labels_of(VAL)
    correct = logits.argmax(-1) == y
    np.testing.assert_array_equal(run.history.correct(), correct)
    assert run.history.epochs == tuple(range(STEPS, 12 * STEPS + 1, STEPS))
    np.testing.assert_array_equal(run.history.packed, np.packbits(correct, axis=1, bitorder="little"))
    log = evaluations(trainer)
    assert [e["eval_accuracy"] for e in log] == correct.mean(1).tolist()
    peaks = [fmn.forget_fraction(correct[: e + 1]).max() for e in range(12)]
    assert [e["eval_peak_forget_fraction"] for e in log] == peaks
    assert peaks[-1] > 0.05
    assert {e["eval_mine"] for e in log} == {1.0}


def test_plan_and_fused_accuracy_are_those_of_the_dump(trained):
    trainer, recorder, logits = trained
    run, val, y = recorder.run, trainer.get_eval_dataloader(), labels_of(VAL)
    probs = run.probabilities(val)
    np.testing.assert_allclose(probs[:], list(fmn.from_logits(logits)), atol=1e-6)
    np.testing.assert_array_equal(probs.labels, y)
    plan, by_hand = fmn.fuse(probs, y, correct=run.history), fmn.fuse(fmn.from_logits(logits), y)
    assert plan == by_hand
    assert not plan.final_model_alone
    fused = fmn.FusedModel(plan, run)(input_ids=torch.stack([s["input_ids"] for s in VAL]))
    np.testing.assert_allclose(fused.exp(), plan.apply(fmn.from_logits(logits)), atol=1e-6)
    assert (fused.argmax(1).numpy() == y).mean() == plan.accuracy[-1]
    assert np.array_equal(run.probabilities(VAL)[-1], probs[-1])  # a Dataset of dicts


@pytest.mark.parametrize("make_model", [gpt2, llama])
def test_causal_lm_is_what_was_dumped_by_hand(tmp_path, make_model):
    recorder, dumped = RecorderCallback(tmp_path / "run", task="causal_lm"), []

    def preprocess(logits, labels):
        dumped.append((logits.clone(), labels.clone()))
        return recorder.preprocess_logits(logits, labels)

    changes = {"preprocess_logits_for_metrics": preprocess, "data_collator": collate}
    changes |= {"num_train_epochs": 5, "per_device_eval_batch_size": 7}  # 7 does not divide 30; widths differ
    trainer = trainer_of(tmp_path, recorder, make_model(), (texts(64, 1), texts(30, 2)), **changes)
    trainer.train()
    per_evaluation = len(dumped) // 5
    rows, logits = [], []
    for e in range(5):
        row = []
        for scores, labels in dumped[e * per_evaluation : (e + 1) * per_evaluation]:
            for i, t in np.ndindex(*labels.shape):
                if t > 0 and labels[i, t] != -100:
                    row.append((scores[i, t - 1].argmax() == labels[i, t]).item())
                    logits.append(scores[i, t - 1].numpy())
        rows.append(row)
    correct, run = np.array(rows), recorder.run
    assert correct.shape == (5, sum(len(s["labels"]) - 2 for s in texts(30, 2)))
    np.testing.assert_array_equal(run.history.correct(), correct)
    np.testing.assert_array_equal(run.history.packed, np.packbits(correct, axis=1, bitorder="little"))
    assert evaluations(trainer)[-1]["eval_peak_forget_fraction"] == fmn.forget_fraction(correct).max()

    val = trainer.get_eval_dataloader()
    probs = run.probabilities(val)
    by_hand = fmn.from_logits(np.reshape(logits, (*correct.shape, 20)))
    np.testing.assert_allclose(probs[:], list(by_hand), atol=1e-5)
    plan = fmn.fuse(probs, probs.labels, correct=run.history, method="equal")
    assert plan == fmn.fuse(by_hand, probs.labels, method="equal")
    save_fused(tmp_path / "fused", fmn.FusionPlan.from_weights({1: 1, 4: 3}, 5), run)
    fused, batch = load_fused(tmp_path / "fused", AutoModelForCausalLM), next(iter(val))
    log_probs, y = fused._fmn_forward_batch(batch, causal_lm_forward)
    np.testing.assert_allclose(log_probs.exp(), 0.25 * probs[1][: len(y)] + 0.75 * probs[4][: len(y)], atol=1e-6)

    shutil.rmtree(tmp_path / "run")  # the Trainer's own checkpoints are enough
    imported = from_trainer(tmp_path / "out", tmp_path / "imported", make_model(9), val, task="causal_lm")
    np.testing.assert_array_equal(imported.history.correct(), correct)
    np.testing.assert_array_equal(imported.probabilities(val)[2], probs[2])


def test_from_trainer(trained, tmp_path):
    trainer, recorder, _ = trained
    out = Path(trainer.args.output_dir)
    model = classifier(5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    imported = from_trainer(out, tmp_path / "run", model, VAL)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert imported.history.epochs == recorder.run.history.epochs  # by number, not by name: 6 before 12
    assert imported.history.digest == recorder.run.history.digest
    np.testing.assert_array_equal(imported.history.correct(), recorder.run.history.correct())
    np.testing.assert_array_equal(imported.probabilities(VAL)[3], recorder.run.probabilities(VAL)[3])

    fmn.Recorder(tmp_path / "run").rewind(30)  # as if it had been interrupted
    again = from_trainer(out, tmp_path / "run", model, VAL, batch_size=7)
    np.testing.assert_array_equal(again.history.correct(), recorder.run.history.correct())
    for other in (TRAIN, sentences(90, 11)):
        with pytest.raises(
            ValueError, match=r"run_dir: .* holds a run of other checkpoints than .*, or of other eval_data"
        ):
            from_trainer(out, tmp_path / "run", model, other)
    shutil.move(out, tmp_path / "moved")  # trained again: the same steps with other weights, or other steps
    try:
        for step in (6, 7):
            classifier(3).save_pretrained(out / f"checkpoint-{step}")
            with pytest.raises(ValueError, match="holds a run of other checkpoints"):
                from_trainer(out, tmp_path / "run", model, VAL)
    finally:
        shutil.rmtree(out)
        shutil.move(tmp_path / "moved", out)
    np.testing.assert_array_equal(again.history.correct(), recorder.run.history.correct())
    shutil.copytree(out / "checkpoint-6", tmp_path / "other" / "checkpoint-6")
    with pytest.raises(ValueError, match=r"output_dir: the run in .* was made with"):
        from_trainer(tmp_path / "other", tmp_path / "run", model, VAL)


def test_shards_and_what_does_not_fit(trained, tmp_path):
    trainer, recorder, _ = trained
    whole = BertForSequenceClassification.from_pretrained(Path(trainer.args.output_dir) / "checkpoint-6")
    whole.save_pretrained(tmp_path / "out" / "checkpoint-6", max_shard_size="4KB")
    assert len(list((tmp_path / "out" / "checkpoint-6").glob("*.safetensors"))) > 1
    run = from_trainer(tmp_path / "out", tmp_path / "run", classifier(), VAL)
    np.testing.assert_array_equal(run.history.correct(), recorder.run.history.correct()[:1])

    damaged = tmp_path / "out" / "checkpoint-12"
    whole.bert.save_pretrained(damaged)  # the head is missing, and would be random
    with pytest.raises(ValueError, match=r"checkpoint-12: does not fit .*classifier\.weight"):
        from_trainer(tmp_path / "out", tmp_path / "run", classifier(), VAL)
    whole.save_pretrained(damaged)
    content = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(ValueError, match="checkpoint-12: not a readable checkpoint"):
        from_trainer(tmp_path / "out", tmp_path / "run", classifier(), VAL)
    (damaged / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="checkpoint-12: not a readable checkpoint"):
        from_trainer(tmp_path / "out", tmp_path / "run", classifier(), VAL)
    with pytest.raises(FileNotFoundError, match="no checkpoint-STEP"):
        from_trainer(tmp_path, tmp_path / "run", classifier(), VAL)
    with pytest.raises(ValueError, match="keep: expected 'all'"):
        from_trainer(tmp_path / "out", tmp_path / "run", classifier(), VAL, keep="every:0")


class Plain(torch.nn.Module):
    """A network that is none of Transformers'."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.EmbeddingBag(44, 4)

    def forward(self, input_ids, labels=None):
        logits = self.table(input_ids)
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if loss is not None else logits


def test_a_plain_module(tmp_path):
    recorder = RecorderCallback(tmp_path / "run")
    trainer = trainer_of(tmp_path, recorder, Plain(), num_train_epochs=3)
    trainer.train()
    imported = from_trainer(tmp_path / "out", tmp_path / "imported", Plain(), VAL)
    np.testing.assert_array_equal(imported.history.correct(), recorder.run.history.correct())
    np.testing.assert_array_equal(recorder.run.probabilities(VAL)[1], imported.probabilities(VAL)[1])
    with pytest.raises(TypeError, match="run: expected a model with save_pretrained, got Plain"):
        save_fused(tmp_path / "fused", fmn.FusionPlan.from_weights({0: 1}, 3), imported)


AVERAGES = (Path(__file__).parents[2] / "docs" / "howto" / "average-weights.md").read_text()


@pytest.mark.parametrize("most", [5_000_000_000, 20_000], ids=["one file", "shards"])
def test_an_average_of_folders_loads_with_from_pretrained(tmp_path, most):
    """GPT-2 ties its head to the embedding."""
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=2, n_head=2)
        models.append(GPT2LMHeadModel(config).eval())
        models[-1].save_pretrained(tmp_path / f"checkpoint-{seed}", max_shard_size="10KB" if seed else "1GB")
    folders = [tmp_path / f"checkpoint-{seed}" for seed in range(3)]
    out = fmn.average_checkpoints(folders, {0: 0.5, 1: 0.25, 2: 0.25}, tmp_path / "mean", max_shard_bytes=most)
    found, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert found.lm_head.weight is found.transformer.wte.weight
    for name, p in found.named_parameters():
        each = (share * m.get_parameter(name).double() for share, m in zip((0.5, 0.25, 0.25), models, strict=True))
        assert torch.equal(p, sum(each).float()), name
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) > 1) == (most == 20_000)
    assert sum(len(load_file(file)) for file in files) == len(list(found.named_parameters()))


def test_load_model_ties_an_average_again(tmp_path, monkeypatch):
    """As the guide shows it."""

    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = torch.nn.Embedding(7, 3), torch.nn.Linear(3, 7, bias=False)
            self.head.weight = self.embedding.weight

    models = [Tied(), Tied()]
    for i, model in enumerate(models):
        torch.save(model.state_dict(), tmp_path / f"{i}.pt")
    folder = fmn.average_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], {0: 1, 1: 1}, tmp_path / "mean")
    names = {"model": Tied(), "folder": folder}
    exec(blocks(AVERAGES)[2], names)
    assert names["model"].head.weight is names["model"].embedding.weight
    mean = (models[0].head.weight.double() + models[1].head.weight.double()) / 2
    assert torch.equal(names["model"].head.weight, mean.float())


def test_every_type_is_read_by_the_library(tmp_path):
    """Tensors of odd sizes, in an order that the writer must change to align them."""
    types = ("bool", "uint8", "float16", "bfloat16", "int32", "float32", "int64", "float64", "complex64")
    state = {name: torch.arange(5).to(getattr(torch, name)) for name in types}
    state |= {
        "float8": torch.arange(3).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }
    torch.save(state, tmp_path / "a.pt")
    out = fmn.average_checkpoints([tmp_path / "a.pt"], {0: 1}, tmp_path / "mean")
    found = load_file(out / "model.safetensors")
    assert found.keys() == state.keys()
    for name, t in state.items():
        assert found[name].dtype == t.dtype
        assert torch.equal(
            found[name].double() if "float8" in name else found[name], t.double() if "float8" in name else t
        )


@pytest.mark.parametrize("wrap", [lambda m: m, partial(torch.compile, backend="eager")], ids=["plain", "compiled"])
def test_a_causal_model_needs_its_task(tmp_path, wrap):
    """Its samples are tokens."""
    config = GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model = wrap(GPT2LMHeadModel(config))
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(ValueError, match="task: expected 'causal_lm' for a GPT2LMHeadModel"):
        from_trainer(tmp_path / "out", tmp_path / "imported", model, [])
    args = SimpleNamespace(eval_strategy="epoch")
    with pytest.raises(ValueError, match="task: expected 'causal_lm' for a GPT2LMHeadModel"):
        RecorderCallback(tmp_path / "run").on_train_begin(args, SimpleNamespace(global_step=0), None, model=model)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize("found", ["closure", "later"])
def test_a_network_that_computes_in_place_is_imported_and_saved(trained, tmp_path, found):
    """Its forward was replaced; or it finds itself by a way that its first batch shows."""
    trainer, recorder, _ = trained
    model = classifier()
    forward = model.forward
    if found == "closure":
        model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    else:
        sys.modules[__name__].FINDER = model
        model.classifier.register_forward_hook(finding)
    run = from_trainer(trainer.args.output_dir, tmp_path / "run", model, VAL)
    np.testing.assert_array_equal(run.history.correct(), recorder.run.history.correct())
    plan = fmn.FusionPlan.from_weights({0: 1, 2: 1}, len(run.history))
    save_fused(tmp_path / "fused", plan, run)
    if found == "closure":
        x = torch.stack([s["input_ids"] for s in VAL])
        expected = fmn.FusedModel(plan, recorder.run)(input_ids=x)
        torch.testing.assert_close(load_fused(tmp_path / "fused", type(model))(input_ids=x), expected)


def finding(module, args, output):
    """Compute the logits once more, with the classifier of the network that is found."""
    found = sys.modules[__name__].FINDER.classifier
    return torch.nn.functional.linear(args[0], found.weight, found.bias)


def test_results_load_with_from_pretrained(trained, tmp_path):
    trainer, recorder, _ = trained
    run, x = recorder.run, torch.stack([s["input_ids"] for s in VAL])
    plan = fmn.fuse(run.probabilities(VAL), labels_of(VAL), correct=run.history)

    class Tokenizer:
        def save_pretrained(self, folder):
            (folder / "tokenizer.json").write_text("{}")

    for older in (fmn.FusionPlan.from_weights(dict.fromkeys(range(len(run.history)), 1), len(run.history)), plan):
        save_fused(tmp_path / "fused", older, run, Tokenizer())  # what is there is replaced
    names = sorted(path.name for path in (tmp_path / "fused").iterdir())
    assert names == [*(f"member_{row:05d}" for row in sorted(plan.weights)), "plan.json", "tokenizer.json"]
    fused = load_fused(tmp_path / "fused", AutoModelForSequenceClassification)
    assert fmn.FusionPlan.load(tmp_path / "fused" / "plan.json") == plan
    assert not fused.training
    assert not any(p.requires_grad for p in fused.parameters())
    assert torch.equal(fused(input_ids=x), fmn.FusedModel(plan, run)(input_ids=x))
    for row, epoch in enumerate(run.history.epochs):
        if row in plan.weights:  # the very weights that the Trainer saved
            theirs = load_file(Path(trainer.args.output_dir) / f"checkpoint-{epoch}" / "model.safetensors")
            ours = load_file(tmp_path / "fused" / f"member_{row:05d}" / "model.safetensors")
            assert theirs.keys() == ours.keys()
            assert all(torch.equal(theirs[k], ours[k]) for k in ours)

    fmn.averaged_model(run, plan.weights, None).save_pretrained(tmp_path / "averaged")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "averaged").state_dict()
    files = [Path(trainer.args.output_dir) / f"checkpoint-{run.history.epochs[r]}" for r in plan.weights]
    states = [load_file(f / "model.safetensors") for f in files]
    for name, value in load_file(tmp_path / "averaged" / "model.safetensors").items():
        mean = sum(w * s[name].double() for w, s in zip(plan.weights.values(), states, strict=True))
        torch.testing.assert_close(value.double(), mean, rtol=0, atol=1e-6)
        assert torch.equal(value, found[name])

    with pytest.raises(ValueError, match="plan: made for 3 epochs"):
        save_fused(tmp_path / "fused", fmn.FusionPlan.from_weights({0: 1}, 3), run)
    shutil.rmtree(tmp_path / "fused" / f"member_{min(plan.weights):05d}")
    with pytest.raises(ValueError, match=f"member_{min(plan.weights):05d}: no model there"):
        load_fused(tmp_path / "fused", AutoModelForSequenceClassification)
    with pytest.raises(FileNotFoundError, match=r"plan\.json"):
        load_fused(tmp_path, AutoModelForSequenceClassification)


class TestSaveFusedKeepsWhatIsThere:
    @pytest.fixture
    def fused(self, trained, tmp_path):
        run = fmn.Run.open(shutil.copytree(trained[1].run.run_dir, tmp_path / "run"), trained[1].run.model)
        plan = fmn.FusionPlan.from_weights({0: 1, 2: 1}, len(run.history))
        save_fused(tmp_path / "fused", plan, run)
        return tmp_path / "fused", plan, run

    def test_files_of_the_user(self, fused):
        folder, _, run = fused
        (folder / "member_photos").mkdir()
        (folder / "member_00007").mkdir()  # the name of a member, but no model
        for name in ("member_photos/a.jpg", "member_list.csv", "member_00007/notes.txt"):
            (folder / name).write_text("mine")
        save_fused(folder, fmn.FusionPlan.from_weights({1: 1}, len(run.history)), run)
        names = {"member_photos", "member_list.csv", "member_00007", "member_00001", "plan.json"}
        assert {path.name for path in folder.iterdir()} == names
        assert (folder / "member_photos" / "a.jpg").read_text() == "mine"

    @pytest.mark.parametrize("name", ["member_00001/notes.txt", "member_00001", "plan.json"])
    def test_names_that_other_files_have(self, fused, name):
        folder, _, run = fused
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
        before = contents(folder)
        with pytest.raises(ValueError, match=r"not a member of a fused model|not a fmn_ref\.plan file"):
            save_fused(folder, fmn.FusionPlan.from_weights({1: 1}, len(run.history)), run)
        assert contents(folder) == before

    def test_an_older_model_if_a_checkpoint_is_damaged(self, fused):
        folder, plan, run = fused
        before = contents(folder)
        flip_bit(run.checkpoints[2])
        with pytest.raises(ValueError, match=re.escape(str(run.checkpoints[2]))):
            save_fused(folder, plan, run)
        assert contents(folder) == before
        assert not list(folder.glob(".*"))


def test_other_evaluations_are_not_recorded(trained, tmp_path):
    _, recorder, _ = trained
    other = sentences(33, 7)

    class Curious(TrainerCallback):
        """Evaluates the training set too, before the Trainer evaluates."""

        def on_epoch_end(self, args, state, control, **kwargs):
            trainer.evaluate(TRAIN, metric_key_prefix="train")
            trainer.predict(other)
            control.should_evaluate = True

    mine = RecorderCallback(tmp_path / "run", prefix="eval_val")
    data = TRAIN, {"other": other, "val": VAL}
    trainer = trainer_of(tmp_path, mine, data=data, num_train_epochs=2, eval_on_start=True, callbacks=[Curious()])
    trainer.evaluate(VAL)
    trainer.train()
    assert "peak_forget_fraction" not in str(trainer.evaluate(VAL))
    trainer.predict(VAL)
    assert mine.run.history.epochs == (0, STEPS, 2 * STEPS)
    np.testing.assert_array_equal(mine.run.history.correct()[1:], recorder.run.history.correct()[:2])
    keys = set().union(*trainer.state.log_history)
    assert {"eval_val_peak_forget_fraction", "eval_other_accuracy", "train_accuracy"} <= keys
    log = [e for e in trainer.state.log_history if "eval_other_accuracy" in e]
    assert ["eval_other_peak_forget_fraction" in e for e in log] == [True, False, False]  # 0, with nothing recorded yet


def test_budget_beside_save_total_limit(trained, tmp_path):
    _, recorder, _ = trained
    mine = RecorderCallback(tmp_path / "run", keep="budget:3", half=True)
    limits = {"save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    trainer_of(tmp_path, mine, **limits).train()
    np.testing.assert_array_equal(mine.run.history.correct(), recorder.run.history.correct())
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) <= 2
    kept = mine.run.kept
    assert len(kept.history) == 4
    np.testing.assert_array_equal(
        fmn.correctness(kept.probabilities(VAL)[:], labels_of(VAL)).mean(1).round(1),
        kept.history.correct().mean(1).round(1),
    )


def test_every_counts_evaluations_and_not_steps(trained, tmp_path):
    trainer, recorder, _ = trained
    epochs = recorder.run.history.epochs
    wanted = [epoch for row, epoch in enumerate(epochs) if row % 2 or epoch == epochs[-1]]
    mine = RecorderCallback(tmp_path / "run", keep="every:2")
    trainer_of(tmp_path, mine).train()
    later = from_trainer(trainer.args.output_dir, tmp_path / "later", classifier(), VAL, keep="every:2")
    for run in (mine.run, later):
        assert run.history.epochs == epochs
        assert list(run.kept.history.epochs) == wanted


def test_mixed_precision(tmp_path):
    recorder = RecorderCallback(tmp_path / "run")
    trainer = trainer_of(tmp_path, recorder, bf16=True, num_train_epochs=4)
    trainer.train()
    probs = recorder.run.probabilities(trainer.get_eval_dataloader())
    np.testing.assert_array_equal(fmn.correctness(probs[:], probs.labels), recorder.run.history.correct())


def test_lists_of_batches(trained, tmp_path):
    _, recorder, _ = trained
    mine = RecorderCallback(tmp_path / "run", keep="none")
    trainer_of(tmp_path, mine, num_train_epochs=2, eval_do_concat_batches=False).train()
    np.testing.assert_array_equal(mine.run.history.correct(), recorder.run.history.correct()[:2])
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_without_the_framework(monkeypatch):
    monkeypatch.delitem(sys.modules, "fmn_ref.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'transformers.*; pip install "fmn_ref\[transformers\]"'):
        importlib.import_module("fmn_ref.integrations.transformers")


def test_refused_arguments(tmp_path):
    with pytest.raises(ValueError, match="task: expected one of 'classification', 'causal_lm', got 'ner'"):
        RecorderCallback(tmp_path, task="ner")
    for keep in ("every:0", "budget:0", None):
        with pytest.raises(ValueError, match="keep: expected"):
            RecorderCallback(tmp_path, keep=keep)
    spans = SimpleNamespace(predictions=(np.zeros((3, 5)),) * 2, label_ids=(np.zeros(3, int),) * 2)
    with pytest.raises(ValueError, match=r"labels: expected shape \(n_samples,\), got shape \(2, 3\)"):
        RecorderCallback(tmp_path).compute_metrics(spans)
    several = SimpleNamespace(predictions=np.zeros((3, 5)), label_ids=np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"labels: expected shape \(n_samples,\), got shape \(3, 5\)$"):
        RecorderCallback(tmp_path).compute_metrics(several)
    with pytest.raises(ValueError, match="batch: expected a dict with a key 'labels'"):
        causal_lm_forward(gpt2(), (torch.zeros(1, 3),))


def test_refused_trainings(tmp_path, caplog, monkeypatch):
    def train(recorder, *args, resume=None, **changes):
        return trainer_of(tmp_path, recorder, *args, **({"num_train_epochs": 1} | changes)).train(resume)

    run = tmp_path / "run"
    with pytest.raises(ValueError, match="eval_strategy: 'no' evaluates nothing"):
        train(RecorderCallback(run), eval_strategy="no")
    with pytest.raises(ValueError, match="compute_metrics: the recorder's was not called"):
        train(RecorderCallback(run), compute_metrics=None)
    with pytest.raises(ValueError, match="task: expected 'causal_lm' for a GPT2LMHeadModel"):
        train(RecorderCallback(run), gpt2(), (texts(16, 1), texts(8, 2)), data_collator=collate)
    tokens = SimpleNamespace(predictions=np.zeros((4, 3), int), label_ids=np.zeros((4, 3), int))
    with pytest.raises(ValueError, match=r"labels: expected shape \(n_samples,\).*task='causal_lm'"):
        RecorderCallback(run).compute_metrics(tokens)  # of a class with another name
    with pytest.raises(ValueError, match=r"labels: expected shape \(n_sequences, n_tokens\), got \(90,\)"):
        train(RecorderCallback(run, task="causal_lm"))
    broken = classifier()
    broken.classifier.bias.data[1] = np.nan
    with pytest.raises(ValueError, match="NaN for sample 0"):
        train(RecorderCallback(run), broken, logging_nan_inf_filter=False)
    with caplog.at_level(logging.WARNING):
        train(RecorderCallback(run, prefix="eval_val"))
    assert "nothing was recorded: no evaluation called 'eval_val'" in caplog.text
    with pytest.raises(ValueError, match=r"prefix: no evaluation is called 'eval_val', only \['eval'\]"):
        train(RecorderCallback(run, prefix="eval_val"), num_train_epochs=2)
    with monkeypatch.context() as patch:
        state = SimpleNamespace(distributed_type="FSDP")
        patch.setattr("fmn_ref.integrations.transformers.AcceleratorState", lambda: state)
        with pytest.raises(ValueError, match="keep: no process has all weights"):
            train(RecorderCallback(run))

    train(RecorderCallback(run))
    assert fmn.Run.open(run).history.epochs == (STEPS,)
    with pytest.raises(ValueError, match="holds a run, and the Trainer starts at step 0"):
        train(RecorderCallback(run))
    train(RecorderCallback(run, overwrite=True), num_train_epochs=2)
    assert fmn.Run.open(run).history.epochs == (STEPS, 2 * STEPS)
    with pytest.raises(ValueError, match=r"lacks the checkpoint's steps \[6, 12\]"):
        train(RecorderCallback(tmp_path / "other"), resume=True, num_train_epochs=3)
    other = fmn.Recorder(tmp_path / "other")
    for step in (6, 18):
        other.record_correct(step, [True], [0])
    with pytest.raises(ValueError, match=r"lacks the checkpoint's steps \[12\]"):
        train(RecorderCallback(tmp_path / "other"), resume=True, num_train_epochs=3)
    assert fmn.Run.open(tmp_path / "other").history.epochs == (6, 18)  # nothing was dropped
    other.rewind(0)
    for step, right in ((6, True), (12, False), (18, False)):
        other.record_correct(step, [right], [0])
    with pytest.raises(ValueError, match="is another run's: it differs from what the checkpoint logged"):
        train(RecorderCallback(tmp_path / "other"), resume=True, num_train_epochs=3)
    assert fmn.Run.open(tmp_path / "other").history.epochs == (6, 12, 18)
    with pytest.raises(ValueError, match="labels: not the labels"):
        train(RecorderCallback(run), data=(TRAIN, sentences(90, 11)), resume=True, num_train_epochs=3)
    assert fmn.Run.open(run).history.epochs == (STEPS, 2 * STEPS)
    caplog.clear()
    train(RecorderCallback(run), resume=True, num_train_epochs=2)  # nothing is left to train
    assert "nothing" not in caplog.text
    fmn.Recorder(run).record_correct(5 * STEPS, np.ones(90, bool), labels_of(VAL))
    train(RecorderCallback(run), resume=True, num_train_epochs=2)
    assert f"dropped steps [{5 * STEPS}], recorded after the checkpoint" in caplog.text
    own = RecorderCallback(tmp_path / "own")

    class Own(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            trainer.evaluate(TRAIN[:9], metric_key_prefix="train")

    trainer = trainer_of(
        tmp_path, own, callbacks=[Own()], num_train_epochs=4, eval_strategy="steps", eval_steps=2 * STEPS
    )
    trainer.train()
    assert own.run.history.epochs == (2 * STEPS, 4 * STEPS)
    recorder = RecorderCallback(tmp_path / "forgotten")
    trainer = trainer_of(tmp_path, recorder, num_train_epochs=1)
    trainer.remove_callback(recorder)
    trainer.train()
    assert "nothing is recorded, pass callbacks=[recorder]" in caplog.text


class Intruder(TrainerCallback):
    """Another process records while the training goes on."""

    def on_evaluate(self, args, state, control, **kwargs):
        self.outcome = record_in_another_process(Path(args.output_dir).parent / "run", 900, labels_of(VAL))


def test_another_process_records_after_the_training(tmp_path, caplog):
    """The folder is locked while it goes on, and free after its end or a refusal; then the training resumes."""
    run, intruder = tmp_path / "run", Intruder()
    trainer_of(tmp_path, RecorderCallback(run), callbacks=[intruder], num_train_epochs=1).train()
    assert re.search(r"run_dir: process \d+ on .* writes in", intruder.outcome)
    assert record_in_another_process(run, 900, labels_of(VAL)) == ""
    with pytest.raises(ValueError, match="holds a run, and the Trainer starts at step 0"):
        trainer_of(tmp_path, RecorderCallback(run), num_train_epochs=1).train()
    assert record_in_another_process(run, 901, labels_of(VAL)) == ""
    mine = RecorderCallback(run)
    trainer_of(tmp_path, mine, num_train_epochs=2).train(resume_from_checkpoint=True)
    assert "dropped steps [900, 901], recorded after the checkpoint" in caplog.text
    assert mine.run.history.epochs == (STEPS, 2 * STEPS)
    from_trainer(tmp_path / "out", tmp_path / "imported", classifier(), VAL)
    assert record_in_another_process(tmp_path / "imported", 900, labels_of(VAL)) == ""


KILLS = ("on_evaluate", 6), ("on_step_end", 11), ("on_evaluate", 15), ("on_save", 20), ("on_train_end", 36)


class Kill(TrainerCallback):
    """SIGKILL at an event of a step; it comes after the recorder."""

    def __init__(self, event, step):
        def die(args, state, control, **kwargs):
            if state.global_step == step:
                os.kill(os.getpid(), signal.SIGKILL)

        setattr(self, event, die)


def attempt(folder, kill=()):
    """Evaluate every 3 steps, save every 4; go on from the last checkpoint, if there is one."""
    spacing = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 4}
    recorder = RecorderCallback(folder / "run", overwrite=True)
    trainer = trainer_of(folder, recorder, callbacks=[Kill(*kill)] if kill else [], num_train_epochs=6, **spacing)
    out = folder / "out"
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)
    lines = [(e["step"], e["eval_accuracy"], e["eval_peak_forget_fraction"]) for e in evaluations(trainer)]
    (folder / "log.txt").write_text(repr(lines))


def kills(folder):
    """An unbroken training, and one that is killed again and again; each in a process of its own."""
    for name, kill in [("unbroken", ()), *(("killed", k) for k in KILLS), ("killed", ())]:
        (folder / name).mkdir(exist_ok=True)
        child = os.fork()  # from here, so that Transformers is imported once
        if not child:
            attempt(folder / name, kill)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.waitstatus_to_exitcode(status) == (-signal.SIGKILL if kill else 0), (name, kill)


def run_this_file(folder, job, *launcher):
    command = [sys.executable, *launcher, __file__, str(folder), job]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_killed_and_resumed(tmp_path):
    run_this_file(tmp_path, "kills")
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    assert (unbroken / "run" / "history.fmnh").read_bytes() == (killed / "run" / "history.fmnh").read_bytes()
    assert (unbroken / "log.txt").read_text() == (killed / "log.txt").read_text()
    a, b = (fmn.Run.open(f / "run", classifier()) for f in (unbroken, killed))
    assert a.history.epochs == b.history.epochs == tuple(range(3, 37, 3))
    names = [sorted(p.name for p in (f / "run" / "checkpoints").iterdir()) for f in (unbroken, killed)]
    assert names[0] == names[1]
    for ours, theirs in zip(a.checkpoints, b.checkpoints, strict=True):
        ours, theirs = torch.load(ours), torch.load(theirs)
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    y = labels_of(VAL)
    plans = [fmn.fuse(run.probabilities(VAL), y, correct=run.history) for run in (a, b)]
    assert plans[0] == plans[1]


def processes(folder):
    """In each of two processes: an evaluation set that they cannot share evenly."""
    recorder = RecorderCallback(folder / "run")
    options = {"ddp_backend": "gloo", "per_device_train_batch_size": 8, "per_device_eval_batch_size": 16}
    options |= {"metric_for_best_model": "peak_forget_fraction", "load_best_model_at_end": True}
    trainer = trainer_of(folder, recorder, data=(TRAIN, Samples(VAL.samples[:-3])), num_train_epochs=4, **options)
    assert trainer.args.world_size == 2
    trainer.train()
    rank = trainer.args.process_index
    lines = [(e["step"], e["eval_peak_forget_fraction"]) for e in evaluations(trainer)]
    (folder / f"{rank}.txt").write_text(repr(lines))


def test_two_processes(tmp_path):
    run_this_file(tmp_path, "processes", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    run = fmn.Run.open(tmp_path / "run", classifier())
    val = Samples(VAL.samples[:-3])
    assert run.history.epochs == (STEPS, 2 * STEPS, 3 * STEPS, 4 * STEPS)
    np.testing.assert_array_equal(fmn.correctness(run.probabilities(val)[:], labels_of(val)), run.history.correct())
    assert (tmp_path / "0.txt").read_text() == (tmp_path / "1.txt").read_text()


def test_the_guide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    training, fusing, use, averaging, lm, existing = blocks(GUIDE)
    assert n_lines(training) <= 10
    names = {"model": classifier(), "args": arguments(tmp_path), "train_set": TRAIN, "val_set": VAL, "Trainer": Trainer}
    exec(training, names)
    exec(fusing, names)
    names["input_ids"] = torch.stack([s["input_ids"] for s in VAL])
    exec(use, names)
    exec(averaging, names)
    accuracy = (names["log_probs"].argmax(1).numpy() == labels_of(VAL)).mean()
    assert accuracy == names["plan"].accuracy[-1] > names["plan"].accuracy[0]
    assert names["averaged"](names["input_ids"]).logits.shape == (90, 4)
    exec(lm, names)
    assert names["rec"].task == "causal_lm"
    exec(existing, names)
    assert len(names["run"].history) == 12
    student = fmn.distill(classifier(1), names["fused"], TRAIN, epochs=1, optimizer="adamw", lr=1e-3, progress=False)
    assert student(names["input_ids"]).logits.shape == (90, 4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"kills": kills, "processes": processes}[sys.argv[2]](Path(sys.argv[1]))


def test_from_checkpoints_reads_what_a_trainer_saved(trained, tmp_path):
    """The same run as the callback's, from the Trainer's folders as they are; nothing is copied."""
    trainer, recorder, _ = trained
    out = Path(trainer.args.output_dir)
    run = fmn.from_checkpoints(out, classifier(5), VAL, tmp_path / "run")
    assert run.history.epochs == recorder.run.history.epochs
    np.testing.assert_array_equal(run.history.correct(), recorder.run.history.correct())
    np.testing.assert_array_equal(run.probabilities(VAL)[3], recorder.run.probabilities(VAL)[3])
    assert {path.suffix for path in (tmp_path / "run" / "checkpoints").iterdir()} == {".json"}
    whole = BertForSequenceClassification.from_pretrained(out / "checkpoint-6")
    whole.save_pretrained(tmp_path / "shards" / "checkpoint-6", max_shard_size="4KB")
    shards = fmn.from_checkpoints(tmp_path / "shards", classifier(5), VAL, tmp_path / "run2")
    np.testing.assert_array_equal(shards.history.correct(), recorder.run.history.correct()[:1])


def test_from_checkpoints_reads_tied_weights_of_a_causal_model(tmp_path):
    model = gpt2(3)
    model.save_pretrained(tmp_path / "out" / "checkpoint-9")
    batches = [collate([texts(30, 2)[i] for i in range(30)])]
    run = fmn.from_checkpoints(tmp_path / "out", gpt2(7), batches, tmp_path / "run", forward_fn=causal_lm_forward)
    with torch.no_grad():
        logits, labels = causal_lm_forward(model.eval(), batches[0])
    np.testing.assert_array_equal(run.history.correct(), [fmn.correctness(logits, labels)])


def test_from_checkpoints_reads_what_accelerate_saved(tmp_path):
    accelerate = importlib.import_module("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(Plain())
    expected = []
    for epoch in range(3):
        torch.nn.init.normal_(accelerator.unwrap_model(model).table.weight)
        accelerator.save_state(tmp_path / "saved" / f"checkpoint_{epoch}")
        with torch.no_grad():
            logits = model.eval()(torch.stack([s["input_ids"] for s in VAL]))
        expected.append(fmn.correctness(logits, labels_of(VAL)))
    run = fmn.from_checkpoints(tmp_path / "saved", Plain(), VAL, tmp_path / "run")
    assert run.history.epochs == (0, 1, 2)
    np.testing.assert_array_equal(run.history.correct(), expected)
