"""The one door to transformers 4.31.0, the oracle every parity test compares with.

Importing this module skips the importing test module on Python 3.12 and newer, where the oracle
cannot be installed, and fails where it should be there and is not.
"""

from __future__ import annotations

import sys
from collections import Counter

import pytest

if sys.version_info >= (3, 12):
    pytest.skip("transformers 4.31.0 needs Python 3.10 or 3.11", allow_module_level=True)

import transformers

if transformers.__version__ != "4.31.0":
    raise ImportError(f"the oracle is transformers 4.31.0, found {transformers.__version__}; run `make test`")

transformers.logging.set_verbosity_error()

#: models compared with the oracle so far, per bar; printed at the end of the test run
compared: Counter[str] = Counter()
