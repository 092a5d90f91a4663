"""What a reader may do with any file: return, or raise one error that names it, soon and in little memory.

Installed code may import late, by a statement `import NAME`: the name stands in that code, and a file cannot choose it.
An import by any other way is a finding: `__import__`, `importlib.import_module` and pickles take the name as a value.
"""

import codecs
import contextlib
import dis
import os
import resource
import sys
import time

ALLOWED = (ValueError, TypeError, OSError, MemoryError)
SECONDS, MOST_MEMORY = 1.0, 512 << 20  # of the processor, and beyond the file
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CODE = {"exec", "import", "subprocess.Popen", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn"}
_CODE |= {"pickle.find_class", "os.putenv", "socket.connect", "socket.bind", "ctypes.dlopen", "ctypes.call_function"}
_CHANGES = {
    f"os.{name}" for name in ("mkdir", "remove", "rename", "rmdir", "link", "symlink", "truncate", "chmod", "chown")
}
_ENCODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")  # of texts
_ENCODINGS += ("cp437", "ascii", "latin-1", "unicode-escape", "raw-unicode-escape")  # of zip files and pickles
_may_write = False  # temporary files
_classes: frozenset[str] = frozenset()  # that a pickle may name
_seen = None  # what the audited call has done; None where nothing is watched
_imported = False  # whether it imported what was not imported before


class Finding(AssertionError):
    """A reader did what it must not do."""


def _audit(event, arguments):
    global _imported
    if _seen is None:
        return
    changes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES
    changes = changes or (event in _CHANGES and not (event == "os.mkdir" and os.path.isdir(arguments[0])))
    if event == "pickle.find_class" and ".".join(arguments) in _classes:
        return
    if event in _CODE or (changes and not _may_write and not str(arguments[0]).endswith(".lock")):
        if _in_import_statement():
            _imported = True
        else:
            _seen.append(f"{event} {arguments!r:.200}")


def _in_import_statement():
    """Tell whether an import statement is being executed; the imported module's own code may do anything."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not check.__code__:
        if frame.f_code.co_code[frame.f_lasti] == dis.opmap["IMPORT_NAME"]:
            return True
        frame = frame.f_back
    return False


def watch():
    """Begin to watch what the interpreter does; first import what code names by a value."""
    import fmn_ref  # not earlier: atheris instruments what it imports itself

    for encoding in _ENCODINGS:
        codecs.lookup(encoding)
    fmn_ref.backend()
    if not getattr(sys, "_fmn_audited", False):
        sys._fmn_audited = True
        sys.addaudithook(_audit)


def _forget_peak():
    """Let Linux count the peak of memory anew: a higher one before would hide that of this reader."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def check(target, path, data, tries=3):
    """Write `data` as the file `path` and read it; a Finding says what the reader did wrong.

    If it imported something, it reads again: the import may have taken the time and the memory. Also if it was slow:
    a busy machine takes longer, and only a reader that is slow three times is a finding.

    Returns
    -------
    bool
        Whether the reader took the file.
    """
    global _seen, _may_write, _imported, _classes
    path.write_bytes(data)
    _forget_peak()
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    _seen, _imported, _may_write, _classes, error = [], False, target.temporary, target.classes, None
    try:
        target.read(path)
    except Exception as raised:
        error = raised
    finally:
        seen, _seen = _seen, None
    seconds = time.process_time() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    if seen:
        raise Finding(f"it did: {seen[0]}")
    large = grown > MOST_MEMORY + len(data)
    if tries > 1 and (_imported or (seconds > SECONDS and not large)):
        return check(target, path, data, tries - 1)
    if seconds > SECONDS or large:
        raise Finding(f"it took {seconds:.1f} s and {grown >> 20} MiB")
    if error is not None and not isinstance(error, ALLOWED):
        raise Finding(f"{type(error).__name__}: {error!s:.200}") from error
    names = (path.name, *target.names)
    told = f"{error} {getattr(error, 'filename', '')}"
    if error is not None and not any(name in told for name in names):
        raise Finding(f"no name in {type(error).__name__}: {error!s:.200}") from error
    return error is None
