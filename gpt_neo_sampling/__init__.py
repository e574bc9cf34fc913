"""GPT-Neo's sampling in mesh-tensorflow: faithful, linear, repeatable.

The package's names are imported, all together, when one of them is first used: TensorFlow takes seconds.
"""

from typing import TYPE_CHECKING, Any

from gpt_neo_sampling import _compat  # noqa: F401  (makes mesh-tensorflow importable)
from gpt_neo_sampling._version import VERSION

if TYPE_CHECKING:
    from gpt_neo_sampling._api import *  # noqa: F403
    from gpt_neo_sampling._api import __all__ as __all__

__version__ = VERSION


def __getattr__(name: str) -> Any:
    if name.startswith("_") and name != "__all__":  # one of the modules, which is about to be imported
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from gpt_neo_sampling import _api

    if name in _api.__all__ or name == "__all__":
        return getattr(_api, name)
    if name in globals():  # a module that came with them
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    from gpt_neo_sampling import _api

    return sorted({*globals(), *_api.__all__})
