"""The content-addressed store: blobs, manifests, refs, and what keeps them whole. Format: docs/store.md."""

from hubkit.store.refs import Ref
from hubkit.store.store import Store

__all__ = ["Ref", "Store"]
