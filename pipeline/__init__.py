"""Visual Memory: images -> embeddings -> store -> index -> decisions, edited and served.

`VisualMemory` is loaded when first asked for, so that parts of the package import without the rest.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.visual_memory import VisualMemory as VisualMemory

__all__ = ["VisualMemory"]


def __getattr__(name: str) -> Any:
    if name == "VisualMemory":
        from pipeline.visual_memory import VisualMemory

        return VisualMemory
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
