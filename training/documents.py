"""Long documents from the Python source on this machine: one package, all its files in order, is one document.

Real text, present wherever this runs. Whole packages are what long context is for: a file uses names that another
file of its package defines, tens of thousands of tokens away.
"""

import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict


# Tables rather than prose of programmers, or not in every Python.
SKIPPED_FOLDERS = {"__pycache__", "encodings", "idle_test", "pydoc_data", "test"}


class Document(TypedDict):
    """A text, and the package that it is."""

    name: str
    text: str


def standard_library() -> Path:
    """Return the folder of Python's own source files."""
    return Path(sysconfig.get_path("stdlib"))


def installed_packages() -> Path:
    """Return the folder of what pip has installed."""
    return Path(sysconfig.get_path("purelib"))


class Package(NamedTuple):
    """An installed package or module: its name, the folder it lies in, and its files in order."""

    name: str
    root: Path
    files: list[Path]

    def text(self, path: Path) -> str:
        """Read a file, headed by its path, which imports elsewhere in the package speak of; "" for an empty one."""
        text = path.read_text(encoding="utf-8", errors="ignore").strip()
        return f"# {path.relative_to(self.root).as_posix()}\n{text}\n" if text else ""


def find_packages(
    roots: str | Path | Sequence[str | Path] = (), held_out: bool = False, held_out_in: int = 8
) -> Iterator[Package]:
    """Yield packages, unread, in an order that is the same in every run; arguments as of ``python_packages``."""
    roots = [roots] if isinstance(roots, str | Path) else roots or [standard_library()]
    for root in map(Path, roots):
        for entry in sorted(root.iterdir()):
            if entry.name in SKIPPED_FOLDERS or entry.name.endswith(("-packages", ".dist-info", ".egg-info")):
                continue
            name = entry.stem
            if (zlib.crc32(name.encode()) % held_out_in == 0) != held_out:
                continue
            files = [entry] if entry.suffix == ".py" else sorted(entry.rglob("*.py")) if entry.is_dir() else []
            if files := [path for path in files if SKIPPED_FOLDERS.isdisjoint(path.parts)]:
                yield Package(name, root, files)


def python_packages(
    roots: str | Path | Sequence[str | Path] = (), held_out: bool = False, held_out_in: int = 8
) -> Iterator[Document]:
    """Yield packages as documents, in an order that is the same in every run.

    Args:
        roots: folders that hold packages and modules, or one such folder; the standard library's if empty.
            ``site-packages`` inside a root is passed over: name it as a root of its own.
        held_out: yield those kept for evaluation instead of those to train on. The two share no package.
        held_out_in: one package in so many is held out, chosen by its name alone.
    """
    for package in find_packages(roots, held_out, held_out_in):
        if texts := [text for text in map(package.text, package.files) if text]:
            yield {"name": package.name, "text": "\n".join(texts)}
