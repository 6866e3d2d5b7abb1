"""Base models: what a name stands for, where its weights come from, and which adapters fit it."""

from hubkit.base.fingerprint import Fingerprint, check_fits
from hubkit.base.load import Base, BaseInfo, inspect_base, load_base
from hubkit.base.sources import DEFAULT_BASE

__all__ = ["DEFAULT_BASE", "Base", "BaseInfo", "Fingerprint", "check_fits", "inspect_base", "load_base"]
