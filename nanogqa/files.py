"""Files that are replaced as a whole or not at all, and the lock of a folder."""
import contextlib
import json
import os
import sys
import warnings
from pathlib import Path

import filelock  # torch depends on it

from nanogqa.configurator import UserError, one_line


def sync(file):
    """Returns once the content of an open file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path, mode="w", errors=None):
    """Opens a temporary file beside path that takes its name on success and is deleted on error.

    The content reaches the disk before the name changes, so a crash leaves either the old file or
    the new one.
    """
    part = Path(f"{path}.part")
    part.unlink(missing_ok=True)  # a symbolic link there would be followed
    encoding = None
    if "b" not in mode:
        encoding = "utf-8"
    try:
        with open(part, mode, encoding=encoding, errors=errors) as file:
            yield file
            sync(file)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path, content):
    """Replaces path with content as JSON."""
    with replacing(path) as file:
        json.dump(content, file, indent=1)


def append(path, text):
    """Appends text to a file: all of it or, after an OSError, nothing."""
    data = text.encode("utf-8")
    with open(path, "ab", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        try:
            while data:  # a disk with little room takes a part
                data = data[file.write(data):]
        except OSError:
            file.truncate(size)
            raise


@contextlib.contextmanager
def lock(folder, busy, patience=60, key="out_dir"):
    """Holds the lock of folder while open. Raises UserError(busy) if another process still holds it
    after patience seconds. key is the setting that names the folder.

    At the end, .lock is removed if it was created here and no other file was.
    """
    before = set(os.listdir(folder))
    held = filelock.FileLock(Path(folder) / ".lock")  # released with the process, however it ends
    try:
        with warnings.catch_warnings():
            # filelock may go on with a mark instead, which would outlive a killed process
            warnings.filterwarnings("error", "flock not supported")
            with contextlib.suppress(filelock.Timeout):
                held.acquire(timeout=min(2, patience), poll_interval=0.2)
            if not held.is_locked:
                if patience > 2:
                    print(f"{folder} is in use: waiting for at most {patience} s", file=sys.stderr,
                          flush=True)
                held.acquire(timeout=max(0, patience - 2), poll_interval=0.2)
    except filelock.Timeout:
        raise UserError(busy) from None
    except (OSError, NotImplementedError, UserWarning) as error:
        if getattr(error, "filename", None):  # .lock cannot be created
            raise
        # some network file systems
        raise UserError(f"{folder} cannot be locked ({one_line(error)}): choose a --{key} on a "
                        "file system that has file locks") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # someone has removed the folder
            added = set(os.listdir(folder)) - before
            if added == {".lock"}:
                (Path(folder) / ".lock").unlink()
        held.release()


@contextlib.contextmanager
def created(folder, key="out_dir"):
    """Creates folder and its parents. At the end, those that it has created and that are still
    empty are removed. Raises UserError if files cannot be created in folder, which the setting key
    names."""
    folder = Path(folder)
    new = []
    for path in (folder, *folder.parents):
        if not path.exists():
            new.append(path)
    try:
        check_writable(folder, key)
        yield
    finally:
        for path in new:
            try:
                path.rmdir()
            except OSError:  # it holds files
                break


def check_writable(folder, key="out_dir"):
    """Creates folder if it does not exist. Raises UserError if files cannot be created in it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / f".probe{os.getpid()}"
        try:
            probe.write_text("x", encoding="utf-8")
        finally:  # a full disk takes the name, but not the content; another rank may remove it
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}): choose another --{key}"
        ) from None
