"""Formats as records."""

from ifjax.formats.records import (
    _4OVER6 as _4OVER6,
)
from ifjax.formats.records import (
    _IF3 as _IF3,
)
from ifjax.formats.records import (
    _IF4 as _IF4,
)
from ifjax.formats.records import (
    _IF6_E2M3 as _IF6_E2M3,
)
from ifjax.formats.records import (
    _IF6_E3M2 as _IF6_E3M2,
)
from ifjax.formats.records import (
    FORMATS as FORMATS,
)
from ifjax.formats.records import (
    Candidate as Candidate,
)
from ifjax.formats.records import (
    Format as Format,
)
from ifjax.formats.records import (
    _named as _named,
)
from ifjax.formats.records import (
    get_format as get_format,
)
