"""Every named format."""

import dataclasses
import difflib

from ifjax.formats.grids import E2M0, E2M1, E2M3, E3M2, INT3, INT4, INT6
from ifjax.formats.records import Candidate, Format
from ifjax.formats.scales import E4M3_256, E8M0


def get_format(fmt: "str | Format") -> Format:
    """The record itself, or the named one.

    Raises:
        ValueError: unknown name; the message lists the nearest ones.
        TypeError: neither a name nor a Format.
    """
    if isinstance(fmt, Format):
        return fmt
    if not isinstance(fmt, str):
        raise TypeError(f"fmt must be a format's name or an ifjax.Format, got {type(fmt).__name__}")
    if fmt not in FORMATS:
        near = difflib.get_close_matches(fmt, FORMATS, n=3, cutoff=0.4) or sorted(FORMATS)
        raise ValueError(f"unknown format {fmt!r}; did you mean {', '.join(near)}? See ifjax.FORMATS")
    return FORMATS[fmt]


# Integer steps make both grids end at the same value, so that they share one scale. 0.2419355 is two float32 steps
# above 7.5/31: the published code types it with seven digits, and the bits follow the code.
_IF3 = (Candidate(E2M0), Candidate(INT3, step=4 / 3))


_IF4 = (Candidate(E2M1), Candidate(INT4, step=6 / 7))


_IF6_E2M3 = (Candidate(E2M3), Candidate(INT6, step=0.2419355))


_IF6_E3M2 = (Candidate(E3M2), Candidate(INT6, step=28 / 31))


_4OVER6 = (Candidate(E2M1), Candidate(E2M1, stretch=1.5))


def _named():
    # IF formats, arXiv 2603.28765; Four Over Six, arXiv 2512.02010; NVFP4, arXiv 2509.25149; MX, OCP MX v1.0 with the
    # scale rounded up as in the IF paper's code, whose conventions all of these records follow.
    yield Format("if4", _IF4, 16)
    yield Format("if3", _IF3, 16)
    yield Format("if6_e2m3", _IF6_E2M3, 16)
    yield Format("if6_e3m2", _IF6_E3M2, 16)
    yield Format("nvfp4", (Candidate(E2M1),), 16)
    yield Format("fouroversix", _4OVER6, 16, E4M3_256)
    yield Format("nvfp3", (Candidate(E2M0),), 16)
    yield Format("nvfp6_e2m3", (Candidate(E2M3),), 16)
    yield Format("nvfp6_e3m2", (Candidate(E3M2),), 16)
    yield Format("nvint3", (Candidate(INT3),), 16)
    yield Format("nvint4", (Candidate(INT4),), 16)
    yield Format("nvint6", (Candidate(INT6),), 16)
    yield Format("mxfp3", (Candidate(E2M0),), 32, E8M0)
    yield Format("mxfp4", (Candidate(E2M1),), 32, E8M0)
    yield Format("mxfp6_e2m3", (Candidate(E2M3),), 32, E8M0)
    yield Format("mxfp6_e3m2", (Candidate(E3M2),), 32, E8M0)
    yield Format("nvfp4_static4", (Candidate(E2M1),), 16, peak=4.0)
    yield Format("mxfp4_static4", (Candidate(E2M1),), 32, E8M0, peak=4.0)


FORMATS: dict[str, Format] = {fmt.name: fmt for fmt in _named()}


for _name in ("if4", "if3", "nvfp4", "fouroversix", "nvfp3", "nvint3", "nvint4", "mxfp3", "mxfp4"):
    FORMATS[f"{_name}_bs8"] = dataclasses.replace(FORMATS[_name], name=f"{_name}_bs8", block=8)


FORMATS["if6"] = FORMATS["if6_e2m3"]
