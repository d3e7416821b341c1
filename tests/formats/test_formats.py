"""Every format is a record that states what the specification says, proves itself, and survives being written down."""

import dataclasses
import json

import numpy as np
import pytest

import ifjax
from ifjax.formats import FORMATS, Candidate, Format, get_format
from ifjax.formats.grids import E2M0, E2M1, E2M3, E3M2, INT3, INT4, INT6, Grid
from ifjax.formats.scales import E4M3, E4M3_256, E8M0, Scale

each_format = pytest.mark.parametrize("fmt", [pytest.param(fmt, id=name) for name, fmt in FORMATS.items()])

PLAIN = [
    "if4", "if3", "if6_e2m3", "if6_e3m2", "nvfp4", "fouroversix", "nvfp3", "nvfp6_e2m3", "nvfp6_e3m2",
    "nvint3", "nvint4", "nvint6", "mxfp3", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2",
]  # fmt: skip
BS8 = [f"{name}_bs8" for name in PLAIN if "6" not in name]


def bits(word):
    return np.uint32(word).view(np.float32)


# --- what the named formats are


def test_all_names_are_there():
    assert set(FORMATS) == {*PLAIN, *BS8, "nvfp4_static4", "mxfp4_static4", "if6"} and len(BS8) == 9


def test_a_format_is_listed_under_its_name_and_if6_is_an_alias():
    assert {name for name, fmt in FORMATS.items() if fmt.name != name} == {"if6"}
    assert FORMATS["if6"] is FORMATS["if6_e2m3"]


@pytest.mark.parametrize("name", BS8)
def test_bs8_formats_differ_in_the_block_alone(name):
    assert FORMATS[name] == dataclasses.replace(FORMATS[name.removesuffix("_bs8")], name=name, block=8)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_static4_differs_in_the_peak_alone(name):
    assert FORMATS[f"{name}_static4"] == dataclasses.replace(FORMATS[name], name=f"{name}_static4", peak=4.0)


@each_format
def test_mx_formats_have_blocks_of_32_and_no_tensor_scale(fmt):
    is_mx, is_bs8 = fmt.name.startswith("mx"), fmt.name.endswith("_bs8")
    assert fmt.block == (8 if is_bs8 else 32 if is_mx else 16)
    assert (fmt.scale is E8M0) == is_mx == (fmt.scale.largest is None)
    assert (fmt.scale is E4M3_256) == fmt.name.startswith("fouroversix")


@each_format
def test_the_flag_marks_if_formats_alone(fmt):
    assert fmt.has_flag == fmt.name.startswith("if") == (len(fmt.decodings) == 2)


@each_format
def test_bits_are_those_of_the_name(fmt):
    digit = next(int(c) for c in fmt.name.replace("fouroversix", "4") if c.isdigit())
    assert fmt.bits == digit and fmt.bits_per_value == digit + 8 / fmt.block
    assert all(c.grid.bits == fmt.bits for c in fmt.candidates)


@pytest.mark.parametrize(
    ("name", "q", "k"),
    [
        ("if4", 6, 2688), ("nvfp4", 6, 2688), ("nvfp4_static4", 4, 1792), ("fouroversix", 6, 1536), ("nvint4", 7, 3136),
        ("nvint3", 3, 1344), ("nvfp3", 4, 1792), ("if3", 4, 1792), ("nvfp6_e2m3", 7.5, 3360), ("if6_e2m3", 7.5, 3360),
        ("nvfp6_e3m2", 28, 12544), ("if6_e3m2", 28, 12544), ("nvint6", 31, 13888), ("mxfp4", 6, 1), ("mxfp3", 4, 1),
        ("mxfp4_static4", 4, 1), ("mxfp6_e2m3", 7.5, 1), ("mxfp6_e3m2", 28, 1),
    ],
)  # fmt: skip
def test_constants_are_those_of_the_specification(name, q, k):
    assert FORMATS[name].constants() == (q, k)
    assert all(isinstance(c, np.float32) for c in FORMATS[name].constants(16 / 17))


