"""4-bit weights as other tools store them."""

from ifjax.exchange.fouroversix import (
    _FOUROVERSIX_RULES as _FOUROVERSIX_RULES,
)
from ifjax.exchange.fouroversix import (
    _FOUROVERSIX_TYPES as _FOUROVERSIX_TYPES,
)
from ifjax.exchange.fouroversix import (
    _PART as _PART,
)
from ifjax.exchange.fouroversix import (
    _PARTS as _PARTS,
)
from ifjax.exchange.fouroversix import (
    _fouroversix_format as _fouroversix_format,
)
from ifjax.exchange.fouroversix import (
    _from_fouroversix as _from_fouroversix,
)
from ifjax.exchange.fouroversix import (
    _pack as _pack,
)
from ifjax.exchange.fouroversix import (
    _read_fouroversix as _read_fouroversix,
)
from ifjax.exchange.fouroversix import (
    _unswizzle as _unswizzle,
)
from ifjax.exchange.layouts import (
    _E4M3 as _E4M3,
)
from ifjax.exchange.layouts import (
    _E8M0 as _E8M0,
)
from ifjax.exchange.layouts import (
    _U8 as _U8,
)
from ifjax.exchange.layouts import (
    _WEIGHTS as _WEIGHTS,
)
from ifjax.exchange.layouts import (
    LAYOUTS as LAYOUTS,
)
from ifjax.exchange.layouts import (
    TOOLS as TOOLS,
)
from ifjax.exchange.layouts import (
    Layout as Layout,
)
from ifjax.exchange.layouts import (
    Nibbles as Nibbles,
)
from ifjax.exchange.layouts import (
    Source as Source,
)
from ifjax.exchange.layouts import (
    Tool as Tool,
)
from ifjax.exchange.layouts import (
    _is_plain_e2m1 as _is_plain_e2m1,
)
from ifjax.exchange.layouts import (
    _join as _join,
)
from ifjax.exchange.layouts import (
    _Matrix as _Matrix,
)
from ifjax.exchange.layouts import (
    _split as _split,
)
from ifjax.exchange.layouts import (
    _swapped as _swapped,
)
from ifjax.exchange.ml_dtypes import (
    _packed as _packed,
)
from ifjax.exchange.ml_dtypes import (
    from_ml_dtypes as from_ml_dtypes,
)
from ifjax.exchange.read import (
    _amax_of as _amax_of,
)
from ifjax.exchange.read import (
    _as_qtensor as _as_qtensor,
)
from ifjax.exchange.read import (
    _declared as _declared,
)
from ifjax.exchange.read import (
    _declared_config as _declared_config,
)
from ifjax.exchange.read import (
    _from_layouts as _from_layouts,
)
from ifjax.exchange.read import (
    _names_of as _names_of,
)
from ifjax.exchange.read import (
    _read_matrix as _read_matrix,
)
from ifjax.exchange.read import (
    _tool_by_names as _tool_by_names,
)
from ifjax.exchange.read import (
    import_tensors as import_tensors,
)
from ifjax.exchange.read import (
    load as load,
)
from ifjax.exchange.write import (
    _check_scales as _check_scales,
)
from ifjax.exchange.write import (
    _check_zero_blocks as _check_zero_blocks,
)
from ifjax.exchange.write import (
    _config as _config,
)
from ifjax.exchange.write import (
    _divided as _divided,
)
from ifjax.exchange.write import (
    _factor as _factor,
)
from ifjax.exchange.write import (
    _input_factors as _input_factors,
)
from ifjax.exchange.write import (
    _layout_for as _layout_for,
)
from ifjax.exchange.write import (
    _write as _write,
)
from ifjax.exchange.write import (
    export_tensor as export_tensor,
)
from ifjax.exchange.write import (
    export_tensors as export_tensors,
)
from ifjax.exchange.write import (
    save as save,
)
