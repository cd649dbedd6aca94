"""Run ``longnet-inspect`` as ``python -m inspection``."""

import sys

from .cli import main


sys.exit(main())
