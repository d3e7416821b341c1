"""What a tensor's name says of it, where there is no model to ask."""

import re


def keep_reason(name: str, shape: tuple[int, ...]) -> str | None:
    """Why a tensor of this name and shape should keep its precision; None for the weight of a matrix product.

    Axes of length 1 do not count. Embeddings are matrices: they are stored, and often multiplied by, as such.
    """
    *parents, last = re.split(r"[./]", name.lower())
    owner = parents[-1] if parents and last in ("weight", "scale", "kernel") else last
    vector = sum(length > 1 for length in shape) < 2
    return next((f"a {word}" for word in ("bias", "norm") if word in owner), "not a matrix" if vector else None)