@pytest.mark.parametrize(("name", "k"), [("nvfp4", 0x451E1E1E), ("fouroversix", 0x44B4B4B5)])
def test_constants_with_headroom_are_rounded_once(name, k):
    assert FORMATS[name].constants(16 / 17) == (bits(0x40B4B4B5), bits(k))


@pytest.mark.parametrize(
    ("name", "step", "factor"),
    [
        ("if3", 0x3FAAAAAB, 0x3F400000), ("if4", 0x3F5B6DB7, 0x3F955555), ("if6_e2m3", 0x3E77BDF1, 0x40844444),
        ("if6_e3m2", 0x3F6739CE, 0x3F8DB6DB),
    ],
)  # fmt: skip
def test_expansion_constants_have_the_published_bits(name, step, factor):
    fmt = FORMATS[name]
    first, second = fmt.candidates
    assert np.float32(second.step) == bits(step) and fmt.input_factor(second) == bits(factor)
    assert fmt.input_factor(first) == 1


def test_a_step_that_does_not_align_the_maxima_is_inverted():
    fmt = Format("mine", (Candidate(E2M1), Candidate(INT4, step=0.5)), 16)
    assert fmt.input_factor(fmt.candidates[1]) == 2


def test_a_stretched_candidate_is_the_same_decoding():
    fmt = FORMATS["fouroversix"]
    assert len(fmt.candidates) == 2 and fmt.decodings == ((E2M1, 1.0),) and not fmt.has_flag


# --- records prove themselves


def candidates(*pairs):
    return tuple(Candidate(grid, step) for grid, step in pairs)


@pytest.mark.parametrize(
    "three",
    [
        candidates((E2M1, 1), (INT4, 6 / 7), (INT4, 0.5)),
        candidates((E2M1, 1), (E2M1, 0.9), (E2M1, 0.8)),
        (*candidates((E2M1, 1), (INT4, 6 / 7)), Candidate(dataclasses.replace(E2M1, ties="down"))),
    ],
)
def test_three_decodings_do_not_fit_a_sign_bit(three):
    with pytest.raises(ValueError, match="3 different decodings do not fit"):
        Format("mine", three, 16)


def test_more_candidates_than_two_fit_if_their_decodings_do():
    many = (*candidates((E2M1, 1), (INT4, 6 / 7)), Candidate(E2M1, stretch=1.5), Candidate(INT4, 6 / 7, stretch=1.25))
    fmt = Format("mine", many, 16)
    assert fmt.has_flag and len(fmt.decodings) == 2


def test_a_scale_without_a_free_bit_takes_one_decoding():
    with pytest.raises(ValueError, match="free bit, which e8m0 lacks"):
        Format("mine", candidates((E2M1, 1), (INT4, 6 / 7)), 32, E8M0)


def test_candidates_have_codes_of_one_width():
    with pytest.raises(ValueError, match=r"same width.*E2M1.*4.*INT3.*3"):
        Format("mine", candidates((E2M1, 1), (INT3, 2)), 16)


@pytest.mark.parametrize("block", [0, -16, 16.0, "16", None, True])
def test_a_block_is_a_positive_integer(block):
    with pytest.raises(ValueError, match="block must be an integer >= 1"):
        Format("mine", candidates((E2M1, 1)), block)


@pytest.mark.parametrize("peak", [0, -4.0, 6.5, float("nan"), float("inf")])
def test_the_peak_lies_on_the_grid(peak):
    with pytest.raises(ValueError, match=r"peak must lie in \(0, 6"):
        Format("mine", candidates((E2M1, 1)), 16, peak=peak)


@pytest.mark.parametrize("first", [Candidate(E2M1, step=0.5), Candidate(E2M1, stretch=1.5)])
def test_the_first_candidate_sets_the_units(first):
    with pytest.raises(ValueError, match="first candidate sets the units"):
        Format("mine", (first,), 16)


@pytest.mark.parametrize("wrong", [(), (E2M1,), ("E2M1",), (Candidate(E2M1), None)])
def test_candidates_are_candidates(wrong):
    with pytest.raises(TypeError, match="candidates must be a tuple of Candidate"):
        Format("mine", wrong, 16)


def test_a_list_of_candidates_becomes_a_tuple():
    fmt = Format("mine", [Candidate(E2M1)], 16)
    assert fmt == Format("mine", (Candidate(E2M1),), 16) and hash(fmt) == hash(Format("mine", (Candidate(E2M1),), 16))


