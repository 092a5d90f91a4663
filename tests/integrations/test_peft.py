"""Adapters of PEFT: the same histories as merged networks, one base in memory and in no file."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("accelerate")

import torch  # noqa: E402
from pages import blocks  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.utils.data import Dataset  # noqa: E402
from transformers import (  # noqa: E402
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import fmn_ref as fmn  # noqa: E402
from fmn_ref.integrations.generation import generate  # noqa: E402
from fmn_ref.integrations.peft import averaged_adapter, load_fused, save_fused  # noqa: E402
from fmn_ref.integrations.transformers import RecorderCallback, causal_lm_forward, from_trainer  # noqa: E402
from fmn_ref.training.data import forward  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
GUIDE = (Path(__file__).parents[2] / "docs" / "integrations" / "peft.md").read_text()
STEPS, EPOCHS = 4, 8
# Warnings of peft: it calls what Transformers renamed, and looks for the vocabulary of a base that has no name
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing", "ignore:Could not find a config file", "ignore:Setting .save_embedding_layers"
)


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return BertForSequenceClassification(BertConfig(vocab_size=44, max_position_embeddings=8, num_labels=4, **sizes))


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=16, n_embd=16, n_layer=2, n_head=2))


class Samples(Dataset):
    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


def sentences(n, seed):
    """The first token tells the class, four times in five."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 40, (n, 6)), rng.integers(0, 4, n)
    x[:, 0] = 40 + np.where(rng.random(n) < 0.8, y, rng.integers(0, 4, n))
    return Samples([{"input_ids": torch.tensor(a), "labels": torch.tensor(b)} for a, b in zip(x, y, strict=True)])


def texts(n, seed):
    """A token tells the next one, four times in five."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 20, (n, 9))
    for i in range(1, 9):
        x[:, i] = np.where(rng.random(n) < 0.8, (3 * x[:, i - 1] + 1) % 20, x[:, i])
    return Samples([{"input_ids": torch.tensor(a), "labels": torch.tensor(a)} for a in x])


KINDS = {
    "bert": (bert, sentences, None, {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}),
    "gpt2": (gpt2, texts, causal_lm_forward, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
}
KINDS["gpt2"][3]["task_type"] = "CAUSAL_LM"


def adapted(kind, make=peft.LoraConfig, **changes):
    make_base, _, _, options = KINDS[kind]
    base = make_base()
    torch.manual_seed(1)
    lora = {"r": 4, "lora_alpha": 16} if make is peft.LoraConfig else {}
    return peft.get_peft_model(base, make(**(lora | options | changes)))


def train(folder, kind, model, **changes):
    task = "classification" if kind == "bert" else "causal_lm"
    recorder = RecorderCallback(folder / "recorded", task=task)
    options = {"num_train_epochs": EPOCHS, "learning_rate": 3e-2, "eval_strategy": "epoch", "save_strategy": "epoch"}
    options |= {"per_device_train_batch_size": 16, "per_device_eval_batch_size": 32, "lr_scheduler_type": "constant"}
    options |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "seed": 3}
    args = TrainingArguments(str(folder / "out"), label_names=["labels"], **(options | changes))
    data = KINDS[kind][1]
    trainer = Trainer(
        model,
        args,
        train_dataset=data(16 * STEPS, 1),
        eval_dataset=data(60, 2),
        callbacks=[recorder],
        compute_metrics=recorder.compute_metrics,
        preprocess_logits_for_metrics=recorder.preprocess_logits,
    )
    trainer.train()
    return recorder


@pytest.fixture(scope="module", params=list(KINDS))
def trained(request, tmp_path_factory):
    """(kind, folder of the Trainer, recorder) of a training with LoRA."""
    folder = tmp_path_factory.mktemp(request.param)
    recorder = train(folder, request.param, adapted(request.param))
    return request.param, folder / "out", recorder


def imported(kind, out, run_dir, model=None, **options):
    _, data, forward_fn, _ = KINDS[kind]
    return fmn.from_checkpoints(out, model or adapted(kind), data(60, 2), run_dir, forward_fn=forward_fn, **options)


def step(run_or_path, i):
    return sorted(run_or_path.glob("checkpoint-*"), key=lambda p: int(p.name[11:]))[i]


def merged(kind, folder):
    """The oracle: peft's own reader and its own merge."""
    return peft.PeftModel.from_pretrained(KINDS[kind][0](), folder).merge_and_unload()


