"""JSON as RFC 8259 has it: without infinities and NaN, which Python's json writes as names that no JSON has."""

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """json.dumps, with null in place of an infinity or NaN."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
