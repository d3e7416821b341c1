"""Every format is a record that states what the specification says, proves itself, and survives being written down."""

import dataclasses
import fractions
import json
import pydoc

import numpy as np
import pytest

import ifjax
from ifjax.formats import (
    E2M0,
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E8M0,
    FORMATS,
    INT3,
    INT4,
    INT6,
    SCALES,
    UE5M3,
    Candidate,
    Format,
    Grid,
    Scale,
    TableScale,
    get_format,
)  # fmt: skip

each_format = pytest.mark.parametrize("fmt", [pytest.param(fmt, id=name) for name, fmt in FORMATS.items()])

PLAIN = [
    "if4", "if3", "if6_e2m3", "if6_e3m2", "nvfp4", "fouroversix", "nvfp3", "nvfp6_e2m3", "nvfp6_e3m2",
    "nvint3", "nvint4", "nvint6", "mxfp3", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2",
]  # fmt: skip
BS8 = [f"{name}_bs8" for name in PLAIN if "6" not in name]
# bits a value, and candidates
SIZES = {
    "hifloat4": (4.5, 1), "hifloat4_half_even": (4.5, 1), "nvfp4_ue5m3": (4.5, 1), "fp4_ue5m3": (4.5, 1),
    "fp4_ue5m3_pz": (4.5, 1), "fp4_e4m3": (4.5, 1), "fp4_e4m3_pz": (4.5, 1), "fp4_e4m3_46": (4.5, 2), "nf4": (4.5, 1),
    "nf4_mirror": (4.5, 2), "split87": (4.5, 2), "octet": (4.5, 8), "quad": (4.5, 4),
    "sfp4": (4.5, 3), "razer": (4.5, 4), "razer_act": (4.5, 2), "mixfp4": (4.5, 2),
}  # fmt: skip
of_the_if_paper = pytest.mark.parametrize("fmt", [pytest.param(get_format(n), id=n) for n in (*PLAIN, *BS8)])


def bits(word):
    return np.uint32(word).view(np.float32)


# --- what the named formats are


def test_all_names_are_there():
    assert set(FORMATS) == {*PLAIN, "nvfp4_static4", "mxfp4_static4", "if6", *SIZES}
    assert all(name in FORMATS for name in BS8) and "if4_bs" not in FORMATS and "if5_bs8" not in FORMATS


def test_a_format_is_listed_under_its_name_and_if6_is_an_alias():
    assert {name for name, fmt in FORMATS.items() if fmt.name != name} == {"if6"}
    assert FORMATS["if6"] is FORMATS["if6_e2m3"]


@pytest.mark.parametrize("name", BS8)
def test_bs8_formats_differ_in_the_block_alone(name):
    assert FORMATS[name] == dataclasses.replace(FORMATS[name.removesuffix("_bs8")], name=name, block=8)


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4"])
def test_static4_differs_in_the_peak_alone(name):
    assert FORMATS[f"{name}_static4"] == dataclasses.replace(FORMATS[name], name=f"{name}_static4", peak=4.0)


@of_the_if_paper
def test_mx_formats_have_blocks_of_32_and_no_tensor_scale(fmt):
    is_mx, is_bs8 = fmt.name.startswith("mx"), fmt.name.endswith("_bs8")
    assert fmt.block == (8 if is_bs8 else 32 if is_mx else 16)
    assert (fmt.scale is E8M0) == is_mx == (not fmt.has_tensor_scale)
    peak = 256 if fmt.name.startswith("fouroversix") else 448
    assert fmt.tensor_peak == (None if is_mx else peak)


@of_the_if_paper
def test_the_flag_marks_if_formats_alone(fmt):
    assert fmt.has_selector == fmt.name.startswith("if") == (len(fmt.decodings) == 2)


@of_the_if_paper
def test_bits_are_those_of_the_name(fmt):
    digit = next(int(c) for c in fmt.name.replace("fouroversix", "4") if c.isdigit())
    assert fmt.bits == digit and fmt.bits_per_value == digit + 8 / fmt.block
    assert all(c.grid.bits == fmt.bits for c in fmt.candidates)


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_frontier_formats_keep_their_sizes(name, size):
    assert (FORMATS[name].bits_per_value, len(FORMATS[name].candidates)) == size


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
    fmt = FORMATS[name]
    assert (fmt.block_peak(), fmt.tensor_constant()) == (q, k)
    assert all(isinstance(c, np.float32) for c in (fmt.block_peak(None, 16 / 17), fmt.tensor_constant(16 / 17)))


