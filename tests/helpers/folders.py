"""Files of a folder: their contents, damage to one of them, and a full disk."""

import errno


def contents(folder):
    """Read every file below a folder: {relative path: bytes}."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip_bit(path, at=None, bit=1):
    """Change bits of one byte of a file; of the byte in the middle by default."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= bit
    path.write_bytes(content)


def full_disk(descriptor):
    """Fail as os.fsync does on a full disk, which it replaces."""
    raise OSError(errno.ENOSPC, "No space left on device")
