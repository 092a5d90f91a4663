"""A pickle is scanned before it is loaded: whatever is honest passes, and what asks for the impossible is named."""

import collections
import contextlib
import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

from fmn_ref.runs.pickles import scan


def data_pkl(content):
    """The pickle in a file of torch.save."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return zipfile.ZipFile(buffer).read("archive/data.pkl")


def nested(depth, kind=tuple):
    value = 0
    for _ in range(depth):
        value = kind([value])
    return value


shared = (0.9, 0.999)
HONEST = {
    "numbers": [0, 1, -1, 255, 65536, -(2**31), 2**40, 2**100, -(2**3000), 0.5, True, None, 1 + 2j],
    "texts": ["", "a", "ä" * 300, "x" * 70_000, b"", b"bytes", b"y" * 300, bytearray(b"abc")],
    "containers": [[], (), {}, set(), {1, 2}, frozenset([3]), (1, 2, 3, 4), {"a": [{"b": (1,)}]}, list(range(3000))],
    "shared": [shared, shared, {"betas": shared}],
    "deep": nested(200),
    "numpy": {np.int64(i): [[0.5] * 50, [1] * 50, [-0.25] * 50] for i in range(30)},
    "classes": collections.OrderedDict(a=1, b=collections.Counter("aab")),
}


@pytest.mark.parametrize("contents", [True, False])
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", HONEST)
def test_what_python_writes_passes(name, protocol, contents):
    assert scan(pickle.dumps(HONEST[name], protocol), contents) == []


def test_what_torch_writes_passes_and_names_its_storages():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    states = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    more = {"half": torch.zeros(3).half(), "size": torch.Size([1, 2]), "dtype": torch.float32, "text": b"abc"}
    found = scan(data_pkl(states | more), contents=True)
    assert [b"storage", b"torch\nFloatStorage", b"0", b"cpu", 12] in found
    assert found[-1][:2] + found[-1][3:] == [b"storage", b"torch\nHalfStorage", b"cpu", 3]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x80\x04)" + b"\x85" * 1_000_000 + b".", "too deep"),
        (b"\x80\x04}K\x01]\x94(h\x00h\x00es.", "contains itself"),
        (b"\x80\x04]\x94]\x94h\x00ah\x01a.", "contains itself"),  # two lists, each in the other
        (b"\x80\x04]\x94h\x00a.", "contains itself"),
        (b"\x80\x04]\x94(K\x01\x85\x94h\x00h\x01e.", "contains itself"),
        (b"\x80\x04Nr\xff\xff\xff\x07.", "memory"),
        (b"\x80\x04N\x94q\xff.", "memory"),
        (b"\x80\x04cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "memory"),
        (b"\x80\x04B\xff\xff\xff\xff", "ends within 4294967295 bytes"),
        (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "ends within"),
        (b"\x80\x04G123", "ends within 8 bytes"),
        (b"\x80\x04K\x01", "no end"),
        (b"", "no end"),
        (b"\x80\x04s.", "takes a value that is not there"),
        (b"\x80\x04K\x01(t(u.", "not there|contains itself"),
        (b"\x80\x04t.", "takes a mark"),
        (b"\x80\x04h\x05.", "refers to a value that is not there"),
        (b"\x80\x04\x94.", "keeps a value that is not there"),
        (b"\x80\x04K\x010.", "opcode b'0'"),
        (b"\x80\x04(ios\nsystem\n.", "opcode b'i'"),
        (b"\x80\x04K\x01K\x02a.", "contains itself, or changes"),
        (b"I1", "ends within"),
    ],
)
@pytest.mark.parametrize("contents", [True, False])
def test_what_is_not_honest_is_refused(data, words, contents):
    with pytest.raises(ValueError, match=words):
        scan(data, contents)


def test_lists_that_double_are_refused():
    """Sixty lists, each twice in the next: no memory holds them written out."""
    data = b"\x80\x04]\x94"
    for i in range(60):
        data += b"(h%ch%cl\x94" % (i, i)
    with pytest.raises(ValueError, match="too deep or too many"):
        scan(data + b".")


def test_every_beginning_of_a_pickle_is_refused():
    data = pickle.dumps(HONEST["numpy"], 4)[:2000]
    for n in range(len(data)):
        with pytest.raises(ValueError, match="end"):
            scan(data[:n])


def test_random_bytes_end_soon(rng):
    honest = pickle.dumps(HONEST, 4)
    for _ in range(300):
        data = bytearray(honest)
        for at in rng.integers(0, len(data), 5):
            data[at] = rng.integers(256)
        with contextlib.suppress(ValueError):
            scan(bytes(data))
