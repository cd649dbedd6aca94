"""Fetch transformers' own common model tests: its source distribution carries them, the installed wheel does not.

The source distribution leaves out what these files import from subfolders of its test tree; ``STAND_INS`` says which
file of ours takes which place. The result is a package ``transformers_tests`` of the very version that is installed.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers


PACKAGE = "transformers_tests"
OURS = Path(__file__).parent / "stand_ins"
STAND_INS = {
    "distributed_testing_utils.py": "distributed_testing_utils.py",
    "exporters/test_export.py": "export_mixin.py",
    "generation/test_utils.py": "generation_mixin.py",
    "utils/test_configuration_utils.py": "common_config_values.py",
}


def fetch(cache: Path, version: str = transformers.__version__) -> Path:
    """Lay out the test package under ``cache``, downloading the source distribution unless it is there.

    Returns:
        The folder to put on ``sys.path``.

    Raises:
        RuntimeError: if the source distribution cannot be downloaded; nothing is left in the cache then.
    """
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / f"transformers-{version}.tar.gz"
    if not archive.exists():
        _download(version, archive)
    folder = cache / version
    package = folder / PACKAGE
    if not package.exists():
        with tempfile.TemporaryDirectory(dir=cache) as scratch, tarfile.open(archive) as tar:
            prefix = f"transformers-{version}/tests/"
            tar.extractall(scratch, [m for m in tar if m.isfile() and m.name.startswith(prefix)], filter="data")
            unpacked = Path(scratch) / prefix
            (unpacked / "__init__.py").touch()
            folder.mkdir(exist_ok=True)
            unpacked.rename(package)
    for target, source in STAND_INS.items():  # always: ours may have changed
        place = package / target
        place.parent.mkdir(exist_ok=True)
        (place.parent / "__init__.py").touch()
        if not place.exists() or place.read_bytes() != (OURS / source).read_bytes():
            shutil.copyfile(OURS / source, place)
    return folder


def _download(version: str, archive: Path) -> None:
    with tempfile.TemporaryDirectory(dir=archive.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--no-binary", ":all:", "--no-build-isolation", f"transformers=={version}", "--dest", scratch]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            raise RuntimeError(f"cannot download the source distribution of transformers {version}:\n{process.stderr}")
        (Path(scratch) / archive.name).rename(archive)
