"""average_checkpoints: means of files, by hand; types, ties and shards; what is refused; a bound on the memory."""

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch
from networks import RECIPE, make_data, make_model
from safetensors_files import read, read_folder, write, write_folder

import fmn_ref as fmn
from fmn_ref.runs import tensors

TRAIN, VAL, _ = make_data(n=60)


def made(seed, dtype=torch.float32):
    """The state of a small language model, with the head tied to the embedding."""
    g = torch.Generator().manual_seed(seed)
    embedding = torch.randn(7, 3, generator=g).to(dtype)
    state = OrderedDict(embedding=embedding)
    state["layer.weight"] = torch.randn(3, 3, generator=g).to(dtype)
    state["layer.scale"] = torch.randn((), generator=g).to(dtype)
    state["steps"] = torch.tensor(seed)
    state["empty"] = torch.empty(0, 4, dtype=dtype)
    state["head"] = embedding
    return state


def by_hand(states, shares):
    """Mean in double precision, in the last state's type."""
    found = {}
    for name, latest in states[-1].items():
        mean = sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
        found[name] = mean.to(latest.dtype) if latest.is_floating_point() else latest
    return found


def same(found, expected):
    return found.keys() == expected.keys() and all(
        found[n].dtype == t.dtype and torch.equal(found[n], t) for n, t in expected.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["torch", "safetensors", "shards", "bin"])
def test_the_mean_is_that_of_double_precision_in_the_own_type(tmp_path, kind, dtype, monkeypatch):
    monkeypatch.setattr(tensors, "PART", 4)
    states, paths = [made(seed, dtype) for seed in range(3)], []
    for i, state in enumerate(states):
        paths.append(tmp_path / {"torch": f"{i}.pt", "safetensors": f"{i}.st"}.get(kind, f"folder_{i}"))
        untied = {name: t for name, t in state.items() if name != "head"}
        if kind == "torch":
            torch.save(state, paths[i])
        elif kind == "safetensors":
            write(paths[i], untied)
        elif kind == "shards":
            write_folder(paths[i], untied)
        else:
            paths[i].mkdir()
            torch.save(state, paths[i] / "pytorch_model.bin")
    out = fmn.average_checkpoints(paths, {0: 1.0, 1: 0.0, 2: 3.0}, tmp_path / "mean")
    expected = by_hand([states[0], states[2]], [0.25, 0.75])
    del expected["head"]
    assert same(read_folder(out)[0], expected)
    assert [p.name for p in out.iterdir()] == ["model.safetensors"]


def test_one_weight_gives_the_checkpoint_itself(tmp_path):
    states = [made(seed) for seed in range(2)]
    states[1]["layer.mask"] = states[0]["layer.mask"] = torch.tensor([0.0, float("-inf")])
    for i, state in enumerate(states):
        torch.save(state, tmp_path / f"{i}.pt")
    out = fmn.average_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], {0: 5.0}, tmp_path / "mean")
    assert same(read(out / "model.safetensors")[0], {n: t for n, t in states[0].items() if n != "head"})
    both = fmn.average_checkpoints([tmp_path / "0.pt", tmp_path / "1.pt"], {0: 1, 1: 1}, tmp_path / "both")
    assert torch.equal(read(both / "model.safetensors")[0]["layer.mask"], states[0]["layer.mask"])


def test_tied_weights_are_stored_once_and_named_for_load_model(tmp_path):
    for i in range(2):
        torch.save(made(i), tmp_path / f"{i}.pt")
    paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
    out = fmn.average_checkpoints(paths, {0: 1, 1: 1}, tmp_path / "mean")
    found, metadata = read(out / "model.safetensors")
    assert "head" not in found
    assert metadata == {"format": "pt", "head": "embedding"}
    untied = made(1)
    untied["head"] = untied["head"].clone()  # in one of the files
    torch.save(untied, paths[1])
    out = fmn.average_checkpoints(paths, {0: 1, 1: 1}, tmp_path / "untied")
    assert "head" in read(out / "model.safetensors")[0]


def test_checkpoints_of_several_types_give_one_that_holds_both(tmp_path):
    states = [{"w": torch.tensor([1.0]).half()}, {"w": torch.tensor([2.0]).bfloat16()}]
    for i, state in enumerate(states):
        torch.save(state, tmp_path / f"{i}.pt")
    out = fmn.average_checkpoints([str(tmp_path / "0.pt"), tmp_path / "1.pt"], {0: 1, 1: 1}, tmp_path / "mean")
    assert same(read_folder(out)[0], {"w": torch.tensor([1.5])})


