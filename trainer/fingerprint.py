"""The fingerprint of a run, which decides whether it may be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

# Raise this when a change to the code changes results by more than rounding, so that earlier
# checkpoints are refused. tests/test_recorded_results.py detects such changes.
RESULTS_FORMAT = 3


def fingerprint(settings: Mapping[str, Any], *inputs: bytes) -> str:
    """Hash what determines the results of a run.

    Args:
        settings: all settings that affect results, as JSON values.
        inputs: the data and other inputs, or hashes of them.

    Returns:
        Hex SHA-256.
    """
    digest = hashlib.sha256(json.dumps([RESULTS_FORMAT, dict(settings)]).encode())
    for value in inputs:
        digest.update(hashlib.sha256(value).digest())
    return digest.hexdigest()
