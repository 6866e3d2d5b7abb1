"""Finding entries among very many: a catalogue of the store and the index, kept in `cache/catalogue.sqlite`.

It is a cache and never the truth: it is made anew from refs and manifests when it is missing, damaged or of another
version, brought up to date when refs have changed, and what it finds is read again from the store before it is shown.
"""

from hubkit.catalogue.finder import Finder, Page, page_of
from hubkit.catalogue.search import Found, Hit

__all__ = ["Finder", "Found", "Hit", "Page", "page_of"]
