"""Files are whole or absent, temporary names cannot be planted, only regular files are read, and faults are named."""

import errno
import json
import multiprocessing
import os
import signal
import stat
from pathlib import Path

import pytest
from folders import contents, full_disk

from fmn_ref import _files


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def killed_while_writing(path):
    """Start to write a file in a process that is killed before it ends."""

    def write(file):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=_files.write_atomic, args=(path, write))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


class TestTemporaryNames:
    def test_no_two_are_alike(self, tmp_path):
        seen = set()
        for _ in range(20):
            with _files.replacing(tmp_path / "a") as temporary:
                seen.add(temporary.name)
                temporary.write_text("x")
        assert len(seen) == 20
        assert names(tmp_path) == ["a"]

    @pytest.mark.parametrize("name", [".report.html.tmp", ".report.html.00000000.tmp"])
    def test_a_planted_link_is_not_followed(self, tmp_path, monkeypatch, name):
        (tmp_path / "mine").write_text("precious")
        (tmp_path / name).symlink_to(tmp_path / "mine")
        tokens = iter(["00000000", "11111111"])  # even if somebody guessed the first one
        monkeypatch.setattr(
            _files, "unpredictable", lambda path, ending: path.with_name(f".{path.name}.{next(tokens)}.tmp{ending}")
        )
        try:
            _files.write_atomic(tmp_path / "report.html", lambda file: file.write(b"<html>"))
        except FileExistsError:
            assert not (tmp_path / "report.html").exists()
        assert (tmp_path / "mine").read_text() == "precious"

    def test_a_link_is_replaced_and_its_target_left_alone(self, tmp_path):
        (tmp_path / "mine").write_text("precious")
        (tmp_path / "a").symlink_to(tmp_path / "mine")
        _files.write_atomic(tmp_path / "a", lambda file: file.write(b"new"))
        assert (tmp_path / "mine").read_text() == "precious"
        assert (tmp_path / "a").read_text() == "new"

    def test_what_a_killed_process_left_is_deleted_by_the_next_write(self, tmp_path):
        killed_while_writing(tmp_path / "plan.json")
        killed_while_writing(tmp_path / "other.json")
        assert len(names(tmp_path)) == 2
        _files.write_json(tmp_path / "plan.json", {})
        left = names(tmp_path)
        assert left[-1] == "plan.json"
        assert [n.startswith(".other.json.") for n in left[:-1]] == [True]
        _files.remove_leftovers(tmp_path)
        assert names(tmp_path) == ["plan.json"]

    def test_a_file_that_is_being_written_is_left_alone(self, tmp_path):
        def write(file):
            file.write(b"first")
            done = multiprocessing.get_context("fork").Process(target=_files.write_json, args=(tmp_path / "a", 2))
            done.start()
            done.join()
            assert done.exitcode == 0
            assert json.loads((tmp_path / "a").read_text()) == 2

        _files.write_atomic(tmp_path / "a", write)
        assert (tmp_path / "a").read_text() == "first"  # the later rename wins, and is whole

    def test_without_locks_age_decides(self, tmp_path, monkeypatch):
        killed_while_writing(tmp_path / "a")
        [left] = tmp_path.iterdir()
        monkeypatch.setattr(_files, "fcntl", None)
        _files.write_json(tmp_path / "a", 1)
        assert left.exists()
        os.utime(left, (1e9, 1e9))
        _files.write_json(tmp_path / "a", 1)
        assert names(tmp_path) == ["a"]

    @pytest.mark.parametrize(
        "name", [".a.tmp", ".a.0123456.tmp", ".ab.01234567.tmp", "a.01234567.tmp", ".a.01234567.txt"]
    )
    def test_files_of_other_names_are_somebody_elses(self, tmp_path, name):
        (tmp_path / name).write_text("mine")
        _files.write_json(tmp_path / "a", 1)
        assert (tmp_path / name).read_text() == "mine"

    def test_permissions_are_those_of_a_new_file(self, tmp_path):
        """A file that others may read stays readable for them."""
        (tmp_path / "plain").write_text("")
        _files.write_json(tmp_path / "a", 1)
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


