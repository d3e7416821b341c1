"""Errors, published figures, plots, hardware models."""

from ifjax.measure.errors import (
    _PIECE as _PIECE,
)
from ifjax.measure.errors import (
    _READABLE as _READABLE,
)
from ifjax.measure.errors import (
    DEFAULT_FORMATS as DEFAULT_FORMATS,
)
from ifjax.measure.errors import (
    SAMPLE_SOURCE as SAMPLE_SOURCE,
)
from ifjax.measure.errors import (
    Entry as Entry,
)
from ifjax.measure.errors import (
    Error as Error,
)
from ifjax.measure.errors import (
    FileError as FileError,
)
from ifjax.measure.errors import (
    Report as Report,
)
from ifjax.measure.errors import (
    TensorReport as TensorReport,
)
from ifjax.measure.errors import (
    _energies as _energies,
)
from ifjax.measure.errors import (
    _measure as _measure,
)
from ifjax.measure.errors import (
    _natural as _natural,
)
from ifjax.measure.errors import (
    _piece_sums as _piece_sums,
)
from ifjax.measure.errors import (
    _pieces as _pieces,
)
from ifjax.measure.errors import (
    _scan as _scan,
)
from ifjax.measure.errors import (
    _total as _total,
)
from ifjax.measure.errors import (
    _unit as _unit,
)
from ifjax.measure.errors import (
    error as error,
)
from ifjax.measure.errors import (
    file_reports as file_reports,
)
from ifjax.measure.errors import (
    keep_reason as keep_reason,
)
from ifjax.measure.errors import (
    read_header as read_header,
)
from ifjax.measure.errors import (
    read_tensor as read_tensor,
)
from ifjax.measure.errors import (
    sample_path as sample_path,
)
from ifjax.measure.errors import (
    tensor_report as tensor_report,
)
from ifjax.measure.published import (
    DISTRIBUTIONS as DISTRIBUTIONS,
)
from ifjax.measure.published import (
    PUBLISHED as PUBLISHED,
)
from ifjax.measure.published import (
    Published as Published,
)
from ifjax.measure.published import (
    SyntheticError as SyntheticError,
)
from ifjax.measure.published import (
    _published as _published,
)
from ifjax.measure.published import (
    sample as sample,
)
from ifjax.measure.published import (
    synthetic_table as synthetic_table,
)
