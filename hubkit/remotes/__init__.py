"""Where adapters come from: one small interface, an implementation a scheme."""

from hubkit.remotes.source import Source, open_source, remote

__all__ = ["Source", "open_source", "remote"]
