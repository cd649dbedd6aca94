"""A folder that appears whole or not at all."""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path


REPORT_NAME = "conversion_report.json"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What Python and the Hub's client leave in a folder for themselves.
LEFT_BY_TOOLS = ("__pycache__", ".cache/huggingface")


@contextlib.contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes ``target`` when the block ends, and vanishes when the block raises.

    At every moment, a killed process or a lost machine included, ``target`` is what it was before or the complete new
    folder. The work happens in a hidden sibling, ``.NAME.partial``, which is on disk (fsync) before it is renamed; one
    that a killed run left behind is removed by the next run.

    Args:
        target: folder to create; its parents are created as needed. Where it is a symbolic link, the folder that the
            link names is replaced, and the link stays.
        overwrite: replace what an earlier conversion wrote: a folder whose report lists every file in it.

    Raises:
        ValueError: if ``target`` exists and may not be replaced, another process is making it, or its disk is full.
    """
    target = target.resolve()
    check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_folder(target)
    with _locked_folder(partial, target):
        try:
            yield partial
            _sync(partial)
            _rename(partial, target, overwrite)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            free = shutil.disk_usage(partial).free
            raise ValueError(
                f"{target} is not written, its disk has no room ({error.strerror}; {free / 1e6:,.0f} MB free): make room "
                "or choose a target elsewhere"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def partial_folder(target: Path) -> Path:
    """Return where the folder that will be ``target`` is filled."""
    return target.with_name(f".{target.name}.partial")


def existing_folder(target: Path) -> Path:
    """Return the nearest folder above ``target`` that is there, or whatever is there in its place."""
    return next((folder for folder in target.absolute().parents if os.path.lexists(folder)), target)


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that may not be created or replaced.

    Raises:
        ValueError: if it exists without ``overwrite``, is neither empty nor all written by a conversion, would lie in a
            file, or in a folder that may not be written to.
    """
    above = existing_folder(target)
    if not above.is_dir():
        raise ValueError(f"{target} cannot be created because {above} is not a folder; choose another target")
    _check_replaceable(target, overwrite)
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"{target} cannot be created because {above} may not be written to; choose another target")


def _check_replaceable(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ValueError(f"{target} exists already; choose another target or pass overwrite (--overwrite)")
    if target.is_dir() and not any(target.iterdir()):
        return
    written = _written_files(target)
    if written is None:
        raise ValueError(
            f"{target} is no checkpoint folder of a conversion (no {REPORT_NAME} that lists its files), so it is not "
            "overwritten; remove it first"
        )
    if (foreign := _first_foreign(target, written)) is not None:
        raise ValueError(
            f"{target} holds {foreign}, which no conversion wrote, so it is not overwritten; move that elsewhere first"
        )


def write_report(folder: Path, report: dict) -> None:
    """Write a conversion's report once all other files are there, and list them: these, and no more, are replaceable."""
    written = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    report["files"] = sorted([*written, REPORT_NAME])
    (folder / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")


def _written_files(folder: Path) -> set[str] | None:
    """Return what the folder's report lists; None if it has no report or that lists nothing."""
    try:
        files = json.loads((folder / REPORT_NAME).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return set(files) if isinstance(files, list) and all(isinstance(name, str) for name in files) else None


def _first_foreign(folder: Path, written: set[str]) -> str | None:
    """Name the first file or folder, in order of their names, that is neither written nor holds what is."""
    above = {parent.as_posix() for name in (*written, *LEFT_BY_TOOLS) for parent in Path(name).parents}
    foreign = []
    for parent, names, files in os.walk(folder):
        inside = Path(parent).relative_to(folder)
        strange = [name for name in names if (inside / name).as_posix() not in {*above, *LEFT_BY_TOOLS}]
        foreign += [f"{(inside / name).as_posix()}/" for name in strange]
        foreign += [name for file in files if (name := (inside / file).as_posix()) not in written]
        names[:] = [name for name in names if name not in strange and (inside / name).as_posix() not in LEFT_BY_TOOLS]
    return min(foreign, default=None)


@contextlib.contextmanager
def _locked_folder(folder: Path, target: Path) -> Iterator[None]:
    """Hold ``folder``, created or emptied, under a lock that ends with the process, however it ends."""
    while True:
        if folder.is_symlink():  # as nothing here leaves behind, and nothing here may follow
            folder.unlink()
        folder.mkdir(exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another process is writing {target} right now (in {folder})") from error
            # Between our open and our lock the previous holder may have renamed or removed the folder.
            if folder.exists() and folder.stat().st_ino == os.fstat(descriptor).st_ino:
                for leftover in folder.iterdir():
                    shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
                yield
                return
        finally:
            os.close(descriptor)


def _sync(folder: Path) -> None:
    """Bring every file and folder below to the disk."""
    for parent, _, files in os.walk(folder):
        for name in [*files, "."]:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _rename(partial: Path, target: Path, overwrite: bool) -> None:
    check_target(target, overwrite)  # it may have appeared meanwhile
    if not target.exists():
        partial.rename(target)
    elif not _exchange(partial, target):
        # No exchange on this system: for an instant there is no target, and the old one waits next to it.
        old = target.with_name(f".{target.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one atomic step; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    at_cwd, rename_exchange = -100, 2
    return renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), rename_exchange) == 0
