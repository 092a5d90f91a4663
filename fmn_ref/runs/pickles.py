"""Scan a pickle before something loads it: how large and how deep its result is, and that no container holds itself.

A pickle is a program. Nine bytes can ask for 2 GiB, fifteen can make a list that contains itself, and a tuple that is a
million deep kills the interpreter. `scan` follows the program without making any object. Standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from typing import Any

DEEPEST = 1000  # as deep as Python's pickle module can write
LONGEST_NAME = 2000  # of a class: torch's error for one that it does not know takes quadratic time
EXPANSION = 64  # values for each byte of a pickle, shared ones counted each time: no honest file has as many
_BYTEARRAY = (b"builtins\nbytearray", b"__builtin__\nbytearray")  # of an integer: that many bytes
_ENCODE = [b"_codecs\nencode"]


def scan(data: Any, contents: bool = False, *, count: int = 1, dropped: Set[bytes] = frozenset()) -> list[Any]:
    """Check a pickle; a ValueError says what is wrong and where.

    Parameters
    ----------
    data : bytes or mmap
    contents : bool, default False
        Read numbers one by one, for the result.
    count : int, default 1
        Number of pickles that follow each other.
    dropped : set of bytes
        Classes, as b"module\\nname", whose objects the loader makes without their content: these may refer to each
        other in circles.

    Returns
    -------
    list
        Persistent identifiers, which torch uses for the storages of tensors. Each is the list of a tuple's values:
        integers, and the bytes of texts and of the names of globals.
    """
    machine, steps = _Machine(data, contents, dropped), _STEPS
    for _ in range(count):
        machine.stack, machine.marks, machine.memo = [], [], {}
        while (op := machine.take_op()) != _STOP:
            steps[op](machine)
    return machine.persistent


class _Container:
    """Facts about a container or an object: its depth, its size with all in it, and whether it may still change.

    Numbers stand for themselves, and texts and names as bytes.
    """

    __slots__ = ("complete", "depth", "parts", "size")

    def __init__(self) -> None:
        self.complete, self.depth, self.size = False, 1, 1
        self.parts: list[Any] = []  # of a short tuple; the function of what a call returned


_EMPTY = object()  # an object without content


class _Machine:
    """The stack and the memo of a pickle that is scanned."""

    def __init__(self, data: Any, contents: bool, dropped: Set[bytes]) -> None:
        self.data: bytes = data
        self.at, self.contents, self.most, self.dropped = 0, contents, EXPANSION * len(data), dropped
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.persistent: list[Any] = []

    def take_op(self) -> int:
        if self.at == len(self.data):
            raise ValueError("it has no end")
        self.at += 1
        return self.data[self.at - 1]

    def take(self, n: int) -> bytes:
        at = self.at
        self.at = at + n
        if self.at > len(self.data):
            raise ValueError(f"it ends within {n} bytes at offset {at}")
        return self.data[at : at + n]

    def take_integer(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def take_line(self) -> bytes:
        end = self.data.find(b"\n", self.at)
        return self.take((len(self.data) if end < 0 else end) + 1 - self.at)[:-1]

    def push(self, value: Any = None) -> None:
        self.stack.append(value)

    def pop(self, n: int) -> list[Any]:
        """Remove the latest n values, down to the latest mark at most."""
        rest = len(self.stack) - n
        if rest < (self.marks[-1] if self.marks else 0):
            raise ValueError(f"it takes a value that is not there at offset {self.at - 1}")
        found = self.stack[rest:]
        del self.stack[rest:]
        return found

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise ValueError(f"it takes a mark that is not there at offset {self.at - 1}")
        found = self.stack[self.marks.pop() :]
        del self.stack[len(self.stack) - len(found) :]
        return found

    def build(self, parts: list[Any], complete: bool = False) -> None:
        """Push a container of the parts."""
        made = _Container()
        self.fill(made, parts)
        made.complete = complete
        if complete and len(parts) < 9:
            made.parts = parts
        self.stack.append(made)

    def extend(self, parts: list[Any]) -> None:
        """Put the parts into the latest value."""
        [target] = self.pop(1)
        if target is _EMPTY:
            return self.push(_EMPTY)
        if not isinstance(target, _Container) or target.complete or target in parts:
            raise ValueError(f"a value contains itself, or changes after its use, at offset {self.at - 1}")
        self.fill(target, parts)
        self.stack.append(target)

    def fill(self, target: _Container, parts: list[Any]) -> None:
        target.size += len(parts)
        for part in parts:
            if type(part) is _Container:
                part.complete = True
                target.size += part.size - 1
                target.depth = max(target.depth, part.depth + 1)
        if target.depth > DEEPEST or target.size > self.most:
            raise ValueError(f"its values are too deep or too many at offset {self.at - 1}")

    def call(self) -> None:
        function, arguments = self.pop(2)
        if isinstance(function, bytes) and function in self.dropped:
            return self.push(_EMPTY)
        first = next(iter(getattr(arguments, "parts", [])), b"")
        if function in _BYTEARRAY and not (isinstance(first, bytes) or getattr(first, "parts", [])[:1] == _ENCODE):
            raise ValueError(f"it asks for memory at offset {self.at - 1}")
        self.build([function, arguments])
        self.stack[-1].parts = [function]

    def identify(self) -> None:
        [identifier] = self.pop(1)
        self.persistent.append(getattr(identifier, "parts", None))
        self.push()

    def name(self, module: Any, name: Any) -> None:
        if any(isinstance(part, bytes) and len(part) > LONGEST_NAME for part in (module, name)):
            raise ValueError(f"a name is too long at offset {self.at - 1}")
        self.push(module + b"\n" + name if isinstance(module, bytes) and isinstance(name, bytes) else None)

    def put(self, index: int) -> None:
        if index > len(self.memo) + 1:  # a pickler counts; an unpickler makes room for all before the index
            raise ValueError(f"it asks for memory at offset {self.at - 1}")
        if not self.stack:
            raise ValueError(f"it keeps a value that is not there at offset {self.at - 1}")
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise ValueError(f"it refers to a value that is not there at offset {self.at - 1}")
        self.stack.append(self.memo[index])

    def refuse(self) -> None:
        op = self.data[self.at - 1 : self.at]
        raise ValueError(f"opcode {op!r} at offset {self.at - 1} is not one that data needs")


Step = Callable[[_Machine], object]


def _number(op: bytes, width: int) -> Step:
    """A number; without contents, with all of its kind that follow at once."""
    run = re.compile(b"(?:%s.{%d}){1,1000}" % (op, width), re.DOTALL)

    def step(m: _Machine) -> None:
        found = None if m.contents else run.match(m.data, m.at - 1)
        if found is None:
            m.stack.append(int.from_bytes(m.take(width), "little", signed=op == b"J"))
        else:
            m.stack += [None] * ((found.end() - found.start()) // (1 + width))
            m.at = found.end()

    return step


def _long(m: _Machine, width: int) -> None:
    m.push(int.from_bytes(m.take(m.take_integer(width)), "little", signed=True))


# What each opcode does. Those that no honest data needs are missing: POP, DUP, INST, OBJ, EXT1, ...
_STEPS_OF: dict[bytes, Step] = {
    b"\x80": lambda m: m.take(1),
    b"\x95": lambda m: m.take(8),
    b"N\x88\x89": lambda m: m.push(),
    **{op: _number(op, width) for op, width in ((b"G", 8), (b"K", 1), (b"M", 2), (b"J", 4))},
    b"ILFSV": lambda m: m.push(m.take_line()),
    b"UC\x8c": lambda m: m.push(m.take(m.take_integer(1))),
    b"TBX": lambda m: m.push(m.take(m.take_integer(4))),
    b"\x8d\x8e\x96": lambda m: m.push(m.take(m.take_integer(8))),
    b"\x8a": lambda m: _long(m, 1),
    b"\x8b": lambda m: _long(m, 4),
    b"c": lambda m: m.name(m.take_line(), m.take_line()),
    b"\x93": lambda m: m.name(*m.pop(2)),
    b"(": lambda m: m.marks.append(len(m.stack)),
    b")": lambda m: m.build([], complete=True),
    b"]}\x8f": lambda m: m.build([]),
    b"t": lambda m: m.build(m.pop_to_mark(), complete=True),
    b"\x85": lambda m: m.build(m.pop(1), complete=True),
    b"\x86": lambda m: m.build(m.pop(2), complete=True),
    b"\x87": lambda m: m.build(m.pop(3), complete=True),
    b"ld\x91": lambda m: m.build(m.pop_to_mark()),
    b"ab": lambda m: m.extend(m.pop(1)),
    b"s": lambda m: m.extend(m.pop(2)),
    b"eu\x90": lambda m: m.extend(m.pop_to_mark()),
    b"R\x81": lambda m: m.call(),
    b"p": lambda m: m.put(int(m.take_line())),
    b"q": lambda m: m.put(m.take_integer(1)),
    b"r": lambda m: m.put(m.take_integer(4)),
    b"\x94": lambda m: m.put(len(m.memo)),
    b"g": lambda m: m.get(int(m.take_line())),
    b"h": lambda m: m.get(m.take_integer(1)),
    b"j": lambda m: m.get(m.take_integer(4)),
    b"Q": lambda m: m.identify(),
}
_STOP = ord(".")
_STEPS: list[Step] = [_Machine.refuse] * 256
for _ops, _step in _STEPS_OF.items():
    for _op in _ops:
        _STEPS[_op] = _step
