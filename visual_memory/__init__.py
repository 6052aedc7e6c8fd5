"""The public names of Visual Memory, under a name that no file of one's own is likely to have.

import visual_memory

memory = visual_memory.VisualMemory("memory")
[decision] = memory.classify(["photo.jpg"], k=20)
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline import *  # noqa: F403

    __version__: str


def _own_pipeline() -> ModuleType:
    """The package that lies beside this one, whatever else is called `pipeline` in the working folder."""
    here = Path(__file__).resolve().parent.parent / "pipeline" / "__init__.py"
    known = sys.modules.get("pipeline")
    if known is not None:
        if Path(known.__file__ or "").resolve() != here:
            raise ImportError(f"another module named pipeline is loaded ({known.__file__}): rename it")
        return known
    spec = importlib.util.spec_from_file_location("pipeline", here, submodule_search_locations=[str(here.parent)])
    assert spec is not None and spec.loader is not None  # noqa: S101, PT018  # the file is there
    own = sys.modules["pipeline"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(own)
    return own


_pipeline = _own_pipeline()
__all__: list[str] = _pipeline.__all__  # a list of strings


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(_pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
