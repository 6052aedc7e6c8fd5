"""Visual Memory: images -> embeddings -> store -> index -> decisions, edited and served.

`VisualMemory` and `Client` are loaded when first asked for, so that parts of the package import without the rest.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.serving.client import Client as Client
    from pipeline.visual_memory import VisualMemory as VisualMemory

    __version__: str

__all__ = ["Client", "VisualMemory", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "VisualMemory":
        from pipeline.visual_memory import VisualMemory

        return VisualMemory
    if name == "Client":
        from pipeline.serving.client import Client

        return Client
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("visual-memory")
        except PackageNotFoundError:  # the packages alone, as a job carries them
            return "unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
