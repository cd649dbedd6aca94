"""Let any number of processes share the jobs of one folder: each takes the next that nobody has, and none waits long.

A claim is a lock that the operating system holds for a process, so one that is killed leaves its job to the others.
"""

import fcntl
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """Something to do once all of ``needs`` exist, and done when ``result`` does."""

    result: Path
    run: Callable[[], None]
    needs: tuple[Path, ...] = ()


@contextmanager
def claim(result: Path) -> Iterator[bool]:
    """Try to be the one process that works at ``result``; the value says whether it is this one."""
    with result.with_name(f"{result.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # for forked children too, which have the file open


def work_through(
    jobs: Sequence[Job], stop: type[Exception], after_each: Callable[[], None], check_time: Callable[[str], None]
) -> None:
    """Do all jobs, the first ones first, beside other processes that do the same.

    A job that fails is reported with its traceback and left out, and so is what needs it; the others go on.

    Args:
        stop: an exception that ends everything, passed through.
        after_each: called after each job of this process.
        check_time: called with what comes next, before each job and while waiting; may raise ``stop``.

    Raises:
        SystemExit: at the end, if jobs are left undone, naming them.
    """
    failed: set[Path] = set()
    while left := [job for job in jobs if not job.result.exists() and job.result not in failed]:
        somebody_works = False
        for job in left:
            if not all(path.exists() for path in job.needs):
                continue
            with claim(job.result) as is_mine:
                somebody_works |= not is_mine
                if not is_mine or job.result.exists():
                    continue
                check_time(job.result.stem)
                try:
                    job.run()
                except stop:
                    raise
                except Exception:
                    traceback.print_exc()
                    failed.add(job.result)
            after_each()
            break
        else:
            if not somebody_works and not any(job.result.exists() for job in left):
                break
            check_time(left[0].result.stem)
            time.sleep(0.5)
    if undone := [job.result.name for job in jobs if not job.result.exists()]:
        raise SystemExit(f"error: not done: {', '.join(undone)}; the tracebacks above say why")
