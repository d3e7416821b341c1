"""Classification of tensors by their names, for files without a model."""

import re

from ifjax.models.sites import Site

_NORMS = {"norm", "layernorm", "rmsnorm", "batchnorm", "groupnorm", "instancenorm", "ln", "bn", "gn"}
_FACTORS = {"scale", "gamma", "beta"}  # parameters of norms or of whole layers with one value per channel
_OF_CHANNELS = "factors of channels"


def keep_reason(name: str, shape: tuple[int, ...]) -> str | None:
    """Return why a tensor of this name and shape must not be quantized, whatever the rules say; None if it may be.

    Only matrices may be; axes of length 1 do not count. Embeddings count as matrices, because they are stored and often
    multiplied as such.
    """
    reason, is_matrix = named_reason(name), sum(length > 1 for length in shape) > 1 and 0 not in shape
    return reason if is_matrix or reason not in (None, _OF_CHANNELS) else "not a matrix"


def named_reason(name: str) -> str | None:
    """Return the reason if a name is that of a bias, norm or channel factor, even a stacked one; else None.

    The last whole word of a name decides: "debias_proj" is not a bias, and "norm_proj" is not a norm.
    """
    *parents, last = re.split(r"[./]", name)
    owner = parents[-1] if parents and last in ("weight", "scale", "kernel") else last
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", owner).lower()  # LayerNorm_0: layer, norm
    words = re.findall("[a-z]+", spaced)
    if words and (words[-1] == "bias" or words[-1] in _NORMS):
        return "a bias" if words[-1] == "bias" else "a norm"
    return _OF_CHANNELS if last.rpartition("_")[2] in _FACTORS else None


def site_of_tensor(name: str, shape: tuple[int, ...], axis: int, reason: str | None = None) -> Site:
    """Return the site of a tensor in a file. Blocks lie along `axis` unless a rule names another.

    The site's path is the name with '.' replaced by '/', without "weight" or "kernel" at its end, as in
    "encoder/layer/0/attention/self/query".

    Args:
        reason: why the tensor cannot be quantized, for reasons other than its name and shape.
    """
    path = name.replace(".", "/").removesuffix("/weight").removesuffix("/kernel")
    return Site(name, path, None, shape, assumed=axis, reason=keep_reason(name, shape) or reason)
