"""Tools whose layouts are recognized and left alone: their names, so that nobody takes their scales for weights."""

from ifjax.exchange.layouts import LAYOUTS, Layout, Part

_INTEGERS = ("I8", "U8", "I16", "I32", "U32", "I64")
# Which arrays go together; those in brackets may be missing.
_FAMILIES = {
    "gptq": "{}.qweight {}.scales ({}.qzeros) ({}.g_idx)",
    "mlx affine": "{}.weight {}.scales {}.biases",
    "mlx mxfp8": "{}.weight {}.scales",
    "compressed-tensors pack-quantized":
        "{}.weight_packed {}.weight_scale {}.weight_shape ({}.weight_zero_point) ({}.weight_g_idx)",
    "int8 with scales": "{}.weight {}.weight_scale ({}.weight_zero_point)",
    "quanto": "{}.weight._data {}.weight._scale ({}.weight._shift) ({}.input_scale) ({}.output_scale)",
    "bitsandbytes 4 bits": "{}.weight {}.weight.absmax {}.weight.quant_map ({}.weight.nested_absmax) "
        "({}.weight.nested_quant_map) ({}.weight.quant_state.bitsandbytes__nf4) "
        "({}.weight.quant_state.bitsandbytes__fp4)",
    "bitsandbytes 8 bits": "{}.weight {}.SCB ({}.weight_format)",
    "eetq": "{}.weight {}.weight_scales",
    "hqq": "{}.W_q {}.scale {}.zero ({}.meta)",
    "aqlm": "{}.codes {}.codebooks {}.scales",
    "torchao": "{}_qdata {}_scale ({}_zero_point)",
}  # fmt: skip

for _name, _arrays in _FAMILIES.items():
    _first, *_others = _arrays.split()
    _parts = [Part(_first, _INTEGERS)]
    _parts += [Part(p.strip("()"), optional=p.startswith("(")) for p in _others]
    LAYOUTS.register(Layout(_name, _name.split()[0], _name, tuple(_parts)))
