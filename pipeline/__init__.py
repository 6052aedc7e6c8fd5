"""Visual Memory: images -> embeddings -> store -> index -> decisions, edited and served.

What is public is loaded when it is first asked for, so that parts of the package import without the rest.
`import visual_memory` gives the same names; it is the one to use where a file of one's own may be called `pipeline.py`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.decisions.decision import Decision as Decision
    from pipeline.decisions.decision import Neighbor as Neighbor
    from pipeline.decisions.question import Question as Question
    from pipeline.edits.add import AddOptions as AddOptions
    from pipeline.edits.add import AddPlan as AddPlan
    from pipeline.edits.add import AddReport as AddReport
    from pipeline.edits.compact import CompactReport as CompactReport
    from pipeline.edits.copy import CopyReport as CopyReport
    from pipeline.edits.erasure.receipt import Receipt as Receipt
    from pipeline.edits.expire import ExpireReport as ExpireReport
    from pipeline.edits.export import ExportReport as ExportReport
    from pipeline.edits.forget import ForgetReport as ForgetReport
    from pipeline.edits.relabel import RelabelReport as RelabelReport
    from pipeline.edits.rollback import RollbackReport as RollbackReport
    from pipeline.embeddings.encoder_choice import EncoderChoice as EncoderChoice
    from pipeline.errors import ClusterError as ClusterError
    from pipeline.errors import CommitConflict as CommitConflict
    from pipeline.errors import DamagedFile as DamagedFile
    from pipeline.errors import EncoderError as EncoderError
    from pipeline.errors import FormatError as FormatError
    from pipeline.errors import IdentityMismatch as IdentityMismatch
    from pipeline.errors import IndexBuildError as IndexBuildError
    from pipeline.errors import LibraryError as LibraryError
    from pipeline.errors import MemoryMissing as MemoryMissing
    from pipeline.errors import MissingExtra as MissingExtra
    from pipeline.errors import MissingFile as MissingFile
    from pipeline.errors import NotPermitted as NotPermitted
    from pipeline.errors import OutOfMemory as OutOfMemory
    from pipeline.errors import Overloaded as Overloaded
    from pipeline.errors import SourceError as SourceError
    from pipeline.errors import StorageError as StorageError
    from pipeline.errors import Unavailable as Unavailable
    from pipeline.errors import UnknownName as UnknownName
    from pipeline.errors import UsageError as UsageError
    from pipeline.errors import VisualMemoryError as VisualMemoryError
    from pipeline.errors import WorkerError as WorkerError
    from pipeline.index.build.capacity import CapacityPlan as CapacityPlan
    from pipeline.index.build.plan import IndexOptions as IndexOptions
    from pipeline.progress import Progress as Progress
    from pipeline.questions.bulk import BulkReport as BulkReport
    from pipeline.questions.evaluation import Evaluation as Evaluation
    from pipeline.questions.influence import InfluenceReport as InfluenceReport
    from pipeline.questions.suspects import Suspect as Suspect
    from pipeline.questions.suspects import SuspectsReport as SuspectsReport
    from pipeline.serving.client import Client as Client
    from pipeline.store.checks.verify import Verification as Verification
    from pipeline.store.log.history import VersionSummary as VersionSummary
    from pipeline.visual_memory import VisualMemory as VisualMemory

    __version__: str

_WHERE = {
    "pipeline.questions.evaluation": ["Evaluation"],
    "pipeline.questions.bulk": ["BulkReport"],
    "pipeline.questions.influence": ["InfluenceReport"],
    "pipeline.questions.suspects": ["Suspect", "SuspectsReport"],
    "pipeline.decisions.decision": ["Decision", "Neighbor"],
    "pipeline.decisions.question": ["Question"],
    "pipeline.edits.add": ["AddOptions", "AddPlan", "AddReport"],
    "pipeline.edits.compact": ["CompactReport"],
    "pipeline.edits.copy": ["CopyReport"],
    "pipeline.edits.expire": ["ExpireReport"],
    "pipeline.edits.export": ["ExportReport"],
    "pipeline.edits.forget": ["ForgetReport"],
    "pipeline.edits.erasure.receipt": ["Receipt"],
    "pipeline.edits.relabel": ["RelabelReport"],
    "pipeline.edits.rollback": ["RollbackReport"],
    "pipeline.embeddings.encoder_choice": ["EncoderChoice"],
    "pipeline.errors": [
        "ClusterError",
        "CommitConflict",
        "DamagedFile",
        "EncoderError",
        "FormatError",
        "IdentityMismatch",
        "IndexBuildError",
        "LibraryError",
        "MemoryMissing",
        "MissingExtra",
        "MissingFile",
        "NotPermitted",
        "OutOfMemory",
        "Overloaded",
        "SourceError",
        "StorageError",
        "Unavailable",
        "UnknownName",
        "UsageError",
        "VisualMemoryError",
        "WorkerError",
    ],
    "pipeline.index.build.capacity": ["CapacityPlan"],
    "pipeline.index.build.plan": ["IndexOptions"],
    "pipeline.progress": ["Progress"],
    "pipeline.serving.client": ["Client"],
    "pipeline.store.log.history": ["VersionSummary"],
    "pipeline.store.checks.verify": ["Verification"],
    "pipeline.visual_memory": ["VisualMemory"],
}
_MODULES = {name: module for module, names in _WHERE.items() for name in names}

if not TYPE_CHECKING:  # type checkers take the imports above, and would not understand this
    __all__ = [*_MODULES, "__version__"]  # noqa: PLE0604  # these are strings


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("visual-memory")
        except PackageNotFoundError:  # the packages alone, as a job carries them
            return "unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, "__version__"})
