"""Formats as records."""

from ifjax.formats.named import (
    _4OVER6 as _4OVER6,
)
from ifjax.formats.named import (
    _IF3 as _IF3,
)
from ifjax.formats.named import (
    _IF4 as _IF4,
)
from ifjax.formats.named import (
    _IF6_E2M3 as _IF6_E2M3,
)
from ifjax.formats.named import (
    _IF6_E3M2 as _IF6_E3M2,
)
from ifjax.formats.named import (
    FORMATS as FORMATS,
)
from ifjax.formats.named import (
    _named as _named,
)
from ifjax.formats.named import (
    get_format as get_format,
)
from ifjax.formats.records import (
    Candidate as Candidate,
)
from ifjax.formats.records import (
    Format as Format,
)