class TestWriting:
    @pytest.mark.parametrize("ending", ["", ".weights.h5"])
    def test_an_error_changes_nothing(self, tmp_path, ending):
        (tmp_path / "a").write_text("old")
        with pytest.raises(ZeroDivisionError), _files.replacing(tmp_path / "a", ending) as temporary:
            1 / (temporary.write_text("new") - 3)
        assert temporary.name.endswith(f".tmp{ending}")
        assert contents(tmp_path) == {Path("a"): b"old"}

    def test_a_writer_may_lock_the_file_as_hdf5_does(self, tmp_path):
        with _files.replacing(tmp_path / "a") as temporary, open(temporary, "wb") as file:
            assert _files.try_lock(file.fileno()) in (True, None)

    def test_a_writer_may_make_the_file_anew(self, tmp_path):
        with _files.replacing(tmp_path / "a") as temporary:
            temporary.unlink()
            temporary.write_text("new")
        assert contents(tmp_path) == {Path("a"): b"new"}

    @pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda p: os.symlink("/dev/null", p)])
    def test_only_regular_files_are_replaced(self, tmp_path, make):
        """A device such as /dev/null would become a file, for everybody."""
        make(tmp_path / "a")
        before = os.lstat(tmp_path / "a")
        with pytest.raises(ValueError, match=r"/a: expected a regular file to replace"):
            _files.write_json(tmp_path / "a", 1)
        assert os.path.samestat(os.lstat(tmp_path / "a"), before)

    @pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES])
    def test_a_folder_that_cannot_be_synced_is_written_to(self, tmp_path, monkeypatch, code):
        """As on CIFS, FUSE and VirtualBox."""
        monkeypatch.setattr(os, "fsync", failing_for_folders(code))
        _files.write_json(tmp_path / "a", 1)
        assert names(tmp_path) == ["a"]

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
    def test_other_errors_of_a_folder_are_told(self, tmp_path, monkeypatch, code):
        monkeypatch.setattr(os, "fsync", failing_for_folders(code))
        with pytest.raises(OSError, match=r"/a'") as caught:
            _files.write_json(tmp_path / "a", 1)
        assert caught.value.errno == code

    def test_a_folder_that_may_not_be_listed_is_written_to(self, tmp_path, monkeypatch):
        def refused(path, flags, *more):
            if flags & os.O_DIRECTORY:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, flags, *more)

        real = os.open
        monkeypatch.setattr(os, "open", refused)
        monkeypatch.setattr(os, "listdir", lambda path: refused(path, os.O_DIRECTORY))
        _files.write_json(tmp_path / "a", 1)
        monkeypatch.undo()
        assert names(tmp_path) == ["a"]

    def test_a_full_disk_names_the_file(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match=r"No space.*/a'"):
            _files.write_json(tmp_path / "a", 1)
        assert names(tmp_path) == []

    def test_the_folder_must_exist(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="none does not exist"):
            _files.write_json(tmp_path / "none" / "a", 1)


def failing_for_folders(code):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    return fsync


class TestPaths:
    def test_the_home_and_the_working_directory_are_filled_in(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        assert _files.absolute("~/a") == _files.absolute("a") == tmp_path / "a"
        assert _files.absolute(tmp_path / "b") == tmp_path / "b"
        assert _files.absolute("~nobody-has-this-name/a") == tmp_path / "~nobody-has-this-name" / "a"

    def test_links_are_kept(self, tmp_path):
        """ "link/.." is the folder above the link's target."""
        (tmp_path / "deep" / "er").mkdir(parents=True)
        (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
        _files.write_json(tmp_path / "link" / ".." / "a", 1)
        assert (tmp_path / "deep" / "a").exists()


class TestReading:
    @pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda p: os.symlink("/dev/zero", p)])
    def test_only_regular_files_are_read(self, tmp_path, make):
        make(tmp_path / "run.json")
        with pytest.raises(ValueError, match=r"run\.json: expected a regular file"):
            _files.read_json(tmp_path / "run.json", "fmn_ref.run")

    def test_a_missing_file_is_an_os_error(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="none"):
            _files.read_json(tmp_path / "none", "fmn_ref.run")

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (KeyError("x"), "missing 'x'"),
            (IndexError(), "IndexError"),
            (OSError(errno.EIO, "bad disk"), r"\[Errno 5\] bad disk"),
            (ValueError("two\nlines"), "two lines"),
            (RecursionError("too deep"), "too deep"),
            (AssertionError(), "AssertionError"),
        ],
    )
    def test_any_error_becomes_one_with_the_name_and_the_cause(self, tmp_path, error, words):
        (tmp_path / "a").write_text("x")
        fault = pytest.raises(ValueError, match=rf"^\S+/a: not a poem: {words}$")
        with fault, _files.reading(tmp_path / "a", "a poem"):
            raise error

    def test_a_file_that_is_gone_is_not_taken_for_damage(self, tmp_path):
        """It may go between two looks at it. Another file that lacks is the fault of this one."""
        (tmp_path / "a").write_text("b")
        with pytest.raises(ValueError, match="/a: not a poem"), _files.reading(tmp_path / "a", "a poem"):
            (tmp_path / "b").stat()
        with pytest.raises(FileNotFoundError, match=r"/a'$"), _files.reading(tmp_path / "a", "a poem"):  # noqa: PT012
            (tmp_path / "a").unlink()
            (tmp_path / "a").stat()

    @pytest.mark.parametrize(
        ("text", "words"), [("", "reading 1 bytes needs more memory"), ("allocate 3 GiB", "3 GiB")]
    )
    def test_too_little_memory_is_no_fault_of_the_file(self, tmp_path, text, words):
        (tmp_path / "a").write_text("x")
        with pytest.raises(MemoryError, match=rf"/a: .*{words}"), _files.reading(tmp_path / "a", "a poem"):
            raise MemoryError(text)

    @pytest.mark.parametrize(
        "content",
        [
            *(b"", b"[", b"[" * 100_000, b"7", b"\xff", b"1" * 5000, b'{"format": "other"}'),
            *(b'{"format": "fmn_ref.run", "version": %b}' % version for version in (b"2", b"[1]", b"null")),
        ],
    )
    def test_what_is_no_such_json_is_named(self, tmp_path, content):
        (tmp_path / "run.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"^\S+run\.json: .*fmn_ref\.run"):
            _files.read_json(tmp_path / "run.json", "fmn_ref.run")