def storages(*modules):
    """Bytes of each storage that parameters or buffers use."""
    tensors = [t for m in modules for t in (*m.parameters(), *m.buffers())]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def test_history_of_adapters_is_that_of_merged_networks(trained, tmp_path):
    """Bit for bit; probabilities to the rounding of the merge, 1e-5."""
    kind, out, recorder = trained
    for folder in out.glob("checkpoint-*"):
        torch.save(merged(kind, folder).state_dict(), tmp_path / f"step_{folder.name[11:]}.pt")
    _, data, forward_fn, _ = KINDS[kind]
    full = fmn.from_checkpoints(tmp_path, KINDS[kind][0](), data(60, 2), tmp_path / "full", forward_fn=forward_fn)
    run = imported(kind, out, tmp_path / "run")
    assert run.history.epochs == full.history.epochs == tuple(STEPS * (i + 1) for i in range(EPOCHS))
    np.testing.assert_array_equal(run.history.correct(), full.history.correct())
    np.testing.assert_array_equal(run.history.correct(), recorder.run.history.correct())
    task = "causal_lm" if forward_fn else "classification"
    copied = from_trainer(out, tmp_path / "copied", adapted(kind), data(60, 2), task=task)
    np.testing.assert_array_equal(run.history.correct(), copied.history.correct())
    assert torch.load(copied.checkpoints[0]).keys() == state_names(out).keys()
    assert len({row.tobytes() for row in run.history.correct()}) > 2
    for row in (0, -1):
        expected = full.probabilities(data(60, 2))[row]
        np.testing.assert_allclose(run.probabilities(data(60, 2))[row], expected, atol=1e-5)
        np.testing.assert_allclose(recorder.run.probabilities(data(60, 2))[row], expected, atol=1e-5)


