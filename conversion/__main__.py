"""``python -m conversion``, the same as ``longnet-convert``."""

import sys

from .cli import main


sys.exit(main())