def test_shards_have_at_most_the_size_and_an_index(tmp_path):
    state = {f"layer.{i}": torch.full((10,), float(i)) for i in range(5)} | {"big": torch.ones(50)}
    state["odd"] = torch.ones(3, dtype=torch.bool)
    torch.save(state, tmp_path / "a.pt")
    out = fmn.average_checkpoints([tmp_path / "a.pt"], {0: 1}, tmp_path / "mean", max_shard_bytes=100)
    found, index = read_folder(out)
    assert same(found, state)
    sizes = [sum(t.nbytes for t in read(p)[0].values()) for p in sorted(out.glob("*.safetensors"))]
    assert sizes == [80, 80, 40, 200, 3]
    assert index["metadata"]["total_size"] == sum(sizes)
    for name, file in index["weight_map"].items():
        assert name in read(out / file)[0]
        assert file.endswith("-of-00005.safetensors")


def test_averaged_model_and_average_checkpoints_agree_on_a_run(tmp_path):
    run = fmn.train(make_model(), TRAIN, VAL, epochs=4, run_dir=tmp_path / "run", **RECIPE)
    weights = {1: 0.5, 2: 0.25, 3: 0.25}
    found = read_folder(fmn.average_checkpoints(run, weights, tmp_path / "mean"))[0]
    model = fmn.averaged_model(run, weights, TRAIN)
    assert found.keys() == model.state_dict().keys()
    for name, p in model.named_parameters():
        assert torch.equal(found[name], p), name
    without = fmn.average_checkpoints(fmn.Run.open(tmp_path / "run"), weights, tmp_path / "without")
    assert same(read_folder(without)[0], found)


def test_the_network_of_a_run_says_what_is_no_weight(tmp_path):
    """Without it, a buffer of fractions counts as a weight."""
    model = torch.nn.Linear(2, 2)
    model.register_buffer("direction", torch.tensor([1.0, 0.0]))
    recorder = fmn.Recorder(tmp_path / "run", model)
    for epoch, direction in enumerate(([1.0, 0.0], [0.0, 1.0])):
        model.direction = torch.tensor(direction)
        recorder.record_correct(epoch, [True], [0])
    mean = read_folder(fmn.average_checkpoints(recorder.run, {0: 1, 1: 1}, tmp_path / "a"))[0]
    assert mean["direction"].tolist() == [0.0, 1.0]
    mean = read_folder(fmn.average_checkpoints(fmn.Run.open(tmp_path / "run"), {0: 1, 1: 1}, tmp_path / "b"))[0]
    assert mean["direction"].tolist() == [0.5, 0.5]


def pair(folder, first, second):
    for i, state in enumerate((first, second)):
        torch.save(state, folder / f"{i}.pt")
    return [folder / "0.pt", folder / "1.pt"]


