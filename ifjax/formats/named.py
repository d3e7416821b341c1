"""Registry of the named formats, with their sources. To add a format, register a record; no other code changes.

Conventions follow the code of the IF paper (arXiv 2603.28765), unless a format's source states otherwise.
"""

import dataclasses
import re

from ifjax.formats.grids import (
    E2M0,
    E2M1,
    E2M3,
    E3M2,
    INT3,
    INT4,
    INT4_SIGNED,
    INT6,
    NF4,
    OCTET,
    QUAD_A,
    QUAD_B,
    S1P2,
    SPLIT87,
)
from ifjax.formats.hifloat4 import HiFloat4Scale
from ifjax.formats.records import Candidate, Format
from ifjax.formats.scales import E3M3, E8M0, SCALES, UE2M3, UE5M3
from ifjax.lookup import Registry


class FormatTable(Registry[Format]):
    """Formats by name. NAME_bsBLOCK is format NAME with blocks of length BLOCK; iteration does not list such names."""

    def __getitem__(self, name: str) -> Format:
        base, _, block = name.rpartition("_bs")
        if name not in self._records and base in self._records and block.isdecimal() and int(block) > 0:
            return with_block(self._records[base], int(block))
        return super().__getitem__(name)


def with_block(fmt: Format, block: int) -> Format:
    """Return the format with blocks of length `block`, and a name that states it."""
    if block == fmt.block:
        return fmt
    name = re.sub(r"_bs\d+$", "", fmt.name)
    doc = f"{fmt.doc} With blocks of {block}." if fmt.doc else ""
    plain = FORMATS.get(name)
    if plain is not None and plain == dataclasses.replace(fmt, name=name, block=block):
        return plain
    return dataclasses.replace(fmt, name=f"{name}_bs{block}", block=block, doc=doc)


FORMATS = FormatTable("format", Format, "ifjax.FORMATS")


def get_format(fmt: str | Format) -> Format:
    """Return the format with this name; a Format is returned unchanged. "if4_bs8" is if4 with blocks of 8.

    Raises:
        ValueError: the name is unknown; the message lists similar names.
        TypeError: the argument is neither a name nor a Format.
    """
    return FORMATS.find(fmt)


def _named(name: str, candidates: tuple[Candidate, ...], block: int, doc: str, **fields) -> Format:
    return FORMATS.register(Format(name, candidates, block, doc=doc, **fields))


_FP4, _FP3, _E2M3, _E3M2 = (Candidate(grid) for grid in (E2M1, E2M0, E2M3, E3M2))
_MX = {"scale": E8M0, "tensor_peak": None}

# The steps of the integer grids make both grids end at the same value, so that they share one scale. 0.2419355 is two
# float32 steps above 7.5/31: the published code has it with seven digits, and our bits follow that code.
_IF = "whichever err less in a block; bit 7 of its E4M3 scale marks integers. Source: arXiv 2603.28765."
IF4 = _named("if4", (_FP4, Candidate(INT4, step=6 / 7)), 16, f"FP4 (E2M1) or INT4 times 6/7, {_IF}")
IF3 = _named("if3", (_FP3, Candidate(INT3, step=4 / 3)), 16, f"FP3 (E2M0) or INT3 times 4/3, {_IF}")
IF6_E2M3 = _named("if6_e2m3", (_E2M3, Candidate(INT6, step=0.2419355)), 16, f"FP6 (E2M3) or INT6 times 7.5/31, {_IF}")
IF6_E3M2 = _named("if6_e3m2", (_E3M2, Candidate(INT6, step=28 / 31)), 16, f"FP6 (E3M2) or INT6 times 28/31, {_IF}")
FORMATS.register(IF6_E2M3, "if6")