def test_the_recorder_stores_adapters_without_the_base(trained):
    _, out, recorder = trained
    for path, folder in zip(recorder.run.checkpoints, (step(out, i) for i in range(EPOCHS)), strict=True):
        ours, theirs = torch.load(path), load_file(folder / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def fused_of(run):
    """All eight adapters, with weights that differ."""
    plan = fmn.FusionPlan.from_weights({row: row + 1 for row in range(EPOCHS)}, EPOCHS)
    return plan, fmn.FusedModel(plan, run)


def predictions(network, kind):
    """Log-probabilities, (60, 4) of a classifier and (480, 20) of a language model's tokens."""
    batch = {"input_ids": inputs(kind), "labels": inputs(kind) if kind == "gpt2" else torch.zeros(60, dtype=torch.long)}
    with torch.no_grad():
        return forward(network.eval(), batch, KINDS[kind][2])[0].log_softmax(-1)


def inputs(kind):
    return torch.stack([s["input_ids"] for s in KINDS[kind][1](60, 2)])


def mixture(kind, out):
    """Log-probabilities of the plan of `fused_of`, by merged networks."""
    with torch.no_grad():
        logits = [merged(kind, step(out, i)).eval()(inputs(kind)).logits for i in range(EPOCHS)]
    if kind == "gpt2":
        logits = [x[:, :-1].flatten(0, 1) for x in logits]
    return sum((i + 1) / 36 * x.softmax(-1) for i, x in enumerate(logits)).log()


def test_what_is_no_fused_model_is_not_replaced(trained, tmp_path):
    kind, out, _ = trained
    run = imported(kind, out, tmp_path / "run")
    other = tmp_path / "fused" / "member_00001"
    other.mkdir(parents=True)
    (other / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="member_00001: not a member of a fused model"):
        save_fused(tmp_path / "fused", fmn.FusionPlan.from_weights({1: 1}, EPOCHS), run)
    assert [p.name for p in (tmp_path / "fused").rglob("*")] == ["member_00001", "thesis.txt"]
    save_fused(tmp_path / "fused", fmn.FusionPlan.from_weights({2: 1}, EPOCHS), run)
    save_fused(tmp_path / "fused", fmn.FusionPlan.from_weights({3: 1}, EPOCHS), run)
    names = sorted(p.name for p in (tmp_path / "fused").iterdir())
    assert names == ["member_00001", "member_00003", "plan.json"]


def test_a_fused_model_is_the_mixture_with_one_base_in_memory(trained, tmp_path):
    kind, out, _ = trained
    model = adapted(kind)
    base = storages(model)
    run = imported(kind, out, tmp_path / "run", model)
    adapter = sum(load_file(step(out, 0) / "adapter_model.safetensors")[n].nbytes for n in state_names(out))
    _, fused = fused_of(run)
    np.testing.assert_allclose(predictions(fused, kind), mixture(kind, out), atol=1e-4)
    own = {key: size for key, size in storages(fused.members).items() if key not in base}
    assert sum(own.values()) == 8 * adapter
    assert len(storages(fused.members, model)) == len(base) + len(own)
    assert sum(storages(fused.members).values()) == sum(base.values()) + 7 * adapter


def state_names(out):
    return load_file(step(out, 0) / "adapter_model.safetensors")


def test_saved_and_loaded_without_the_base(trained, tmp_path):
    kind, out, _ = trained
    run = imported(kind, out, tmp_path / "run")
    plan, fused = fused_of(run)
    save_fused(tmp_path / "fused", plan, run)
    for row in range(EPOCHS):
        ours = load_file(tmp_path / "fused" / f"member_{row:05d}" / "adapter_model.safetensors")
        theirs = load_file(step(out, row) / "adapter_model.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    base = KINDS[kind][0]()
    loaded = load_fused(tmp_path / "fused", base)
    assert torch.equal(predictions(loaded, kind), predictions(fused, kind))
    assert loaded.plan == plan
    shared = storages(base).keys() & storages(loaded.members).keys()
    assert len(shared) >= len(storages(KINDS[kind][0]()))


def test_the_network_of_the_user_does_not_change(trained, tmp_path):
    kind, out, _ = trained
    model = adapted(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run = imported(kind, out, tmp_path / "run", model)
    fused_of(run)
    assert len(run.probabilities(KINDS[kind][1](60, 2))[:]) == EPOCHS
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert any(p.requires_grad for p in model.parameters())


def test_copies_in_the_run_instead_of_references(trained, tmp_path):
    kind, out, _ = trained
    run = imported(kind, out, tmp_path / "run", link=False)
    again = imported(kind, out, tmp_path / "run", link=False)
    np.testing.assert_array_equal(run.history.correct(), again.history.correct())
    assert torch.load(run.checkpoints[0]).keys() == state_names(out).keys()
    opened = fmn.Run.open(tmp_path / "run", adapted(kind), KINDS[kind][2])
    data = KINDS[kind][1](60, 2)
    np.testing.assert_array_equal(opened.probabilities(data)[0], run.probabilities(data)[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"rank_pattern": {"value": 2}, "alpha_pattern": {"query": 5}},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"modules_to_save": ["LayerNorm"]},
        {"target_modules": "all-linear"},
        {"target_modules": ["word_embeddings", "query"]},
        {"trainable_token_indices": {"word_embeddings": [40, 41, 42, 43]}},
        {"layers_to_transform": [1]},
        {"make": peft.LoHaConfig},
        {"make": peft.LoKrConfig},
        {"make": peft.IA3Config, "feedforward_modules": []},
        {"make": peft.VeraConfig},
        {"make": peft.OFTConfig, "oft_block_size": 4},
    ],
    ids=str,
)
def test_every_kind_of_adapter(tmp_path, changes):
    out = tmp_path / "out"
    recorder = train(tmp_path, "bert", adapted("bert", **changes), num_train_epochs=2)
    run = imported("bert", out, tmp_path / "run", adapted("bert", **changes))
    x = inputs("bert")
    for i in range(2):
        network = peft.PeftModel.from_pretrained(bert(), step(out, i)).eval()
        with torch.no_grad():
            expected = network(x).logits.softmax(-1)
        for found in (run, recorder.run):
            np.testing.assert_allclose(found.probabilities(sentences(60, 2))[i], expected, atol=1e-6)
    np.testing.assert_array_equal(run.history.correct(), recorder.run.history.correct())
    plan = fmn.FusionPlan.from_weights({0: 1, 1: 3}, 2)
    save_fused(tmp_path / "fused", plan, run)
    with torch.no_grad():
        expected = fmn.FusedModel(plan, run)(x)
        np.testing.assert_allclose(load_fused(tmp_path / "fused", bert())(x), expected, atol=1e-6)


def test_the_average_adds_the_mean_of_what_the_adapters_add(trained, tmp_path):
    """Oracle: base + sum of weight_i * (merged_i - base), matrix by matrix."""
    kind, out, _ = trained
    run = imported(kind, out, tmp_path / "run")
    if kind == "bert":  # its classifier is trained beside the adapter
        with pytest.raises(ValueError, match=r"modules_to_save=\['classifier', 'score'\] wrongly"):
            averaged_adapter(run, {0: 1, 5: 3})
        return
    averaged = averaged_adapter(run, {0: 1, 5: 3})
    base, parts = gpt2().state_dict(), [merged(kind, step(out, i)).state_dict() for i in (0, 5)]
    expected = {n: base[n] + 0.25 * (parts[0][n] - base[n]) + 0.75 * (parts[1][n] - base[n]) for n in base}
    averaged.save_pretrained(tmp_path / "averaged")
    loaded = peft.PeftModel.from_pretrained(gpt2(), tmp_path / "averaged").merge_and_unload().state_dict()
    for name in expected:
        np.testing.assert_allclose(loaded[name], expected[name], atol=1e-5, err_msg=name)
    factors = [load_file(step(out, i) / "adapter_model.safetensors") for i in (0, 5)]
    assert any((factors[0][n] - factors[1][n]).abs().max() > 0.05 for n in factors[0])
    small = averaged_adapter(run, {0: 1, 5: 3}, rank=6)
    assert small.peft_config["default"].r == 6
    assert list(small.peft_config) == list(averaged.peft_config) == ["default"]
    exact, near = (m(inputs(kind)).logits for m in (averaged, small))
    assert 0 < (exact - near).abs().max() < 0.5


@pytest.mark.parametrize("changes", [{"use_rslora": True}, {"use_dora": True}, {"bias": "lora_only"}], ids=str)
def test_averages_that_peft_would_compute_wrongly_are_refused(tmp_path, changes):
    train(tmp_path, "gpt2", adapted("gpt2", **changes), num_train_epochs=1)
    run = imported("gpt2", tmp_path / "out", tmp_path / "run", adapted("gpt2", **changes))
    with pytest.raises(ValueError, match=next(iter(changes))):
        averaged_adapter(run, {0: 1})
    with pytest.raises(ValueError, match="factor of a product"):
        fmn.averaged_model(two_rows(run, tmp_path), {0: 1, 1: 1}, None)


def two_rows(run, tmp_path):
    for i in (1, 2):
        state = load_file(step(tmp_path / "out", 0) / "adapter_model.safetensors")
        (tmp_path / "two" / f"checkpoint-{i}").mkdir(parents=True)
        save_file(
            {n: i * value for n, value in state.items()},
            tmp_path / "two" / f"checkpoint-{i}" / "adapter_model.safetensors",
        )
    return fmn.from_checkpoints(
        tmp_path / "two", run.model, texts(60, 2), tmp_path / "run2", forward_fn=causal_lm_forward
    )


def test_distillation_into_one_adapter(trained, tmp_path):
    kind, out, _ = trained
    _, data, forward_fn, _ = KINDS[kind]
    model = adapted(kind)
    run = imported(kind, out, tmp_path / "run", model)
    _, fused = fused_of(run)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    student = fmn.distill(
        model,
        fused,
        data(64, 1),
        epochs=20,
        optimizer="adamw",
        lr=3e-2,
        forward_fn=forward_fn,
        batch_size=16,
        progress=False,
    )
    assert student is model
    assert all(torch.equal(dict(model.named_parameters())[name], value) for name, value in frozen.items())
    teacher = predictions(fused, kind)
    np.testing.assert_allclose(teacher, mixture(kind, out), atol=1e-4)  # the student trained its own adapter alone
    near, far = ((predictions(m, kind).exp() - teacher.exp()).abs().mean() for m in (student, adapted(kind)))
    assert near < 0.6 * far


def test_another_adapter_is_refused_by_name(trained, tmp_path):
    kind, out, _ = trained
    with pytest.raises(ValueError, match=r"adapter_config\.json: settings of another .*lora_alpha 16 there, 8 here"):
        imported(kind, out, tmp_path / "run", adapted(kind, lora_alpha=8))
    with pytest.raises(ValueError, match="it is an adapter, for PeftModel"):
        imported(kind, out, tmp_path / "run", KINDS[kind][0]())
    merging = adapted(kind)
    merging.merge_adapter()
    with pytest.raises(ValueError, match="an adapter is merged into"):
        imported(kind, out, tmp_path / "run", merging)
    assert not (tmp_path / "run").exists()
    with pytest.raises(TypeError, match="base: expected a network without adapter"):
        load_fused(tmp_path, adapted(kind))


def test_damaged_and_missing_members_are_named(trained, tmp_path):
    kind, out, _ = trained
    run = imported(kind, out, tmp_path / "run")
    save_fused(tmp_path / "fused", fmn.FusionPlan.from_weights({1: 1, 2: 1}, EPOCHS), run)
    path = tmp_path / "fused" / "member_00002" / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:100])
    with pytest.raises(ValueError, match="member_00002"):
        load_fused(tmp_path / "fused", KINDS[kind][0]())
    path.unlink()
    with pytest.raises(FileNotFoundError, match="member_00002"):
        load_fused(tmp_path / "fused", KINDS[kind][0]())


