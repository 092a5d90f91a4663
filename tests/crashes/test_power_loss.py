"""After a power loss, what was done is there, and the program goes on to the same bits. Also: the disk forgets."""

import os
import random
import shutil

import crash_jobs
import pytest
from forgetful_disk import states_after
from power_loss import Program, summary

pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace, which sees every write")
SHARE = float(os.environ.get("FMN_POWER_LOSSES", "0.06"))
PROTOCOLS = """
import os, sys
root = sys.argv[1]
def write(path, content, sync):
    file = os.open(f"{root}/{path}", os.O_WRONLY | os.O_CREAT)
    os.write(file, content)
    if sync:
        os.fsync(file)
def sync(folder):
    os.fsync(os.open(f"{root}/{folder}", os.O_RDONLY))
def make(folder):
    os.mkdir(f"{root}/{folder}")
def rename(folder):
    os.rename(f"{root}/{folder}/new", f"{root}/{folder}/file")
for name in ("unsynced", "nameless", "whole"):
    make(name)
    sync(".")
    write(f"{name}/new", b"x" * 2000, name != "unsynced")
    rename(name)
    if name != "nameless":
        sync(name)
make("renamed")
sync(".")
write("renamed/new", b"x" * 2000, True)
sync("renamed")
rename("renamed")
make("homeless")
write("homeless/file", b"x" * 2000, True)
sync("homeless")
write("page", b"a" * 2000, True)
page = os.open(f"{root}/page", os.O_RDWR)
os.pwrite(page, b"b" * 1000, 500)
os.ftruncate(page, 1800)
"""


@pytest.fixture(scope="module")
def states(tmp_path_factory):
    """States after a power loss at the end of PROTOCOLS."""
    return states_after(PROTOCOLS, tmp_path_factory.mktemp("disk"), 300)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("unsynced/file", {"zeros", "part", "empty", "whole"}),  # its name is synced: always there
        ("nameless/file", {"missing", "whole"}),
        ("nameless/new", {"missing", "whole"}),
        ("whole/file", {"whole"}),
        ("homeless", {"missing", "folder"}),
        ("homeless/file", {"missing", "whole"}),
    ],
)
def test_the_disk_forgets_what_was_not_synced(states, path, expected):
    def kind(state):
        content = state.get(path, "missing")
        known = {None: "folder", "missing": "missing", b"": "empty", bytes(2000): "zeros", b"x" * 2000: "whole"}
        return known.get(content, "part")

    assert {kind(state) for state in states} == expected


def test_the_disk_renames_such_that_a_name_remains(states):
    found = {("renamed/new" in state, "renamed/file" in state) for state in states}
    assert found == {(True, False), (False, True), (True, True)}


def test_the_disk_tears_between_sectors_only(states):
    old = b"a" * 2000
    new = b"a" * 500 + b"b" * 1000 + b"a" * 500
    versions = [old, new, new[:1800].ljust(2000, b"\0")]
    pages = {state["page"] for state in states if "page" in state}
    for page in pages:
        assert len(page) in (1800, 2000)
        parts = [slice(i, min(i + 512, len(page))) for i in range(0, len(page), 512)]
        assert all(page[part] in [version[part] for version in versions] for part in parts)
    assert len(pages) > 8


def test_after_each_power_loss_what_was_done_is_there_and_the_end_has_the_same_bits(tmp_path):
    program = Program(tmp_path)
    found = summary(program, random.randrange(2**32), SHARE)
    print(found["of"])
    assert found["faults"] == []
    assert found["of"].keys() == crash_jobs.JOBS.keys()
