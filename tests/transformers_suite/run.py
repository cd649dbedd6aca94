"""Run transformers' common tests on the LongNet classes: `make conformance`, or this file with pytest's arguments.

Fetches the tests of the installed transformers version (``upstream.py``), runs ``suite.py`` and, if nothing was
deselected, holds what was skipped against ``tests/transformers_suite.md``; ``--write-skips`` writes that list instead.
"""

import os
import subprocess
import sys
from pathlib import Path

from upstream import fetch


HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def main(arguments: list[str]) -> int:
    folder = fetch(ROOT / ".pytest_cache" / "transformers")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    # A configuration of its own: upstream's tests warn, and carry marks of their own.
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "-p", "skip_list", *arguments]
    return subprocess.run([*command, str(HERE / "suite.py")], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
