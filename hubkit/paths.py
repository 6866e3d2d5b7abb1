"""Where things stand on disk: the user's store and the index that ships with hubkit."""

import os
from pathlib import Path


def default_home() -> Path:
    """The folder that holds the store and the converted bases: `HUBKIT_HOME`, or `~/.cache/hubkit`."""
    return Path(os.environ.get("HUBKIT_HOME") or "~/.cache/hubkit").expanduser()


def index_folder() -> Path:
    """`adapters-index/`: inside an installed wheel it is `hubkit/_index`, in a checkout it is beside
    `hubkit/`."""
    package = Path(__file__).parent
    installed = package / "_index"
    return installed if installed.is_dir() else package.parent / "adapters-index"
