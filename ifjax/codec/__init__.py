"""The encoder and the decoder."""

from ifjax.codec.blocks import (
    _as_float as _as_float,
)
from ifjax.codec.blocks import (
    _bits as _bits,
)
from ifjax.codec.blocks import (
    _gather_squares as _gather_squares,
)
from ifjax.codec.blocks import (
    _insert_axis as _insert_axis,
)
from ifjax.codec.blocks import (
    _largest_divisor as _largest_divisor,
)
from ifjax.codec.blocks import (
    _magnitude as _magnitude,
)
from ifjax.codec.blocks import (
    _pick as _pick,
)
from ifjax.codec.blocks import (
    _places as _places,
)
from ifjax.codec.blocks import (
    _repeat as _repeat,
)
from ifjax.codec.blocks import (
    _tree as _tree,
)
from ifjax.codec.blocks import (
    _unstack as _unstack,
)
from ifjax.codec.blocks import (
    merge_blocks as merge_blocks,
)
from ifjax.codec.blocks import (
    pad_axis as pad_axis,
)
from ifjax.codec.blocks import (
    split_blocks as split_blocks,
)
from ifjax.codec.decode import (
    TensorScale as TensorScale,
)
from ifjax.codec.decode import (
    _scale_value as _scale_value,
)
from ifjax.codec.decode import (
    _value as _value,
)
from ifjax.codec.decode import (
    block_scale as block_scale,
)
from ifjax.codec.decode import (
    decode as decode,
)
from ifjax.codec.decode import (
    tensor_scale as tensor_scale,
)
from ifjax.codec.decode import (
    unscaled as unscaled,
)
from ifjax.codec.encode import (
    _better as _better,
)
from ifjax.codec.encode import (
    _bytes_for_peak as _bytes_for_peak,
)
from ifjax.codec.encode import (
    _choose as _choose,
)
from ifjax.codec.encode import (
    _codes as _codes,
)
from ifjax.codec.encode import (
    _decoding as _decoding,
)
from ifjax.codec.encode import (
    _encode_in_one_pass as _encode_in_one_pass,
)
from ifjax.codec.encode import (
    _encode_in_stages as _encode_in_stages,
)
from ifjax.codec.encode import (
    _keep_negative as _keep_negative,
)
from ifjax.codec.encode import (
    _one_for_each_decoding as _one_for_each_decoding,
)
from ifjax.codec.encode import (
    _peaks as _peaks,
)
from ifjax.codec.encode import (
    encode as encode,
)
from ifjax.codec.losses import (
    LOSSES as LOSSES,
)
from ifjax.codec.losses import (
    Loss as Loss,
)
from ifjax.codec.losses import (
    _block_loss as _block_loss,
)
from ifjax.codec.losses import (
    _decoded as _decoded,
)
from ifjax.codec.losses import (
    _inverse as _inverse,
)
from ifjax.codec.losses import (
    _squared as _squared,
)
from ifjax.codec.losses import (
    _to_grid as _to_grid,
)
from ifjax.codec.search import (
    _trials as _trials,
)