@each_format
def test_equal_records_hash_alike_and_a_changed_field_differs(fmt):
    again = dataclasses.replace(fmt)
    assert again == fmt and hash(again) == hash(fmt)
    for field, value in {"name": "other", "block": fmt.block + 1, "peak": 0.5}.items():
        assert dataclasses.replace(fmt, **{field: value}) != fmt


# --- look-up


@each_format
def test_a_name_and_its_record_are_the_same_format(fmt):
    assert get_format(fmt.name) is fmt and get_format(fmt) is fmt and ifjax.get_format is get_format


@pytest.mark.parametrize(("typo", "meant"), [("nvpf4", "nvfp4"), ("IF4", "if4"), ("fouroverxis", "fouroversix")])
def test_an_unknown_name_suggests_the_nearest(typo, meant):
    with pytest.raises(ValueError, match=f"unknown format '{typo}'; did you mean .*{meant}"):
        get_format(typo)


def test_a_name_like_no_other_lists_them_all():
    with pytest.raises(ValueError, match="did you mean " + ", ".join(sorted(FORMATS))):
        get_format("?!")


@pytest.mark.parametrize("wrong", [None, 4, Format, E2M1])
def test_a_format_is_a_name_or_a_record(wrong):
    with pytest.raises(TypeError, match=r"fmt must be a format's name or an ifjax.Format"):
        get_format(wrong)


# --- records as plain values

MINE = [
    Format("nf", (Candidate(Grid("nf", (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1), ties="away", zero="unsigned")),), 10),
    Format("two", (Candidate(E3M2), Candidate(INT6, step=28 / 31), Candidate(E3M2, stretch=1.25)), 24, peak=20.0),
    Format("mx", (Candidate(E2M3),), 1, E8M0),
]
each_record = pytest.mark.parametrize("fmt", [*FORMATS.values(), *MINE], ids=lambda fmt: fmt.name)


@each_record
def test_a_record_survives_json(fmt):
    again = Format.from_dict(json.loads(json.dumps(fmt.to_dict())))
    assert again == fmt and hash(again) == hash(fmt)
    assert again.constants() == fmt.constants() and again.decodings == fmt.decodings


def test_a_scale_of_ones_own_cannot_be_written_down():
    scale = Scale("mine", E4M3.dtype, E4M3.encode, E4M3.decode, E4M3.nan, E4M3.top, 100.0, True)
    with pytest.raises(ValueError, match=r"only the scales .*e4m3.* can be written down, not 'mine'"):
        Format("mine", (Candidate(E2M1),), 16, scale).to_dict()
    in_disguise = dataclasses.replace(E4M3, largest=100.0)
    with pytest.raises(ValueError, match="can be written down"):
        Format("mine", (Candidate(E2M1),), 16, in_disguise).to_dict()


def changed(**fields):
    return FORMATS["if4"].to_dict() | fields


@pytest.mark.parametrize(
    "record",
    [
        {}, [], None, "if4", changed(scale="e5m2"), changed(candidates=None), changed(candidates=[{}]),
        changed(candidates=[]), changed(block=0), changed(block="16"), changed(peak=7.0), changed(scale=["e4m3"]),
        {key: value for key, value in changed().items() if key != "block"},
        changed(candidates=[{"grid": {"name": "g", "magnitudes": [0, 1, 2]}, "step": 1.0, "stretch": 1.0}]),
        changed(candidates=[{"grid": {"name": "g", "magnitudes": 3}, "step": 1.0, "stretch": 1.0}]),
        changed(candidates=[{"grid": "E2M1", "step": 1.0, "stretch": 1.0}]),
    ],
)  # fmt: skip
def test_what_is_no_record_is_refused(record):
    with pytest.raises(ValueError):
        Format.from_dict(record)


def test_named_grids_are_shared():
    """A decoder is written once for each grid, not once for each format."""
    used = {candidate.grid for fmt in FORMATS.values() for candidate in fmt.candidates}
    assert used == {E2M0, E2M1, E2M3, E3M2, INT3, INT4, INT6}