def test_what_is_trained_beside_the_adapter_is_stored_too(tmp_path):
    model = adapted("gpt2")
    model.base_model.model.transformer.ln_f.weight.requires_grad_(True)
    recorder = train(tmp_path, "gpt2", model, num_train_epochs=1)
    assert torch.load(recorder.run.checkpoints[0]).keys() == model.state_dict().keys()
    with pytest.raises(TypeError, match="more than its adapter is trained"):
        save_fused(tmp_path / "fused", fmn.FusionPlan.from_weights({0: 1}, 1), recorder.run)


class Convolution(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.norm(self.a(x)).mean((2, 3)))


def test_running_statistics_of_the_base_are_stored_too(tmp_path):
    """A training changes them, and the adapter's file does not hold them."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 3, 8, 8), torch.arange(64) % 2
    model = peft.get_peft_model(Convolution(), peft.LoraConfig(target_modules=["a"], modules_to_save=["b"]))
    recorder, optimizer = fmn.Recorder(tmp_path / "run", model), torch.optim.SGD(model.parameters(), 0.1)
    for epoch in range(3):
        torch.nn.functional.cross_entropy(model.train()(x), y).backward()
        optimizer.step()
        with torch.no_grad():
            recorder.record(epoch, model.eval()(x), y)
    probs = recorder.run.probabilities((x, y))
    np.testing.assert_array_equal(fmn.correctness(probs[:], y), recorder.run.history.correct())
    assert any("running_mean" in name for name in torch.load(recorder.run.checkpoints[0]))
    for epoch in range(2):
        model.save_pretrained(tmp_path / "out" / f"checkpoint-{epoch}")
    with pytest.raises(ValueError, match=r"missing .* it is an adapter, and more of the model is trained: .*BatchNorm"):
        fmn.from_checkpoints(tmp_path / "out", model, (x, y), tmp_path / "imported")


def test_a_training_of_ours_stores_the_network_and_shares_the_base(tmp_path):
    model = adapted("bert")
    options = {"epochs": 3, "optimizer": "adamw", "lr": 3e-2, "progress": False, "half": True}
    run = fmn.train(model, sentences(64, 1), sentences(60, 2), run_dir=tmp_path / "run", **options)
    probs = run.probabilities(sentences(60, 2))
    assert (fmn.correctness(probs[:], probs.labels) == run.history.correct()).mean() > 0.98  # rounded to 16 bits
    fused = fmn.FusedModel(fmn.FusionPlan.from_weights({0: 1, 2: 3}, 3), run)
    assert len(storages(fused.members)) < 1.5 * len(storages(model))
    fused.save(tmp_path / "fused")
    loaded = fmn.FusedModel.load(tmp_path / "fused", adapted("bert"))
    assert torch.equal(loaded(inputs("bert")), fused(inputs("bert")))


def test_several_active_adapters_are_refused(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["query"])
    model = peft.get_peft_model(bert(), config)
    model.add_adapter("other", config)
    fmn.Recorder(tmp_path / "one", model).record_correct(0, [True, False], [0, 1])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="expected one active adapter, got"):
        fmn.Recorder(tmp_path / "two", model).record_correct(0, [True, False], [0, 1])


def test_evaluation_has_one_base_in_memory(trained, tmp_path):
    """Each network that a forward_fn sees uses the tensors of the user's base."""
    kind, out, _ = trained
    model, used = adapted(kind), set()
    default = KINDS[kind][2] or (lambda network, batch: (network(batch["input_ids"]).logits, batch["labels"]))

    def forward_fn(network, batch):
        used.update(storages(network))
        return default(network, batch)

    run = fmn.from_checkpoints(out, model, KINDS[kind][1](60, 2), tmp_path / "run", forward_fn=forward_fn)
    assert len(run.probabilities(KINDS[kind][1](60, 2))[:]) == EPOCHS
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters() if not p.requires_grad}
    assert frozen <= used
    assert len(used - storages(model).keys()) <= 2 * (len(storages(model)) - len(frozen))  # two copies of an adapter


