"""The base class of reports that can be converted to Arrow and pandas tables."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    import pandas as pd


class Tabular(ABC):
    """A report with rows, which a subclass gives in `_rows`."""

    @abstractmethod
    def _rows(self) -> list[dict[str, Any]]:
        """The rows in order, all with the same names."""

    def to_arrow(self) -> pa.Table:
        """The rows as an Arrow table. The table has no columns if there are no rows."""
        return pa.Table.from_pylist(self._rows())

    def to_pandas(self) -> "pd.DataFrame":
        """The rows as a pandas DataFrame."""
        return self.to_arrow().to_pandas()
