"""A disk that forgets what was not synced: the file operations of a real process, replayed up to a power loss.

`record` runs a program under strace, which sees every system call: Python's, torch's and HDF5's alike. A `Disk`
executes the calls below one folder in memory. It knows for each file and each folder what an fsync has made durable,
and what only the page cache holds. `Disk.lose_power` draws one of the states that the next boot may find:

- Data of a file, by sectors of 512 bytes: each sector is that of the last fsync or of any write since, and zero where
  it was never written. The length is that of the last fsync or any since. A sector itself is never torn.
- Names in a folder: each name is what it was at the last fsync of the folder, or after any of its changes since,
  whatever became of the other names. An fsync of a file does not store its name, nor one of a folder the folder's.
- A rename is one change in this respect: the old name is gone only if the new one is there. Both may be there.

Those are the promises of POSIX, as the ALICE paper reads them (Pillai et al., OSDI 2014). ext4, XFS and Btrfs keep
more. What the model lacks: errors that the disk reports late, and sectors that are lost although they were synced.
"""

import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass, field
from typing import NamedTuple

SECTOR = 512
MODES = ("nothing", "names", "data", "everything", "any", "any")  # what of the unsynced survives
_READS = ("lseek", "fcntl", "dup", "dup2", "dup3", "mmap")
_WRITES = (
    *("open", "openat", "creat", "write", "pwrite64", "writev", "pwritev", "pwritev2", "truncate", "ftruncate"),
    *("fallocate", "copy_file_range", "sendfile", "splice", "rename", "renameat", "renameat2", "unlink", "unlinkat"),
    *("rmdir", "mkdir", "mkdirat", "link", "linkat", "symlink", "symlinkat", "fsync", "fdatasync", "sync_file_range"),
)
_LINE = re.compile(r"(\d+) +(\w+)\((.*)\) += (-?\d+|0x[0-9a-f]+)(?:<.*>)?(?: .*)?")
_UNFINISHED = re.compile(r"(\d+) +(.*) <unfinished \.\.\.>")
_RESUMED = re.compile(r"(\d+) +<\.\.\. \w+ resumed>(.*)")
_QUOTED = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_PATHS = re.compile(r'["<]((?:\\x[0-9a-f]{2})+)[">]')
_FILE = re.compile(r"(?:AT_FDCWD|(\d+))<((?:\\x[0-9a-f]{2})*)>")


class Call(NamedTuple):
    """A system call that succeeded: its arguments as strace writes them, and its result."""

    name: str
    arguments: list
    result: int

    def text(self, i):
        """Argument i, a path or data, in bytes."""
        return _bytes(_QUOTED.fullmatch(self.arguments[i])[1])

    def path(self, i, at=None):
        """Argument i as an absolute path, relative to the open folder in argument `at`."""
        path = self.text(i).decode()
        assert path.startswith("/") or at is not None, f"the model lacks the working directory of {self}"
        return os.path.normpath(path if at is None else os.path.join(self.file(at)[1], path))

    def file(self, i):
        """Number and path of the open file in argument i."""
        found = _FILE.match(self.arguments[i])
        return (-1 if found[1] is None else int(found[1])), _bytes(found[2]).decode() if found else ""


def _bytes(text):
    return bytes.fromhex(text.replace("\\x", ""))


