"""Named records: one table for each kind, in which a name stands for a record."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

R = TypeVar("R")


class Registry(Mapping[str, R], Generic[R]):
    """Records of one kind by name, in the order they were added. Reads as a dictionary; `register` adds to it.

    Attributes:
        kind: what an error calls a record, as in "format".
        record_type: the records' class.
        where: where a user finds the table, as in "ifjax.FORMATS".
    """

    def __init__(self, kind: str, record_type: type[R], where: str, records: Iterable[R] = ()):
        self.kind, self.record_type, self.where = kind, record_type, where
        self._records: dict[str, R] = {}
        for record in records:
            self.register(record)

    def register(self, record: R, name: str | None = None) -> R:
        """Add a record under its own name, or another one, and return it. Adding an equal record again is harmless.

        Raises:
            TypeError: a record of another class.
            ValueError: the name stands for another record already.
        """
        if not isinstance(record, self.record_type):
            raise TypeError(f"needs a {self.record_type.__name__}, got {type(record).__name__}")
        named: Any = record
        name = named.name if name is None else name
        if self._records.setdefault(str(name), record) != record:
            raise ValueError(f"{name!r} is another {self.kind} in {self.where}: choose another name")
        return record

    def find(self, record: "str | R") -> R:
        """Return the record itself, or the one with this name.

        Raises:
            ValueError: unknown name; the message lists the nearest ones.
            TypeError: neither a name nor a record.
        """
        if isinstance(record, self.record_type):
            return record
        if not isinstance(record, str):
            module = self.where.rpartition(".")[0]
            raise TypeError(
                f"{self.kind} must be a name or an {module}.{self.record_type.__name__}, got {type(record).__name__}"
            )
        if record not in self:
            raise ValueError(f"unknown {self.kind} {record!r}; {did_you_mean(record, self)} See {self.where}")
        return self[record]

    def name_of(self, record: R) -> "str | R":
        """Return the name of a record that the table holds under its own name, else the record."""
        name = getattr(record, "name", None)
        return name if isinstance(name, str) and self.get(name) == record else record

    def __getitem__(self, name: str) -> R:
        return self._records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a question that lists the names nearest to one that is unknown, or all of them."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or sorted(names)
    return f"did you mean {', '.join(near)}?"
