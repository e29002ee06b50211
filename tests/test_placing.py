import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tf_prune import placing
from tf_prune.whole_files import replacing_file

NAMES = ("folder", "model", "picture", "report")
OLD = {"folder/part": "old", "model": "old", "picture": "old", "report": "old"}
NEW = {"folder/part": "new", "model": "new", "report": "new"}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder):
    return {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*") if file.is_file()}


def replacing(directory):
    return placing.replacing(directory, NAMES, "report")


def replace(directory, files):
    with replacing(directory) as work:
        write(work, files)


def replace_while(monkeypatch, renaming, directory):
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", renaming)
        replace(directory, NEW)


def fail_in(file):
    file.write_text("half")
    raise ZeroDivisionError


def fail(work):
    write(work, NEW)
    raise ZeroDivisionError


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("how", ["kill", "interrupt", pytest.param("twice", marks=pytest.mark.slow)])
def test_stopped_anywhere_it_leaves_the_old_set_or_the_new_one_and_the_next_run_repairs_the_rest(how):
    script = Path(__file__).with_name("killed_placing.py")
    done = subprocess.run([sys.executable, script, placing.__file__, how], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    cases = [dict(pair.split("=") for pair in line.split()) for line in done.stdout.splitlines()]
    assert len(cases) == 3
    for case in cases:
        assert all(int(count) > 5 for count in case.values())  # each kind of end was seen


def test_entries_that_the_new_set_has_not_go_and_those_of_others_stay(tmp_path):
    mine = {"notes": "mine", ".git/config": "mine", ".tf_prune-mine": "mine", "model.py": "mine"}
    write(tmp_path, {**OLD, **mine})
    replace(tmp_path, NEW)
    assert read(tmp_path) == {**NEW, **mine}


def test_where_no_set_is_only_entries_of_the_same_names_are_replaced(tmp_path):
    write(tmp_path, {"picture": "mine", "model": "old"})
    replace(tmp_path, NEW)
    assert read(tmp_path) == {**NEW, "picture": "mine"}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("before", [{}, OLD])
def test_whichever_rename_fails_the_earlier_set_is_there(error, before, tmp_path, monkeypatch):
    honest, number, failed = os.replace, 0, True

    def failing(source, target):
        calls.append(source)
        if len(calls) == number:
            raise error
        honest(source, target)

    while failed:
        number, calls, directory = number + 1, [], tmp_path / str(number)
        write(directory, before)
        with contextlib.suppress(OSError, KeyboardInterrupt):
            replace_while(monkeypatch, failing, directory)
        failed = len(calls) >= number
        assert read(directory) == (before if failed else NEW)
        assert directory.exists() == bool(before or not failed)
        assert not list(tmp_path.glob("*/.*"))
    assert number == 1 + 2 + len(before) + len(NEW)  # each rename failed once; two are of the work folder


def test_a_second_interrupt_while_the_earlier_set_comes_back_waits(tmp_path, monkeypatch):
    honest = os.replace
    for first in range(1, 9):
        for second in range(first + 1, first + 6):
            write(tmp_path, OLD)
            calls = []

            def interrupted(source, target, calls=calls, at=(first, second)):
                calls.append(source)
                honest(source, target)
                if len(calls) in at:
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                replace_while(monkeypatch, interrupted, tmp_path)
            assert read(tmp_path) == OLD


def test_what_cannot_be_put_back_either_is_kept_said_and_completed_by_the_next_run(tmp_path, monkeypatch):
    write(tmp_path, {**OLD, "notes": "mine"})
    honest, calls = os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) > 4:
            raise OSError(errno.EIO, "Input/output error")
        honest(source, target)

    with pytest.raises(OSError, match=r"holds a part of what is to be there.*next run"):
        replace_while(monkeypatch, failing, tmp_path)
    assert not (tmp_path / "report").exists()
    with pytest.raises(ZeroDivisionError), replacing(tmp_path) as work:
        fail(work)
    assert read(tmp_path) == {**NEW, "notes": "mine"}


@pytest.mark.parametrize("renames", range(2, 8))
def test_a_run_that_began_before_another_was_stopped_amid_its_moves_wins_whole(renames, tmp_path, monkeypatch):
    write(tmp_path, OLD)
    honest, calls = os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) > renames:
            raise OSError(errno.EIO, "Input/output error")
        honest(source, target)

    third = {"model": "third", "report": "third"}
    with replacing(tmp_path) as work:
        write(work, third)
        with pytest.raises(OSError, match="holds a part"):
            replace_while(monkeypatch, failing, tmp_path)
    assert read(tmp_path) == third
    replace(tmp_path, NEW)
    assert read(tmp_path) == NEW


def read_without_work(directory):
    return {name: text for name, text in read(directory).items() if not name.startswith(placing.PREFIX)}


def test_errors_of_the_moves_are_said_in_words(tmp_path, monkeypatch):
    write(tmp_path, OLD)

    def failing(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match=r"Cannot put files into .*: No space left on device\. It is as it was before"):
        replace(tmp_path, NEW)


def test_a_run_that_lives_keeps_its_folder_and_the_last_one_wins(tmp_path):
    with replacing(tmp_path) as first:
        write(first, OLD)
        replace(tmp_path, NEW)
        assert read_without_work(tmp_path) == NEW
    assert read(tmp_path) == OLD
    assert sorted(os.listdir(tmp_path)) == sorted({name.split("/")[0] for name in OLD})