@pytest.mark.parametrize(("name", "k"), [("nvfp4", 0x451E1E1E), ("fouroversix", 0x44B4B4B5)])
def test_constants_with_headroom_are_rounded_once(name, k):
    fmt = FORMATS[name]
    assert (fmt.block_peak(None, 16 / 17), fmt.tensor_constant(16 / 17)) == (bits(0x40B4B4B5), bits(k))


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
    assert len(fmt.candidates) == 2 and fmt.decodings == ((E2M1, 1.0, 0.0),) and not fmt.has_selector


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
    with pytest.raises(ValueError, match="3 different decodings do not fit the 1 free bits of a header of e4m3"):
        Format("mine", three, 16)


def test_more_candidates_than_two_fit_if_their_decodings_do():
    stretched = Candidate(E2M1, scale_multiplier=1.5), Candidate(INT4, 6 / 7, scale_multiplier=1.25)
    many = (*candidates((E2M1, 1), (INT4, 6 / 7)), *stretched)
    fmt = Format("mine", many, 16)
    assert fmt.has_selector and len(fmt.decodings) == 2


@pytest.mark.parametrize("scale", [UE5M3, E8M0], ids=lambda scale: scale.name)
def test_a_scale_without_a_free_bit_takes_one_decoding(scale):
    """UE5M3 uses the bit in which if4, split87 and razer_act keep their selector."""
    refusal = f"2 different decodings do not fit a header of {scale.name}, which has no free bit for a selector: use at"
    two = candidates((E2M1, 1), (INT4, 6 / 7))
    with pytest.raises(ValueError, match=f"^mine: {refusal} most 1 different"):
        Format("mine", two, 32, scale, tensor_peak=None)
    for name in ("if4", "split87", "razer_act", "mixfp4"):
        with pytest.raises(ValueError, match=f"^{name}: {refusal}"):
            dataclasses.replace(FORMATS[name], scale=scale)
    assert dataclasses.replace(FORMATS["fouroversix"], scale=UE5M3).has_selector is False  # two scales, one decoding


def test_candidates_have_codes_of_one_width():
    with pytest.raises(ValueError, match=r"same width.*E2M1.*4.*INT3.*3"):
        Format("mine", candidates((E2M1, 1), (INT3, 2)), 16)


@pytest.mark.parametrize("block", [0, -16, 16.0, "16", None, True])
def test_a_block_is_a_positive_integer(block):
    with pytest.raises(ValueError, match="block must be an integer >= 1"):
        Format("mine", candidates((E2M1, 1)), block)


@pytest.mark.parametrize("peak", [0, -4.0, "6", True, float("nan"), float("inf")])
def test_the_peak_is_positive(peak):
    with pytest.raises(ValueError, match=r"peak must be a number > 0"):
        Format("mine", candidates((E2M1, 1)), 16, peak=peak)


@pytest.mark.parametrize("peak", [0, -4.0, "6", True, float("nan"), float("inf")])
def test_the_tensors_peak_is_positive_or_none(peak):
    with pytest.raises(ValueError, match=r"tensor_peak must be a number > 0 or None"):
        Format("mine", candidates((E2M1, 1)), 16, tensor_peak=peak)


@pytest.mark.parametrize(("scale", "peak"), [(E8M0, 448.0), (E4M3, 512.0), (TableScale("t", (0.0, 1.0)), 448.0)])
def test_a_tensors_peak_is_a_scale_that_there_is(scale, peak):
    with pytest.raises(ValueError, match="write tensor_peak=None for a format without a tensor scale"):
        Format("mine", candidates((E2M1, 1)), 16, scale, tensor_peak=peak)


@pytest.mark.parametrize("fields", [{"ties": "even"}, {"ties": None}])
def test_ties_keep_the_first_or_the_last(fields):
    with pytest.raises(ValueError, match="ties must be 'first' or 'last'"):
        Format("mine", candidates((E2M1, 1)), 16, **fields)