_NV = "with an E4M3 scale for each 16 values and a float32 factor for the tensor"
NVFP4 = _named("nvfp4", (_FP4,), 16, f"FP4 (E2M1) {_NV}. Source: arXiv 2509.25149.")
NVFP3 = _named("nvfp3", (_FP3,), 16, f"FP3 (E2M0) {_NV}. Source: arXiv 2603.28765.")
NVFP6_E2M3 = _named("nvfp6_e2m3", (_E2M3,), 16, f"FP6 (E2M3) {_NV}. Source: arXiv 2603.28765.")
NVFP6_E3M2 = _named("nvfp6_e3m2", (_E3M2,), 16, f"FP6 (E3M2) {_NV}. Source: arXiv 2603.28765.")
NVINT3 = _named("nvint3", (Candidate(INT3),), 16, f"INT3 {_NV}. Source: arXiv 2603.28765.")
NVINT4 = _named("nvint4", (Candidate(INT4),), 16, f"INT4 {_NV}. Source: arXiv 2603.28765.")
NVINT6 = _named("nvint6", (Candidate(INT6),), 16, f"INT6 {_NV}. Source: arXiv 2603.28765.")
NVFP4_STATIC4 = _named(
    "nvfp4_static4", (_FP4,), 16, "NVFP4 with the block's maximum at 4, not 6. Source: arXiv 2512.02010.", peak=4.0
)
# With tensor_peak 256, a block scale times 1.5 is at most 384, which is an E4M3 number; 448 would leave no room.
FOUROVERSIX = _named(
    "fouroversix", (_FP4, Candidate(E2M1, scale_multiplier=1.5)), 16,
    "Four Over Six: NVFP4 with the block's maximum at 6 or at 4, whichever errs less. Any NVFP4 reader decodes it. "
    "Source: arXiv 2512.02010.", tensor_peak=256.0,
)  # fmt: skip

_POWER = "with a power of two (E8M0, rounded up) for each 32 values. Source: OCP Microscaling v1.0; arXiv 2603.28765."
MXFP3 = _named("mxfp3", (_FP3,), 32, f"FP3 (E2M0) {_POWER}", **_MX)
MXFP4 = _named("mxfp4", (_FP4,), 32, f"FP4 (E2M1) {_POWER}", **_MX)
MXFP6_E2M3 = _named("mxfp6_e2m3", (_E2M3,), 32, f"FP6 (E2M3) {_POWER}", **_MX)
MXFP6_E3M2 = _named("mxfp6_e3m2", (_E3M2,), 32, f"FP6 (E3M2) {_POWER}", **_MX)
MXFP4_STATIC4 = _named("mxfp4_static4", (_FP4,), 32, f"MXFP4 with the block's maximum at 4, {_POWER}", peak=4.0, **_MX)

# --- since IF4 -------------------------------------------------------------------------------------------------------

_HIF4 = {"scale": SCALES.register(HiFloat4Scale()), "peak": 1.0, "tensor_peak": None, "saturates": True}
_OF_64 = (
    "quarters up to 7/4, an E6M2 scale for 64 values and bits that double it for 8 and for 4 of them. Infinity "
    "saturates. Source: arXiv 2602.11287 and its code."
)
HIFLOAT4 = _named("hifloat4", (Candidate(S1P2),), 64, f"HiFloat4: {_OF_64}", **_HIF4)
HIFLOAT4_HALF_EVEN = _named(
    "hifloat4_half_even", (Candidate(dataclasses.replace(S1P2, ties="even")),), 64,
    f"HiFloat4, elements rounded half to even as its text allows: {_OF_64}", **_HIF4,
)  # fmt: skip

_UNSIGNED = "UE5M3 block scales (unsigned FP8 of hardware to come; PTX ISA 9.4)"
NVFP4_UE5M3 = _named(
    "nvfp4_ue5m3", (_FP4,), 16, f"FP4 (E2M1) with {_UNSIGNED} and a float32 factor for the tensor. Source: "
    "arXiv 2609.02846.", scale=UE5M3, tensor_peak=114688.0,
)  # fmt: skip
_DIRECT = "and no factor for the tensor. Source: arXiv 2605.08565."
FP4_UE5M3 = _named("fp4_ue5m3", (_FP4,), 16, f"FP4 (E2M1) with {_UNSIGNED} {_DIRECT}", scale=UE5M3, tensor_peak=None)
FP4_E4M3 = _named("fp4_e4m3", (_FP4,), 16, f"FP4 (E2M1) with E4M3 block scales {_DIRECT}", tensor_peak=None)
for _fmt in (FP4_UE5M3, FP4_E4M3):
    FORMATS.register(
        dataclasses.replace(
            _fmt,
            name=f"{_fmt.name}_pz",
            prevent_zero=True,
            doc=f"{_fmt.doc} The least positive scale takes the place of 0, so that small blocks are not lost.",
        )
    )
