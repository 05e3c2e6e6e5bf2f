"""``python -m openllama``."""

import sys

from openllama.cli import main

sys.exit(main())