def test_another_base_in_a_checkpoint_is_refused(tmp_path):
    """`train` stores the whole network; its base is compared, and never loaded into one that others share."""
    model = adapted("gpt2")
    recorder = fmn.Recorder(tmp_path / "run", model, forward_fn=causal_lm_forward)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    labels = np.arange(3)
    recorder.record_correct(0, [True, True, False], labels, weights=state)
    changed = state | {"base_model.model.transformer.ln_f.weight": torch.zeros(16)}
    recorder.record_correct(1, [True, True, False], labels, weights=changed)
    fmn.FusedModel(fmn.FusionPlan.from_weights({0: 1}, 2), recorder.run)
    with pytest.raises(ValueError, match=r"ln_f\.weight of the base is another than the model's"):
        fmn.FusedModel(fmn.FusionPlan.from_weights({1: 1}, 2), recorder.run)


@pytest.fixture(scope="module")
def speaker(tmp_path_factory):
    """A fused GPT-2 of eight adapters, and merged networks with their weights for a plain loop."""
    folder = tmp_path_factory.mktemp("speaker")
    train(folder, "gpt2", adapted("gpt2"))
    run = imported("gpt2", folder / "out", folder / "run")
    networks = [merged("gpt2", step(folder / "out", i)).eval() for i in range(EPOCHS)]
    return fused_of(run)[1], networks