def test_four_decodings_fit_a_scale_of_six_bits():
    e3m3 = TableScale.minifloat("e3m3", 3, 3, 3)
    fmt = Format("mine", tuple(Candidate(E2M1, step) for step in (1, 0.9, 0.8, 0.7)), 16, e3m3, tensor_peak=28.0)
    header = np.arange(256)
    selector, payload = fmt.split(header)
    np.testing.assert_array_equal(selector, header // 64)
    np.testing.assert_array_equal(payload, header % 64)
    np.testing.assert_array_equal(fmt.join(selector, payload), header)
    with pytest.raises(ValueError, match="5 different decodings do not fit the 2 free bits"):
        Format("mine", (*fmt.candidates, Candidate(E2M1, 0.6)), 16, e3m3, tensor_peak=28.0)


@pytest.mark.parametrize("first", [Candidate(E2M1, step=0.5), Candidate(E2M1, scale_multiplier=1.5)])
def test_the_first_candidate_sets_the_units(first):
    with pytest.raises(ValueError, match="first candidate sets the units"):
        Format("mine", (first,), 16)


@pytest.mark.parametrize("wrong", [(), (E2M1,), ("E2M1",), (Candidate(E2M1), None)])
def test_candidates_are_candidates(wrong):
    with pytest.raises(TypeError, match="candidates must be a tuple of Candidate"):
        Format("mine", wrong, 16)


@pytest.mark.parametrize("name", [4, None, b"mine"])
def test_a_name_is_text(name):
    with pytest.raises(TypeError, match="format's name must be text"):
        Format(name, (Candidate(E2M1),), 16)
    with pytest.raises(TypeError, match="grid's name must be text"):
        Grid(name, (0.0, 1.0))


def test_numbers_of_other_types_become_floats():
    """So that each record can be written to a file."""
    own = Candidate(INT4, np.float32(0.85), np.float64(2), np.float32(6.5), np.float16(0.25))
    mine = Format("mine", (Candidate(E2M1), own), 16, peak=np.float32(6.5), tensor_peak=fractions.Fraction(447, 2))
    assert Format.from_dict(json.loads(json.dumps(mine.to_dict()))) == mine
    assert mine.tensor_peak == 223.5 and mine.candidates[1].step == np.float32(0.85)


def test_a_tensors_maximum_maps_to_a_number_of_float32():
    with pytest.raises(ValueError, match="which float32 cannot represent"):
        Format("large", (Candidate(Grid("large", (0.0, 1e36))),), 16)
    Format("large", (Candidate(Grid("large", (0.0, 7e35))),), 16)


def test_no_other_format_takes_a_derived_name():
    """A file or a rule that says "if4_bs32" means if4 with blocks of 32."""
    with pytest.raises(ValueError, match="if4_bs32"):
        ifjax.FORMATS.register(dataclasses.replace(FORMATS["if4"], name="if4_bs32"))
    assert ifjax.get_format("if4_bs32").block == 32


def test_a_list_of_candidates_becomes_a_tuple():
    fmt = Format("mine", [Candidate(E2M1)], 16)
    assert fmt == Format("mine", (Candidate(E2M1),), 16) and hash(fmt) == hash(Format("mine", (Candidate(E2M1),), 16))


@each_format
def test_equal_records_hash_alike_and_a_changed_field_differs(fmt):
    again = dataclasses.replace(fmt)
    assert again == fmt and hash(again) == hash(fmt)
    for field, value in {"name": "other", "block": fmt.block * 2, "peak": 0.5}.items():
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
    with pytest.raises(TypeError, match=r"format must be a name or an ifjax.Format, got"):
        get_format(wrong)


# --- records as plain values

MINE = [
    Format("nf", (Candidate(Grid.sign_magnitude("nf", (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1), "away")),), 10),
    Format("odd", (Candidate(Grid("odd", (0, 1, 5, -1), "lower", preferred=(2,), unused=(1,)), offset=0.0),), 10),
    Format(
        "many", (Candidate(E2M1), Candidate(E2M1, offset=0.375), Candidate(E2M1, peak=7.0)), 16,
        TableScale.minifloat("e3m3", 3, 3, 3), tensor_peak=28.0, ties="last", prevent_zero=True,
    ),
    Format(
        "table", (Candidate(INT3),), 8, TableScale("mine", (0.0, 1.0, 3.0), "up", last=1), tensor_peak=None,
        saturates=True,
    ),
    Format("two", (Candidate(E3M2), Candidate(INT6, 28 / 31), Candidate(E3M2, scale_multiplier=1.25)), 24, peak=20.0),
    Format("mx", (Candidate(E2M3),), 1, E8M0, tensor_peak=None),
]
each_record = pytest.mark.parametrize("fmt", [*FORMATS.values(), *MINE], ids=lambda fmt: fmt.name)


@each_record
def test_a_record_survives_json(fmt):
    again = Format.from_dict(json.loads(json.dumps(fmt.to_dict())))
    assert again == fmt and hash(again) == hash(fmt)
    assert again.tensor_constant() == fmt.tensor_constant() and again.decodings == fmt.decodings


@dataclasses.dataclass(frozen=True)
class Powers(Scale):
    name: str = "powers"

    def encode(self, scale, *parts):
        return scale.astype(np.int32)

    def decode(self, payload, place=0):
        return payload.astype(np.float32)


def test_a_scale_that_is_code_is_written_down_by_its_name_once_it_is_registered(monkeypatch):
    fmt = Format("mine", (Candidate(E2M1),), 16, Powers(), tensor_peak=None)
    with pytest.raises(ValueError, match=r"the scale 'powers' is code, .*register it by ifjax.formats.SCALES.register"):
        fmt.to_dict()
    monkeypatch.setattr(SCALES, "_records", dict(SCALES))
    SCALES.register(Powers())
    assert fmt.to_dict()["scale"] == "powers" and Format.from_dict(fmt.to_dict()) == fmt
    with pytest.raises(ValueError, match="'powers' is another scale"):
        SCALES.register(TableScale("powers", (0.0, 1.0)))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="unknown scale 'powers'"):
        Format.from_dict(FORMATS["nvfp4"].to_dict() | {"scale": "powers"})