def record(command, log, **options):
    """Run a command under strace, which must succeed; return its calls in the order in which they ended."""
    calls = ",".join([*_READS, *_WRITES])
    strace = ["strace", "-f", "--seccomp-bpf", "-y", "-xx", "-s", str(2**28), "-e", f"trace={calls}", "-o", str(log)]
    done = subprocess.run([*strace, *command], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(_parsed(log.read_text().splitlines()))


def _parsed(lines):
    begun = {}
    for line in lines:
        if unfinished := _UNFINISHED.fullmatch(line):  # a call of another thread came in between
            begun[unfinished[1]] = line.removesuffix(" <unfinished ...>")
            continue
        if resumed := _RESUMED.fullmatch(line):
            line = begun.pop(resumed[1]) + resumed[2]
        call = _LINE.fullmatch(line)
        if call and not call[4].startswith("-"):
            yield Call(call[2], call[3].split(", "), int(call[4], 0))


@dataclass
class File:
    """Content at the last fsync, and after each write since."""

    versions: list = field(default_factory=lambda: [b""])

    @property
    def content(self):
        return self.versions[-1]

    def write(self, data, at):
        before = self.content.ljust(at, b"\0")
        self.versions.append(before[:at] + data + before[at + len(data) :])

    def resize(self, size):
        self.versions.append(self.content[:size].ljust(size, b"\0"))

    def sync(self):
        del self.versions[:-1]

    def survivor(self, mode, draw):
        if mode != "any":
            return self.versions[0 if mode in ("nothing", "names") else -1]
        versions, size = self.versions, len(draw.choice(self.versions))
        if draw.random() < 0.3:
            return draw.choice(versions)
        sectors = (draw.choice(versions)[i : i + SECTOR].ljust(SECTOR, b"\0") for i in range(0, size, SECTOR))
        return b"".join(sectors)[:size]


@dataclass
class Folder:
    """For each name: what it was at the last fsync, and after each change since, with the change that must precede."""

    names: dict = field(default_factory=dict)

    def __getitem__(self, name):
        return self.names[name][-1][0] if name in self.names else None

    def set(self, name, node, after=None):
        changes = self.names.setdefault(name, [(None, None)])
        changes.append((node, after))
        return self, name, len(changes) - 1

    def sync(self):
        self.names = {name: [(changes[-1][0], None)] for name, changes in self.names.items() if changes[-1][0]}

    def survivors(self, mode, draw):
        """Number of the change, for each name, that survives."""
        if mode != "any":
            return {
                name: 0 if mode in ("nothing", "data") else len(changes) - 1 for name, changes in self.names.items()
            }
        return {name: draw.randrange(len(changes)) for name, changes in self.names.items()}


class Disk:
    """The folder `root`, empty and synced at first; calls outside it are ignored."""

    def __init__(self, root):
        self.root, self.top = str(root), Folder()
        self._open = {}  # [file, position], for each descriptor

    def inside(self, path):
        return path == self.root or path.startswith(self.root + "/")

    def find(self, path):
        node = self.top
        for name in path[len(self.root) + 1 :].split("/") if path != self.root else ():
            node = node[name]
        return node

    def _place(self, path):
        above, _, name = path.rpartition("/")
        return self.find(above), name

    def concerns(self, call):
        """Tell whether a call may change or sync something here."""
        if call.name not in _WRITES or (call.name in ("open", "openat") and "O_CREAT" not in str(call.arguments)):
            return False
        paths = _PATHS.findall(", ".join(call.arguments[:4]))
        return any(self.inside(_bytes(path).decode(errors="replace")) for path in paths)

    def run(self, call):
        """Execute a call."""
        name, arguments = call.name, call.arguments
        if name in ("open", "openat", "creat"):
            self._run_open(call)
        elif name in ("mkdir", "rmdir", "unlink", "mkdirat", "unlinkat"):
            at = 0 if name.endswith("at") else None
            self._set(call.path(0 if at is None else 1, at), Folder() if name.startswith("mkdir") else None)
        elif name.startswith("rename"):
            self._rename(*((call.path(0), call.path(1)) if name == "rename" else (call.path(1, 0), call.path(3, 2))))
        elif name in ("dup", "dup2", "dup3") or (name == "fcntl" and arguments[1].startswith("F_DUPFD")):
            self._open[call.result] = self._open.get(call.file(0)[0])
        elif name == "mmap" and len(arguments) > 4 and _FILE.match(arguments[4]) and self.inside(call.file(4)[1]):
            assert "MAP_SHARED" not in arguments[3] or "PROT_WRITE" not in arguments[2], (
                "the model lacks stores to maps"
            )
        elif name != "mmap" and _FILE.match(arguments[0]) and self.inside(call.file(0)[1]):
            self._run_on_file(call, self._open[call.file(0)[0]])
        else:
            assert not self.concerns(call), f"the model lacks {call}"

    def _run_open(self, call):
        at = 0 if call.name == "openat" else None
        path = call.path(0 if at is None else 1, at)
        flags = "O_TRUNC" if call.name == "creat" else call.arguments[1 if at is None else 2]
        if not self.inside(path):
            self._open.pop(call.result, None)
            return
        if self.find(path) is None:
            self._set(path, File())
        if "O_TRUNC" in flags and self.find(path).content:
            self.find(path).resize(0)
        assert "O_APPEND" not in flags, "the model lacks appending"
        self._open[call.result] = [self.find(path), 0]

    def _set(self, path, node):
        if self.inside(path):
            folder, name = self._place(path)
            folder.set(name, node)

    def _rename(self, old, new):
        assert self.inside(old) == self.inside(new), "the model lacks moving in and out"
        if self.inside(old):
            (source, name), (target, new_name) = self._place(old), self._place(new)
            source.set(name, None, after=target.set(new_name, source[name]))

    def _run_on_file(self, call, opened):
        file, position = opened
        if call.name in ("fsync", "fdatasync"):
            file.sync()
        elif call.name in ("write", "pwrite64"):
            at = position if call.name == "write" else int(call.arguments[3])
            file.write(call.text(1)[: call.result], at)
            if call.name == "write":
                opened[1] = at + call.result
        elif call.name == "ftruncate":
            file.resize(int(call.arguments[1]))
        elif call.name == "lseek":
            opened[1] = call.result
        else:
            assert call.name == "fcntl", f"the model lacks {call}"

    def lose_power(self, draw, mode="any"):
        """Draw a state after a power loss now: {path below the root: content, or None for a folder}."""
        kept = {id(folder): folder.survivors(mode, draw) for folder in self._folders(self.top)}
        changed = True
        while changed:  # of a rename, the old name is gone only if the new one is there
            changed = False
            for folder in self._folders(self.top):
                for name, changes in folder.names.items():
                    for _, after in changes[1 : kept[id(folder)][name] + 1]:
                        if after and kept[id(after[0])].get(after[1], after[2]) < after[2]:
                            kept[id(after[0])][after[1]] = after[2]
                            changed = True
        return dict(self._surviving(self.top, "", kept, mode, draw))

    def _folders(self, top):
        """Every folder that any name has led to."""
        yield top
        for changes in top.names.values():
            for node in {id(node): node for node, _ in changes if isinstance(node, Folder)}.values():
                yield from self._folders(node)

    def _surviving(self, folder, prefix, kept, mode, draw):
        for name, changes in folder.names.items():
            node = changes[kept[id(folder)][name]][0]
            if isinstance(node, Folder):
                yield prefix + name, None
                yield from self._surviving(node, f"{prefix}{name}/", kept, mode, draw)
            elif node is not None:
                yield prefix + name, node.survivor(mode, draw)


def states_after(code, folder, n):
    """Run Python code on the empty folder "root" in `folder`, and lose power at its end, n times."""
    root, draw = folder / "root", random.Random(1)
    root.mkdir()
    disk = Disk(root)
    for call in record([sys.executable, "-c", code, str(root)], folder / "log"):
        disk.run(call)
    left = {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
    assert disk.lose_power(draw, "everything") == left
    return [disk.lose_power(draw) for _ in range(n)]


def write(state, folder):
    """Write a state of `Disk.lose_power` to a new folder."""
    folder.mkdir()
    for path, content in state.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
