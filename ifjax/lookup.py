"""Registries of named records, one for each kind of record."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

R = TypeVar("R")


class Registry(Mapping[str, R], Generic[R]):
    """A read-only mapping from names to records of one kind, in the order in which `register` added them.

    Attributes:
        kind: the noun for a record in error messages, such as "format".
        record_type: the class of the records.
        where: the public name of the registry, such as "ifjax.FORMATS".
    """

    def __init__(self, kind: str, record_type: type[R], where: str, records: Iterable[R] = ()):
        self.kind, self.record_type, self.where = kind, record_type, where
        self._records: dict[str, R] = {}
        for record in records:
            self.register(record)

    def register(self, record: R, name: str | None = None) -> R:
        """Add a record under `name`, by default its own name, and return it; adding an equal record again is harmless.

        Raises:
            TypeError: the record has another class.
            ValueError: another record has the name already.
        """
        if not isinstance(record, self.record_type):
            raise TypeError(f"needs a {self.record_type.__name__}, got {type(record).__name__}")
        named: Any = record
        name = named.name if name is None else name
        known = self.get(str(name))  # also one under a name that is derived from another
        if known is None:
            self._records[str(name)] = record
        elif known != record:
            raise ValueError(f"{name!r} is another {self.kind} in {self.where}: choose another name")
        return record

    def find(self, record: "str | R") -> R:
        """Return the record of that name, or the given record itself.

        Raises:
            ValueError: the name is unknown; the message lists the nearest names.
            TypeError: the argument is neither a name nor a record.
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
        """Return the record's name if the registry holds the record under that name, else the record."""
        name = getattr(record, "name", None)
        return name if isinstance(name, str) and self.get(name) == record else record

    def __getitem__(self, name: str) -> R:
        return self._records[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return a question that lists the names nearest to an unknown name, or all names if none is near."""
    names = list(names)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or sorted(names)
    return f"did you mean {', '.join(near)}?"
