"""Where adapters come from and go to: one small interface, an implementation a scheme."""

from hubkit.remotes.registry import open_source, open_target, remote, target
from hubkit.remotes.source import RemoteFile, Source, Stream, TransientError
from hubkit.remotes.target import Package, Pushed, Target, Terms

__all__ = [
    "Package",
    "Pushed",
    "RemoteFile",
    "Source",
    "Stream",
    "Target",
    "Terms",
    "TransientError",
    "open_source",
    "open_target",
    "remote",
    "target",
]
