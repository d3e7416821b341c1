"""Every named format, with its source. To add one, register a record; nothing else asks which format it is.

Conventions are those of the code of the IF paper (arXiv 2603.28765) unless a source says otherwise.
"""

import dataclasses

from ifjax.formats.grids import E2M0, E2M1, E2M3, E3M2, INT3, INT4, INT6
from ifjax.formats.records import Candidate, Format
from ifjax.formats.scales import E8M0
from ifjax.lookup import Registry

FORMATS: Registry[Format] = Registry("format", Format, "ifjax.FORMATS")


def get_format(fmt: str | Format) -> Format:
    """Return the record itself, or the one that is registered under this name.

    Raises:
        ValueError: unknown name; the message lists the nearest ones.
        TypeError: neither a name nor a Format.
    """
    return FORMATS.find(fmt)


def _named(name: str, candidates: tuple[Candidate, ...], block: int, doc: str, *, also: int = 0, **fields) -> Format:
    """Register a format, and the same with other blocks (`also`) under the name NAME_bsBLOCK."""
    fmt = FORMATS.register(Format(name, candidates, block, doc=doc, **fields))
    if also:
        variant = f"{doc} With blocks of {also}."
        FORMATS.register(dataclasses.replace(fmt, name=f"{name}_bs{also}", block=also, doc=variant))
    return fmt


_FP4, _FP3, _E2M3, _E3M2 = (Candidate(grid) for grid in (E2M1, E2M0, E2M3, E3M2))
_MX = {"scale": E8M0, "tensor_peak": None}

# Integer steps make both grids end at the same value, so that they share one scale. 0.2419355 is two float32 steps
# above 7.5/31: the published code types it with seven digits, and the bits follow the code.
_IF = "whichever err less in a block; bit 7 of its E4M3 scale marks integers. Source: arXiv 2603.28765."
IF4 = _named("if4", (_FP4, Candidate(INT4, step=6 / 7)), 16, f"FP4 (E2M1) or INT4 times 6/7, {_IF}", also=8)
IF3 = _named("if3", (_FP3, Candidate(INT3, step=4 / 3)), 16, f"FP3 (E2M0) or INT3 times 4/3, {_IF}", also=8)
IF6_E2M3 = _named("if6_e2m3", (_E2M3, Candidate(INT6, step=0.2419355)), 16, f"FP6 (E2M3) or INT6 times 7.5/31, {_IF}")
IF6_E3M2 = _named("if6_e3m2", (_E3M2, Candidate(INT6, step=28 / 31)), 16, f"FP6 (E3M2) or INT6 times 28/31, {_IF}")
FORMATS.register(IF6_E2M3, "if6")

_NV = "with an E4M3 scale for each 16 values and a float32 factor for the tensor"
NVFP4 = _named("nvfp4", (_FP4,), 16, f"FP4 (E2M1) {_NV}. Source: arXiv 2509.25149.", also=8)
NVFP3 = _named("nvfp3", (_FP3,), 16, f"FP3 (E2M0) {_NV}. Source: arXiv 2603.28765.", also=8)
NVFP6_E2M3 = _named("nvfp6_e2m3", (_E2M3,), 16, f"FP6 (E2M3) {_NV}. Source: arXiv 2603.28765.")
NVFP6_E3M2 = _named("nvfp6_e3m2", (_E3M2,), 16, f"FP6 (E3M2) {_NV}. Source: arXiv 2603.28765.")
NVINT3 = _named("nvint3", (Candidate(INT3),), 16, f"INT3 {_NV}. Source: arXiv 2603.28765.", also=8)
NVINT4 = _named("nvint4", (Candidate(INT4),), 16, f"INT4 {_NV}. Source: arXiv 2603.28765.", also=8)
NVINT6 = _named("nvint6", (Candidate(INT6),), 16, f"INT6 {_NV}. Source: arXiv 2603.28765.")
NVFP4_STATIC4 = _named(
    "nvfp4_static4", (_FP4,), 16, "NVFP4 with the block's maximum at 4, not 6. Source: arXiv 2512.02010.", peak=4.0
)
# 1.5 * 256 = 384 is an E4M3 number; 448 would leave no room for a block's scale to grow by half.
FOUROVERSIX = _named(
    "fouroversix", (_FP4, Candidate(E2M1, scale_multiplier=1.5)), 16,
    "Four Over Six: NVFP4 with the block's maximum at 6 or at 4, whichever errs less. Any NVFP4 reader decodes it. "
    "Source: arXiv 2512.02010.", tensor_peak=256.0, also=8,
)  # fmt: skip

_POWER = "with a power of two (E8M0, rounded up) for each 32 values. Source: OCP Microscaling v1.0; arXiv 2603.28765."
MXFP3 = _named("mxfp3", (_FP3,), 32, f"FP3 (E2M0) {_POWER}", also=8, **_MX)
MXFP4 = _named("mxfp4", (_FP4,), 32, f"FP4 (E2M1) {_POWER}", also=8, **_MX)
MXFP6_E2M3 = _named("mxfp6_e2m3", (_E2M3,), 32, f"FP6 (E2M3) {_POWER}", **_MX)
MXFP6_E3M2 = _named("mxfp6_e3m2", (_E3M2,), 32, f"FP6 (E3M2) {_POWER}", **_MX)
MXFP4_STATIC4 = _named("mxfp4_static4", (_FP4,), 32, f"MXFP4 with the block's maximum at 4, {_POWER}", peak=4.0, **_MX)