FP4_E4M3_46 = _named(
    "fp4_e4m3_46", FOUROVERSIX.candidates, 16, f"Four Over Six with E4M3 block scales {_DIRECT}", tensor_peak=None,
    prevent_zero=True,
)  # fmt: skip

NF4_E4M3 = _named("nf4", (Candidate(NF4),), 16, f"NF4's sixteen values {_NV}. Source: arXiv 2305.14314.", peak=1.0)
NF4_MIRROR = _named(
    "nf4_mirror", (Candidate(NF4), Candidate(NF4.mirrored())), 16,
    f"NF4's sixteen values or their mirror image, whichever err less in a block, {_NV}. Grid: arXiv 2305.14314.",
    peak=1.0,
)  # fmt: skip
_GAMES = "Idea: Grid Games, arXiv 2605.12327; its values are not published, and these are learned on normal numbers."
SPLIT87_PAIR = _named(
    "split87", (Candidate(SPLIT87), Candidate(SPLIT87.mirrored())), 16,
    f"Eight negative and seven positive learned values, or their mirror image, {_NV}. {_GAMES}", peak=1.0,
)  # fmt: skip
QUAD = _named(
    "quad", tuple(Candidate(grid) for a in (QUAD_A, QUAD_B) for grid in (a, a.mirrored())), 16,
    "Two grids of sixteen learned values and their mirror images, a 6-bit E3M3 scale and two bits for the choice. "
    f"Blocks below amax / 1792 are lost. {_GAMES}",
    scale=E3M3, peak=1.0, tensor_peak=28.0,
)  # fmt: skip
OCTET_8 = _named(
    "octet", tuple(Candidate(grid) for a in OCTET for grid in (a, a.mirrored())), 16,
    "Four grids of sixteen learned values and their mirror images, a 5-bit UE2M3 scale and three bits for the choice; "
    "the scales of a tensor span 1 to 56, so give rows an amax of their own where their sizes differ. Learned by "
    "`ifjax.learn_format` on normal numbers; form: Grid Games, arXiv 2605.12327.",
    scale=UE2M3, peak=1.0, tensor_peak=7.0, prevent_zero=True,
)  # fmt: skip
SFP4 = _named(
    "sfp4", tuple(Candidate(E2M1, offset=offset) for offset in (0.0, 0.375, -0.375)), 16,
    "FP4 (E2M1), as it is or moved by 0.375 up or down, a 6-bit E3M3 scale and two bits for the choice. Idea: Grid "
    "Games, arXiv 2605.12327; the constant is ours.", scale=E3M3, tensor_peak=28.0,
)  # fmt: skip

# Code 8, which is -0 in E2M1, gets a special value.
_SPECIAL = {value: E2M1.replaced(8, value) for value in (5.0, -5.0, 8.0, -8.0)}
_RAZER = "Redundant zero remapping: the code of -0 stands for a special value that each block chooses"
RAZER = _named(
    "razer", tuple(Candidate(grid, peak=8.0 if abs(v) == 8 else None) for v, grid in _SPECIAL.items()), 16,
    f"{_RAZER}, 5, -5, 8 or -8; a 6-bit E3M3 scale. For weights. Source: arXiv 2501.04052.",
    scale=E3M3, peak=6.0, tensor_peak=28.0, prevent_zero=True,
)  # fmt: skip
RAZER_ACT = _named(
    "razer_act", (Candidate(_SPECIAL[5.0]), Candidate(_SPECIAL[-5.0])), 16,
    f"{_RAZER}, 5 or -5; an E4M3 scale. For activations. Source: arXiv 2501.04052.", peak=6.0, prevent_zero=True,
)  # fmt: skip
MIXFP4 = _named(
    "mixfp4", (_FP4, Candidate(INT4_SIGNED, peak=7.0)), 16,
    "FP4 (E2M1) or integers to 7, each under a scale of its own; a tie takes integers. Source: arXiv 2605.31035 and "
    "the packing code of compressed-tensors.", ties="last",
)  # fmt: skip