PROMPTS = torch.tensor([[0, 0, 3, 10], [5, 7, 2, 1], [0, 9, 9, 8]])
MASK = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]])


def next_token_probabilities(networks, ids, mask):
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = [n(ids, attention_mask=mask, position_ids=positions).logits[:, -1] for n in networks]
    return sum((i + 1) / 36 * x.softmax(-1) for i, x in enumerate(logits))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("do_sample", [True, False])
def test_generate_is_the_plain_loop(speaker, use_cache, do_sample):
    fused, networks = speaker
    ids, mask = PROMPTS, MASK
    torch.manual_seed(7)
    for _ in range(8):
        probs = next_token_probabilities(networks, ids, mask)
        new = torch.multinomial(probs, 1) if do_sample else probs.argmax(1, keepdim=True)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    options = {"max_new_tokens": 8, "do_sample": do_sample, "use_cache": use_cache, "eos_token_id": None}
    options |= {"top_k": 0, "pad_token_id": 0} if do_sample else {"pad_token_id": 0}
    torch.manual_seed(7)
    assert torch.equal(generate(fused, PROMPTS, attention_mask=MASK, **options), ids)
    alone = networks[-1].generate(PROMPTS, attention_mask=MASK, **(options | {"do_sample": False}))
    assert not torch.equal(alone, ids)
    assert not networks[0]._forward_hooks
    assert not any(m._forward_hooks for m in fused.modules())


def test_beams_have_the_scores_of_the_mixture(speaker):
    fused, networks = speaker
    options = {"max_new_tokens": 6, "num_beams": 3, "pad_token_id": 0, "eos_token_id": None, "length_penalty": 0.0}
    options |= {"return_dict_in_generate": True, "output_scores": True, "num_return_sequences": 2, "do_sample": False}
    found = generate(fused, PROMPTS, attention_mask=MASK, **options)
    again = generate(fused, PROMPTS, attention_mask=MASK, use_cache=False, **options)
    assert torch.equal(found.sequences, again.sequences)
    mask = MASK.repeat_interleave(2, 0)
    total = torch.zeros(6)
    for t in range(4, 10):
        probs = next_token_probabilities(networks, found.sequences[:, :t], mask)
        total += probs.gather(1, found.sequences[:, t : t + 1])[:, 0].log()
        mask = torch.cat([mask, torch.ones(6, 1, dtype=torch.long)], 1)
    np.testing.assert_allclose(found.sequences_scores, total, atol=1e-4)


def test_generate_of_networks_without_adapters_and_of_a_log_linear_pool(speaker):
    _, networks = speaker
    plan = fmn.FusionPlan.from_weights({0: 0.5, 1: 1.5}, 2, "geometric")
    fused = fmn.FusedModel.of_members([networks[6], networks[7]], plan)
    weights = list(plan.weights.values())
    members = dict(zip(plan.weights, weights, strict=True))
    ids = PROMPTS[1:2]
    for _ in range(6):
        with torch.no_grad():
            parts = [w * n(ids).logits[:, -1].log_softmax(-1) for w, n in zip(weights, networks[6:], strict=True)]
        ids = torch.cat([ids, sum(parts).argmax(1, keepdim=True)], 1)
    assert sum(members.values()) == 2.0
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(generate(fused, PROMPTS[1:2], attention_mask=MASK[1:2], **options), ids)


def test_generate_refuses_what_does_not_generate(speaker, trained):
    with pytest.raises(TypeError, match="expected a FusedModel, got GPT2LMHeadModel"):
        generate(gpt2(), PROMPTS)
    plan = fmn.FusionPlan.from_weights({0: 1.0}, 1)
    with pytest.raises(TypeError, match="causal language models as members, got Linear"):
        generate(fmn.FusedModel.of_members([torch.nn.Linear(2, 2)], plan), PROMPTS)
    with pytest.raises(ValueError, match="a cache of its own"):
        generate(speaker[0], PROMPTS, cache_implementation="static")


