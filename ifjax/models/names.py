"""What a tensor's name says of it, where there is no model to ask."""

import re

from ifjax.models.sites import Site

_NORMS = {"norm", "layernorm", "rmsnorm", "batchnorm", "groupnorm", "instancenorm", "ln", "bn", "gn"}
_FACTORS = {"scale", "gamma", "beta"}  # of norms, and of whole layers: one for each channel
_OF_CHANNELS = "factors of channels"


def keep_reason(name: str, shape: tuple[int, ...]) -> str | None:
    """Why a tensor of this name and shape is no matrix to multiply by, whatever rules say; None if it may be one.

    Axes of length 1 do not count. Embeddings are matrices: they are stored, and often multiplied by, as such.
    """
    reason, is_matrix = named_reason(name), sum(length > 1 for length in shape) > 1 and 0 not in shape
    return reason if is_matrix or reason not in (None, _OF_CHANNELS) else "not a matrix"


def named_reason(name: str) -> str | None:
    """Why a name is that of no matrix, though layers of it may be stacked to one; None if it may be one's.

    The last whole word of a name counts: "debias_proj" is no bias, and "norm_proj" no norm.
    """
    *parents, last = re.split(r"[./]", name)
    owner = parents[-1] if parents and last in ("weight", "scale", "kernel") else last
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", owner).lower()  # LayerNorm_0: layer, norm
    words = re.findall("[a-z]+", spaced)
    if words and (words[-1] == "bias" or words[-1] in _NORMS):
        return "a bias" if words[-1] == "bias" else "a norm"
    return _OF_CHANNELS if last.rpartition("_")[2] in _FACTORS else None


def site_of_tensor(name: str, shape: tuple[int, ...], axis: int, reason: str | None = None) -> Site:
    """The site that a tensor of a file stands for: by its name, with blocks along `axis` unless a rule names another.

    Its path is its name with '.' written as '/', and without "weight" or "kernel" at its end, as in
    "encoder/layer/0/attention/self/query".

    Args:
        reason: why it cannot be quantized, where something else than its name tells.
    """
    path = name.replace(".", "/").removesuffix("/weight").removesuffix("/kernel")
    return Site(name, path, None, shape, assumed=axis, reason=keep_reason(name, shape) or reason)