def test_the_folder_of_another_process_stays_until_that_is_killed(tmp_path):
    code = (
        "import importlib.util, sys, time\n"
        "spec = importlib.util.spec_from_file_location('placing', sys.argv[1])\n"
        "placing = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(placing)\n"
        "with placing.replacing(sys.argv[2], ['report'], 'report') as work:\n"
        "    print('began', flush=True)\n"
        "    time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, placing.__file__, tmp_path], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        replace(tmp_path, NEW)
        (work,) = tmp_path.glob(".*")
        other.kill()
        other.wait()
    assert other.returncode == -signal.SIGKILL
    replace(tmp_path, NEW)
    assert not work.exists()
    assert read(tmp_path) == NEW


def test_of_many_runs_at_once_one_wins_whole_and_none_fails(tmp_path):
    sets = [{name: f"{i} {name}" for name in (NEW, OLD)[i % 2]} for i in range(6)]
    errors, start = [], threading.Barrier(len(sets))

    def several(files):
        start.wait()
        try:
            for _ in range(5):
                with contextlib.suppress(ZeroDivisionError), replacing(tmp_path / "new" / "out") as work:
                    write(work, files)
                    if int(files["report"][0]) > 3:
                        raise ZeroDivisionError
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=several, args=(files,)) for files in sets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert read(tmp_path / "new" / "out") in sets[:4]


def test_a_run_that_stands_still_amid_its_moves_is_not_waited_for_forever(tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    monkeypatch.setattr(placing, "_PATIENCE", 0.01)
    write(tmp_path, OLD)
    with placing._alone_in(tmp_path), pytest.raises(TimeoutError, match=r"Cannot write into .*another run has been"):
        replace(tmp_path, NEW)
    assert read(tmp_path) == OLD


@pytest.mark.parametrize("missing", ["fcntl", "locks"])
def test_without_locks_a_set_is_replaced_too(missing, tmp_path, monkeypatch):
    def without(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    def as_on_windows(path, missing_ok=False):
        if path.name == "lock":
            raise PermissionError(errno.EACCES, "it is open")
        honest(path, missing_ok)

    honest = Path.unlink
    if missing == "fcntl":
        monkeypatch.setattr(placing, "fcntl", None)
        monkeypatch.setattr(Path, "unlink", as_on_windows)
    else:
        monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", without)
    with replacing(tmp_path) as first:
        write(first, OLD)
        replace(tmp_path, NEW)
        assert read_without_work(tmp_path) == NEW
    assert read(tmp_path) == OLD


@pytest.mark.parametrize("kind", ["file", "link", "dangling link", "link to a file", "read-only files"])
def test_an_old_entry_may_be_of_any_kind(kind, tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    write(elsewhere, {"part": "mine"})
    write(out, {"report": "old", "model": "old"})
    if kind == "file":
        (out / "folder").write_text("old")
    elif kind == "read-only files":
        (out / "folder" / "inner").mkdir(parents=True)
        (out / "folder" / "inner" / "part").write_text("old")
        for file in (out / "folder" / "inner" / "part", out / "folder" / "inner", out / "model"):
            file.chmod(stat.S_IRUSR | stat.S_IXUSR)
    else:
        target = {"link": elsewhere, "dangling link": tmp_path / "nowhere", "link to a file": elsewhere / "part"}[kind]
        (out / "folder").symlink_to(target)
    replace(out, NEW)
    assert read(out) == NEW
    assert not (out / "folder").is_symlink()
    assert read(elsewhere) == {"part": "mine"}
    assert sorted(os.listdir(out)) == ["folder", "model", "report"]


def test_a_write_protected_folder_is_named_before_the_work(tmp_path, monkeypatch):
    write(tmp_path, OLD)
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path / "folder")
    expected = pytest.raises(PermissionError, match=r"Cannot write into .*: folder there is write-protected")
    with expected, replacing(tmp_path):
        raise AssertionError("begun")
    assert read(tmp_path) == OLD


def test_links_and_the_current_directory_are_followed_as_the_run_begins(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    for directory in (".", "new/out", tmp_path / "link"):
        with replacing(directory) as work:
            os.chdir(tmp_path / "other")
            (tmp_path / "link").unlink()
            (tmp_path / "link").symlink_to("other")
            write(work, NEW)
        os.chdir(tmp_path / "real")
        (tmp_path / "link").unlink()
        (tmp_path / "link").symlink_to("real")
        assert read(tmp_path / "real" / ("new/out" if directory == "new/out" else ".")).items() >= NEW.items()
        assert os.listdir(tmp_path / "other") == []


def test_what_somebody_puts_there_between_a_kill_and_the_next_run_does_not_stop_that(tmp_path, monkeypatch):
    write(tmp_path, OLD)
    honest, calls = os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) > 6:
            raise OSError(errno.EIO, "Input/output error")
        honest(source, target)

    with pytest.raises(OSError, match="holds a part"):
        replace_while(monkeypatch, failing, tmp_path)
    write(tmp_path, OLD)
    replace(tmp_path, NEW)
    assert read(tmp_path) == NEW


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file, link = tmp_path / ("n" * 255), tmp_path / "link"
    link.symlink_to(file)
    with replacing_file(link) as temporary:
        temporary.write_text("first")
    with pytest.raises(ZeroDivisionError), replacing_file(file) as temporary:
        fail_in(temporary)
    assert file.read_text() == "first"
    assert link.is_symlink()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask
    with pytest.raises(FileNotFoundError, match=r"/no/report'"), replacing_file(tmp_path / "no/report") as name:
        name.write_text("")
    assert sorted(os.listdir(tmp_path)) == sorted([file.name, "link"])


def test_a_device_is_written_to_as_it_is():
    with replacing_file(os.devnull) as name:
        name.write_text("text")
    assert not Path(os.devnull).is_file()
