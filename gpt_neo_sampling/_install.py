"""What to run where a package is missing."""

import shlex
import shutil
import sys
from pathlib import Path


def install_line(package: str) -> str:
    """The command that installs a package for this Python, in the least version that this one asks for.

    It names the package and no extra, so it works whether this one came from a clone, a wheel or an index.
    """
    import importlib.metadata  # takes a while, and few need it

    try:
        required = importlib.metadata.requires("gpt_neo_sampling") or []
    except importlib.metadata.PackageNotFoundError:  # this one is on a path, not installed
        required = []
    versions = (requirement.partition(";")[0].strip() for requirement in required)
    wanted = next((version for version in versions if version.startswith(f"{package}>=")), package)
    pip = shutil.which("pip")
    is_ours = pip is not None and Path(pip).parent == Path(sys.executable).parent
    return f"{'pip' if is_ours else f'{shlex.quote(sys.executable)} -m pip'} install {shlex.quote(wanted)}"