def changed(**fields):
    return FORMATS["if4"].to_dict() | fields


@pytest.mark.parametrize(
    "record",
    [
        {}, [], None, "if4", changed(scale="e5m2"), changed(candidates=None), changed(candidates=[{}]),
        changed(candidates=[]), changed(block=0), changed(block="16"), changed(peak=-7.0), changed(scale=["e4m3"]),
        changed(name=3), changed(extra=1),
        {key: value for key, value in changed().items() if key != "block"},
        changed(candidates=[{"grid": {"name": "g", "values": [0, 1, 2]}, "step": 1.0}]),
        changed(candidates=[{"grid": {"name": "g", "values": 3}, "step": 1.0}]),
        changed(candidates=[{"grid": "E2M1", "step": 1.0}]),
        changed(candidates=[{"grid": {"name": "g", "magnitudes": [0, 1, 2]}, "step": 1.0, "stretch": 1.0}]),
    ],
)  # fmt: skip
def test_what_is_no_record_is_refused(record):
    with pytest.raises(ValueError):
        Format.from_dict(record)


def test_named_grids_are_shared():
    """A decoder is written once for each grid, not once for each format."""
    used = {candidate.grid for name in PLAIN for candidate in FORMATS[name].candidates}
    assert used == {E2M0, E2M1, E2M3, E3M2, INT3, INT4, INT6}


LAYOUT_1 = {
    "name": "mine", "block": 16, "scale": "e4m3_256", "peak": 4.0,
    "candidates": [
        {"grid": {"name": "E2M1", "magnitudes": [0, 0.5, 1, 1.5, 2, 3, 4, 6], "sign": "bit", "ties": "even",
                  "zero": "signed"}, "step": 1.0, "stretch": 1.0},
        {"grid": {"name": "INT4", "magnitudes": list(range(8)), "sign": "twos_complement", "ties": "even",
                  "zero": "unsigned"}, "step": 6 / 7, "stretch": 1.5},
    ],
}  # fmt: skip


def test_records_of_layout_1_are_read():
    both = (Candidate(E2M1), Candidate(INT4, 6 / 7, scale_multiplier=1.5))
    assert Format.from_dict(LAYOUT_1) == Format("mine", both, 16, peak=4.0, tensor_peak=256.0)
    mx = {**LAYOUT_1, "scale": "e8m0", "peak": None, "candidates": LAYOUT_1["candidates"][:1]}
    assert Format.from_dict(mx) == Format("mine", both[:1], 16, E8M0, tensor_peak=None)


@pytest.mark.parametrize(
    "fields", [{"extra": 1}, {"scale": "e5m2"}, {"candidates": [{**LAYOUT_1["candidates"][0], "x": 1}]}]
)
def test_faulty_records_of_layout_1_are_refused(fields):
    with pytest.raises(ValueError, match="not a format record"):
        Format.from_dict(LAYOUT_1 | fields)


@each_format
def test_help_shows_what_a_named_format_is(fmt):
    text = pydoc.render_doc(fmt, renderer=pydoc.plaintext)
    assert fmt.doc in text and "arXiv" in fmt.doc
