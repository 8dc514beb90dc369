"""How a manifest is read: what settings say, and what its columns are called."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

NO_VALUE = ("NA", "N/A", "<NA>", "NaN", "nan", "NULL", "null", "None")  # as R, pandas and databases write no value
USUAL = {"path_column": "path", "label_column": "label", "split_column": "split", "group_column": "group"}


@dataclass(frozen=True)
class Reading:
    """How a manifest is read; the settings of a search by the same names describe each."""

    path_column: str = "path"
    label_column: str = "label"
    split_column: str = "split"
    group_column: str = "group"
    columns: Sequence[str] | None = None
    label_columns: Sequence[str] | None = None
    finding: str | None = None
    multi_label: bool = False
    uncertain: str = "ignore"
    blank: str = "negative"
    label_pattern: str | None = None
    group_pattern: str | None = None
    subgroups: Sequence[str] = ()
    images: str | None = None
    join: str | None = None
    split_files: Mapping[str, str] = field(default_factory=dict)
    evaluated: bool = False  # for a test alone
    labels: set[str] = field(default_factory=set)  # is given the names of labels that manifests have
    marked: set[str] = field(default_factory=set)  # is given the columns of ones and zeros that are labels

    @property
    def not_labels(self) -> tuple[str, ...]:
        """Names of the columns that are no labels, though they may hold ones and zeros."""
        return self.path_column, self.split_column, self.group_column, *self.subgroups

    @property
    def wanted(self) -> tuple[str, str, str, str]:
        """Names of the columns of path, label, split and group."""
        return self.path_column, self.label_column, self.split_column, self.group_column