W = {"w": torch.ones(2)}
BAD = {
    "missing name": (W, W | {"v": torch.ones(1)}, r"0\.pt: does not fit .*1\.pt: they differ in v"),
    "other shape": (W, {"w": torch.ones(1, 2)}, "they differ in w"),
    "integers there": (W, {"w": torch.ones(2, dtype=torch.int64)}, "they differ in w"),
    "NaN": (W, {"w": torch.tensor([1.0, float("nan")])}, r"1\.pt: w holds NaN or infinity"),
    "infinity": (W, {"w": torch.tensor([1.0, float("inf")])}, r"1\.pt: w holds NaN or infinity"),
    "quantised": ({"w": torch.ones(2).to(torch.int8)}, {"w": torch.zeros(2).to(torch.int8)}, "8 bits"),
    "float8": ({"w": torch.ones(2).to(torch.float8_e4m3fn)}, {"w": torch.zeros(2).to(torch.float8_e4m3fn)}, "8 bits"),
    "adapter": ({"a.lora_A.weight": torch.ones(2)}, {"a.lora_A.weight": torch.zeros(2)}, "factor of a product"),
    "container": ({"model": W, "epoch": 1}, {"model": W, "epoch": 2}, "expected tensors, but 'model' is a dict"),
    "other classes": ({"model": W, "args": Namespace(lr=0.1)}, W, "argparse.Namespace .*from_checkpoints reads files"),
    "no dict": ([torch.ones(2)], W, "expected a state_dict of tensors, got list"),
    "empty": ({}, {}, "holds no tensor"),
    "sparse": ({"w": torch.eye(2).to_sparse()},) * 2 + ("'w' is a tensor of torch.sparse_coo",),
    "nothing": ({"w": None},) * 2 + ("'w' is a NoneType",),
    "complex128": ({"w": torch.ones(2, dtype=torch.complex128)},) * 2 + ("safetensors cannot hold",),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_averaged_is_refused_and_leaves_nothing(tmp_path, case):
    first, second, words = BAD[case]
    paths = pair(tmp_path, first, second)
    with pytest.raises(ValueError, match=words):
        fmn.average_checkpoints(paths, {0: 1, 1: 1}, tmp_path / "mean")
    assert sorted(os.listdir(tmp_path)) == ["0.pt", "1.pt"]


def test_equal_integers_and_adapters_of_8_bits_stay(tmp_path):
    state = {"w": torch.ones(2, dtype=torch.int8), "a.lora_A.weight": torch.ones(2), "b": torch.ones(1).half()}
    out = fmn.average_checkpoints(pair(tmp_path, state, state), {0: 1, 1: 1}, tmp_path / "mean")
    assert same(read_folder(out)[0], state)


def test_views_are_read_as_they_are(tmp_path, monkeypatch):
    """Transposed, channels_last, conjugated, and a part of a larger tensor."""
    monkeypatch.setattr(tensors, "PART", 5)
    t = torch.randn(2, 3, 4, 5)
    state = {"transposed": t[0, 0].T, "last": t.to(memory_format=torch.channels_last), "part": t[1, :, 1]}
    state["conjugated"] = torch.randn(4, dtype=torch.cfloat).conj()
    first = {name: value * 3 for name, value in state.items()}
    out = fmn.average_checkpoints(pair(tmp_path, first, state), {0: 1, 1: 1}, tmp_path / "mean")
    for name, mean in read_folder(out)[0].items():
        torch.testing.assert_close(mean, 2 * state[name].resolve_conj(), msg=name)
    same_out = fmn.average_checkpoints(pair(tmp_path, state, state), {0: 1, 1: 1}, tmp_path / "same")
    assert same(read_folder(same_out)[0], {name: value.resolve_conj() for name, value in state.items()})


def test_a_network_with_a_sparse_buffer_and_an_extra_state_is_averaged(tmp_path):
    class Extra(torch.nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("graph", torch.eye(2).to_sparse())

        def get_extra_state(self):
            return {"note": "mine"}

        def set_extra_state(self, state):
            self.note = state["note"]

    model = Extra()
    recorder = fmn.Recorder(tmp_path / "run", model)
    weights = []
    for epoch in range(2):
        torch.nn.init.normal_(model.weight)
        weights.append(model.weight.detach().clone())
        recorder.record_correct(epoch, [True], [0])
    mean = fmn.averaged_model(recorder.run, {0: 1, 1: 1}, None)
    torch.testing.assert_close(mean.weight.data, (weights[0] + weights[1]) / 2)
    assert mean.note == "mine"
    assert torch.equal(mean.graph.to_dense(), torch.eye(2))


def test_what_a_killed_process_left_is_deleted(tmp_path):
    (tmp_path / ".mean.0123abcd.tmp").mkdir()
    (tmp_path / ".mean.0123abcd.tmp" / "model.safetensors").write_bytes(bytes(10))
    fmn.average_checkpoints(pair(tmp_path, W, W), {0: 1}, tmp_path / "mean")
    assert sorted(os.listdir(tmp_path)) == ["0.pt", "1.pt", "mean"]


def test_wrong_arguments(tmp_path):
    paths = pair(tmp_path, W, W)
    for run, weights, out, error, words in (
        ("0.pt", {0: 1}, "mean", TypeError, "run: expected a Run or a list of paths, got str"),
        ([], {}, "mean", ValueError, "weights"),
        (paths, {2: 1}, "mean", ValueError, "epoch"),
        (paths, [1, 1], "mean", TypeError, "weights"),
        (paths, {0: 1}, "0.pt", FileExistsError, "exists"),
        (paths, {0: 1}, "no/mean", FileNotFoundError, "does not exist"),
        ([tmp_path / "9.pt"], {0: 1}, "mean", FileNotFoundError, r"9\.pt"),
        ([tmp_path], {0: 1}, "mean", FileNotFoundError, "or shards with an index"),
    ):
        with pytest.raises(error, match=words):
            fmn.average_checkpoints(run, weights, tmp_path / out)
    with pytest.raises(ValueError, match="max_shard_bytes"):
        fmn.average_checkpoints(paths, {0: 1}, tmp_path / "mean", max_shard_bytes=0)
    assert sorted(os.listdir(tmp_path)) == ["0.pt", "1.pt"]


def header(entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE = {
    "short": b"\1\2",
    "length": (1 << 60).to_bytes(8, "little") + b"{}",
    "no JSON": (2).to_bytes(8, "little") + b"[]",
    "deep": header({})[:0] + (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "dtype": header({"w": F32 | {"dtype": "F31"}}) + bytes(8),
    "truncated": header({"w": F32}) + bytes(7),
    "too long": header({"w": F32}) + bytes(9),
    "gap": header({"w": F32, "v": F32 | {"data_offsets": [12, 20]}}) + bytes(20),
    "overlap": header({"w": F32, "v": F32 | {"data_offsets": [4, 12]}}) + bytes(12),
    "shape": header({"w": F32 | {"shape": [3]}}) + bytes(8),
    "negative": header({"w": F32 | {"shape": [-1, -2]}}) + bytes(8),
    "fraction": header({"w": F32 | {"shape": [2.0]}}) + bytes(8),
    "infinite": header({"w": F32 | {"shape": [10**400]}}) + bytes(8),
    "offsets": header({"w": F32 | {"data_offsets": [0]}}) + bytes(8),
    "text": header({"w": F32 | {"data_offsets": ["0", "8"]}}) + bytes(8),
    "pickle": b"\x80\x02}q\x00.",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_safetensors_file_is_named(tmp_path, case):
    (tmp_path / "bad.safetensors").write_bytes(HOSTILE[case])
    with pytest.raises(ValueError, match=r"bad\.safetensors: not a checkpoint of torch or safetensors"):
        fmn.average_checkpoints([tmp_path / "bad.safetensors"], {0: 1}, tmp_path / "mean")


def test_shards_lie_in_their_folder_and_hold_what_the_index_says(tmp_path):
    folder, index = tmp_path / "a", tmp_path / "a" / "model.safetensors.index.json"
    write(tmp_path / "outside.safetensors", W)
    write_folder(folder, {"v": torch.ones(1), "w": torch.ones(1)})
    file = "model-00001-of-00002.safetensors"
    for weight_map, error, words in (
        ({"w": "../outside.safetensors"}, ValueError, "not in its folder"),
        ({"w": str(tmp_path / "outside.safetensors")}, ValueError, "not in its folder"),
        ({"w": ".."}, ValueError, "not in its folder"),
        ({"w": 3}, ValueError, "not in its folder"),
        ({"w": "gone.safetensors"}, FileNotFoundError, r"gone\.safetensors"),
        ({"w": file}, ValueError, "lacks w"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(error, match=words):
            fmn.average_checkpoints([folder], {0: 1}, tmp_path / "mean")
    for text in ("[]", "{}", "{", '{"weight_map": [1]}'):
        index.write_text(text)
        with pytest.raises(ValueError, match=r"index\.json: not an index of shards"):
            fmn.average_checkpoints([folder], {0: 1}, tmp_path / "mean")


def test_the_configuration_of_a_folder_comes_along(tmp_path):
    write_folder(tmp_path / "a", W)
    (tmp_path / "a" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "a" / "trainer_state.json").write_text("{}")
    out = fmn.average_checkpoints([tmp_path / "a"], {0: 1}, tmp_path / "mean")
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
    assert (out / "config.json").read_text() == '{"model_type": "gpt2"}'


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    paths = pair(tmp_path, made(0), made(1))

    def full(part, dtype):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensors, "_bytes_of", full)
    with pytest.raises(OSError, match="No space"):
        fmn.average_checkpoints(paths, {0: 1, 1: 1}, tmp_path / "mean")
    assert sorted(os.listdir(tmp_path)) == ["0.pt", "1.pt"]


LIMITED = """
import re, resource, sys, torch
import fmn_ref as fmn
from fmn_ref.runs import tensors
torch.save({"w": torch.ones(9)}, sys.argv[2] + ".pt")
fmn.average_checkpoints([sys.argv[2] + ".pt"], {0: 1}, sys.argv[2] + "_small")  # loads what it needs
tensors.PART = int(sys.argv[4])
used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
limit = used + (int(sys.argv[3]) << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
fmn.average_checkpoints([sys.argv[1] + "/a", sys.argv[1] + "/b"], {0: 3, 1: 1}, sys.argv[2], max_shard_bytes=1 << 30)
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def averaged_under_a_limit(folder, megabytes, part):
    """Average a/ and b/ in a process whose address space may grow by so much."""
    command = [sys.executable, "-c", LIMITED, folder, folder / "mean", str(megabytes), str(part)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def write_large(folder, n_rows, seed):
    """A checkpoint of four tensors of bfloat16 in two shards, the first one half of it; a part in memory at a time."""
    g, shapes = torch.Generator().manual_seed(seed), {"embedding": 3, "a": 1, "b": 1, "c": 1}
    folder.mkdir()

    def blocks(n):
        return (torch.randn(1024 * 64, generator=g).bfloat16() for _ in range(n * n_rows // 64))

    new = [
        tensors.NewTensor(name, torch.bfloat16, (n * n_rows, 1024), lambda n=n: blocks(n)) for name, n in shapes.items()
    ]
    tensors.write_shards(folder, new, {}, 3 * n_rows * 2048)


def check_large(folder):
    """Compare some rows of each tensor with the mean by hand."""
    states = [tensors.read_state(folder / name) for name in ("a", "b", "mean")]
    assert states[0].keys() == states[2].keys() == {"embedding", "a", "b", "c"}
    for name, t in states[2].items():
        n = t.shape[0] * t.shape[1]
        for start in (0, n // 2 - 7, n - 1000):
            a, b, mean = (state[name].read(start, min(n, start + 1000)) for state in states)
            assert torch.equal(mean, (0.75 * a.double() + 0.25 * b.double()).bfloat16())


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
def test_memory_is_bounded_by_the_parts_and_not_by_the_files(tmp_path):
    for seed, name in enumerate("ab"):
        write_large(tmp_path / name, 8192, seed)  # 100 MB each, half of it one tensor
    done = averaged_under_a_limit(tmp_path, 64, 1 << 18)
    assert done.returncode == 0, done.stderr[-1000:]
    check_large(tmp_path)
    assert averaged_under_a_limit(tmp_path, 64, 1 << 24).returncode == 1  # the limit is one


@linux
@pytest.mark.skipif(os.environ.get("FMN_LARGE_TESTS") != "1", reason="FMN_LARGE_TESTS=1 runs it: 6 GB of disk, minutes")
def test_two_checkpoints_of_2_GB_need_300_MB(tmp_path):
    for seed, name in enumerate("ab"):
        write_large(tmp_path / name, 163840, seed)
    done = averaged_under_a_limit(tmp_path, 300, tensors.PART)
    assert done.returncode == 0, done.stderr[-1000:]
    check_large(tmp_path)
    print("peak resident memory, kB:", done.stdout)


def test_checkpoints_that_a_run_refers_to_are_averaged_under_the_names_of_its_network(tmp_path):
    """With their containers and prefixes; without a network nothing is known of them."""
    models = [make_model() for _ in range(3)]
    (tmp_path / "old").mkdir()
    for i, model in enumerate(models):
        content = {"epoch": i, "model": {f"module.{k}": v for k, v in model.state_dict().items()}, "optimizer": {}}
        torch.save(content, tmp_path / "old" / f"ckpt_{i}.pth.tar")
    run = fmn.from_checkpoints(tmp_path / "old", make_model(), VAL, tmp_path / "run", progress=False)
    found = read_folder(fmn.average_checkpoints(run, {0: 1, 2: 3}, tmp_path / "mean"))[0]
    mean = fmn.averaged_model(run, {0: 1, 2: 3}, TRAIN)
    for name, p in mean.named_parameters():
        expected = (
            0.25 * models[0].get_parameter(name).double() + 0.75 * models[2].get_parameter(name).double()
        ).float()
        assert torch.equal(p, expected)
        assert torch.equal(found[name], expected)
    with pytest.raises(ValueError, match="expected tensors, but 'epoch' is a int"):
        fmn.average_checkpoints(fmn.Run.open(tmp_path / "run"), {0: 1}, tmp_path / "none")
