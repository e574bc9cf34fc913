"""JSON by RFC 8259, which has no infinities and no NaN; Python's json writes names for them."""

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """json.dumps, with null for infinities and NaN."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value
