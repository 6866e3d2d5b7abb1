"""hubkit: a hub, a composer, a trainer and a server for LoRA adapters."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hubkit.hub import Hub

__all__ = ["Hub"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # `import hubkit` must stay instant: the command line imports it before it knows the verb
    if name == "Hub":
        from hubkit.hub import Hub

        return Hub
    raise AttributeError(f"module 'hubkit' has no attribute {name!r}")