def llama(seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=20, max_position_embeddings=16, **sizes))
    torch.manual_seed(0)
    for parameter in (p for name, p in base.named_parameters() if "embed_tokens" not in name):
        torch.nn.init.normal_(parameter, std=0.1)
    return base


def test_embeddings_that_peft_stores_beside_an_adapter_are_compared(tmp_path):
    """New tokens have random embeddings, which peft stores; with those of another base the outputs would be others."""

    def make(seed):
        config = peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
        torch.manual_seed(3)
        return peft.get_peft_model(llama(seed), config)

    recorder = train(tmp_path, "gpt2", make(1), num_train_epochs=2)
    out = tmp_path / "out"
    assert any("embed_tokens.base_layer" in name for name in state_names(out))
    run = imported("gpt2", out, tmp_path / "run", make(1))
    np.testing.assert_array_equal(run.history.correct(), recorder.run.history.correct())
    with pytest.raises(ValueError, match=r"embed_tokens\.base_layer\.weight of the base is another than the model's"):
        imported("gpt2", out, tmp_path / "other", make(2))
    assert not (tmp_path / "other").exists()
    loaded = peft.PeftModel.from_pretrained(llama(2), step(out, 0))
    again = imported("gpt2", out, tmp_path / "again", loaded)
    np.testing.assert_array_equal(run.history.correct(), again.history.correct())
    plan = fmn.FusionPlan.from_weights({0: 1, 1: 1}, 2)
    save_fused(tmp_path / "fused", plan, again)
    with torch.no_grad():
        expected = predictions(fmn.FusedModel(plan, run), "gpt2")
        loaded = load_fused(tmp_path / "fused", llama(2))
        np.testing.assert_allclose(predictions(loaded, "gpt2"), expected, atol=1e-6)


def test_an_adapter_with_a_name_of_its_own(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS")
    model = peft.get_peft_model(bert(), config, adapter_name="mine")
    recorder = train(tmp_path, "bert", model, num_train_epochs=2)
    run = imported("bert", str(tmp_path / "out" / "checkpoint-*" / "mine"), tmp_path / "run", model)
    np.testing.assert_array_equal(run.history.correct(), recorder.run.history.correct())
    plan = fmn.FusionPlan.from_weights({0: 1, 1: 3}, 2)
    save_fused(tmp_path / "fused", plan, run)
    with torch.no_grad():
        expected = fmn.FusedModel(plan, run)(inputs("bert"))
        np.testing.assert_allclose(load_fused(tmp_path / "fused", bert())(inputs("bert")), expected, atol=1e-6)


def test_a_recorded_training_in_bfloat16(tmp_path):
    recorder = train(tmp_path, "bert", adapted("bert"), num_train_epochs=2, bf16=True)
    probs = recorder.run.probabilities(sentences(60, 2))
    np.testing.assert_array_equal(fmn.correctness(probs[:], probs.labels), recorder.run.history.correct())


class Killed(Exception):
    pass


def own_training(run_dir, kind, distilled=False, until=None, base=None):
    """Train, or distil from a merged network, with a `run_dir`; killed in an epoch, if `until` is one."""
    model, (_, data, forward_fn, _), passes = adapted(kind), KINDS[kind], []
    if base is not None:
        model.get_base_model().load_state_dict(base, strict=False)

    def forward_or_die(network, batch):
        passes.append(network.training)
        if until is not None and sum(passes) > until * STEPS:
            raise Killed
        return forward(network, batch, forward_fn)

    options = {"epochs": 4, "lr": 3e-2, "optimizer": "adamw", "batch_size": 16, "progress": False, "run_dir": run_dir}
    options |= {"forward_fn": forward_or_die}
    if distilled:
        teacher = adapted(kind).merge_and_unload()
        options |= {"ema_decay": 0.5, "patience": 3, "val_data": data(60, 2)}
        fmn.distill(model, teacher, data(16 * STEPS, 1), kd_weight=0.5, **options)
    else:
        fmn.train(model, data(16 * STEPS, 1), data(60, 2), **options)
    return model


def same_tensors(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("distilled", [False, True], ids=["train", "distill"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_train_and_distill_store_adapters_and_resume_bit_for_bit(tmp_path, kind, distilled):
    unbroken = own_training(tmp_path / "unbroken", kind, distilled)
    with pytest.raises(Killed):
        own_training(tmp_path / "killed", kind, distilled, until=2)
    assert len(fmn.Run.open(tmp_path / "killed").history) == 2
    resumed = own_training(tmp_path / "killed", kind, distilled)
    assert same_tensors(resumed.state_dict(), unbroken.state_dict())
    runs = [fmn.Run.open(tmp_path / name, resumed, KINDS[kind][2]) for name in ("unbroken", "killed")]
    np.testing.assert_array_equal(runs[0].history.correct(), runs[1].history.correct())
    names = peft.get_peft_model_state_dict(resumed).keys()
    for path, other in zip(*(run.checkpoints for run in runs), strict=True):
        assert torch.load(path).keys() == names
        assert same_tensors(torch.load(path), torch.load(other))
    base = sum(p.nbytes for p in resumed.parameters() if not p.requires_grad)
    held = torch.load(tmp_path / "killed" / "resume.pt")
    assert "classifier" in str(names) or sum(t.nbytes for t in held["model"].values()) < base / 4
    assert held["model"].keys() == names
    probs = runs[0].probabilities(KINDS[kind][1](60, 2))
    np.testing.assert_array_equal(fmn.correctness(probs[2], probs.labels), runs[0].history[2])
    other = {name: value + 1 for name, value in KINDS[kind][0]().state_dict().items()}
    with pytest.raises(ValueError, match=r"base_in_full: the run in .* was made with"):
        own_training(tmp_path / "killed", kind, distilled, base=other)


@pytest.mark.parametrize("distilled", [False, True], ids=["train", "distill"])
def test_a_run_of_whole_networks_goes_on(tmp_path, monkeypatch, distilled):
    """As earlier versions stored them, without a digest of the base."""
    unbroken = own_training(tmp_path / "unbroken", "gpt2", distilled)
    with monkeypatch.context() as earlier:
        earlier.setattr("fmn_ref.runs.adapters.state_of", lambda model: model.state_dict())
        with pytest.raises(Killed):
            own_training(tmp_path / "run", "gpt2", distilled, until=2)
    path = tmp_path / "run" / "run.json"
    content = json.loads(path.read_text())
    del content["config"]["base_in_full"]
    path.write_text(json.dumps(content))
    assert len(torch.load(tmp_path / "run" / "resume.pt")["model"]) == len(unbroken.state_dict())
    resumed = own_training(tmp_path / "run", "gpt2", distilled)
    assert same_tensors(resumed.state_dict(), unbroken.state_dict())
    run = fmn.Run.open(tmp_path / "run", resumed, causal_lm_forward)
    probs = run.probabilities(texts(60, 2))
    np.testing.assert_array_equal(fmn.correctness(probs[:], probs.labels), run.history.correct())


@pytest.mark.parametrize("text", ["[]", "{", '{"lora_alpha": "x"}', '{"lora_alpha": NaN}', '{"lora_alpha": null}'])
def test_settings_that_are_damaged_are_refused(trained, tmp_path, text):
    kind, out, _ = trained
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    weights = tmp_path / "out" / "checkpoint-3" / "adapter_model.safetensors"
    weights.write_bytes((step(out, 0) / "adapter_model.safetensors").read_bytes())
    (weights.parent / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json: "):
        imported(kind, tmp_path / "out", tmp_path / "run")


@pytest.mark.parametrize("init", [True, "olora"])
def test_a_rank_in_the_settings_that_the_file_has_no_weights_for_takes_no_memory(tmp_path, init):
    """It took 3 GiB once, before the refusal."""
    resource = pytest.importorskip("resource")
    base = torch.nn.Sequential(torch.nn.Linear(3, 4))
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(tmp_path / "member_00000")
    fmn.FusionPlan.from_weights({0: 1.0}, 1).save(tmp_path / "plan.json")
    path = tmp_path / "member_00000" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 1 << 27, "init_lora_weights": init}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"(?s)member_00000: not an adapter of this base: .*(size mismatch|a rank)"):
        load_fused(tmp_path, torch.nn.Sequential(torch.nn.Linear(3, 4)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 512 << 10  # of KiB


def test_the_guide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tmp_path, "gpt2", adapted("gpt2"), num_train_epochs=3)
    names = {"base": gpt2(), "make_base": gpt2, "val_set": texts(60, 2), "train_set": texts(64, 1)}
    names |= {"input_ids": PROMPTS, "attention_mask": MASK, "first": step(tmp_path / "out", 0)}
    for code in blocks(GUIDE):
        exec(code, names)
    assert names["accuracy"] > 0.05
    assert names["text"].shape[0] == 3
    assert list(names["averaged"].peft_config) == ["default"]
