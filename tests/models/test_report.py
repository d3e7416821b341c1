"""A report says what happened to every parameter, comes back from JSON as it was, fits a page, and finds fault."""

import io
import json
import math
import re

import pytest
from rich.console import Console

from ifjax.models.report import Entry, Report, Totals


def quantized(path="mlp/kernel", sqnr_db=21.5, **fields):
    defaults = {"module": "Dense", "shape": (64, 32), "dtype": "float32", "fmt": "if4", "act_fmt": None, "rule": ".*"}
    defaults |= {"bits_per_value": 4.516, "bytes_before": 8192, "bytes_after": 1156, "choice_share": 0.625}
    return Entry(path=path, sqnr_db=sqnr_db, **(defaults | fields))


def kept(path="mlp/bias", reason="a bias is added", **fields):
    defaults = {"module": "Dense", "shape": (32,), "dtype": "float32", "fmt": None, "act_fmt": None}
    defaults |= {"bits_per_value": 32.0, "bytes_before": 128, "bytes_after": 128}
    return Entry(path=path, reason=reason, **(defaults | fields))


REPORT = Report(
    (
        quantized(note="weights are dequantized for the module's own dot_general"),
        kept(),
        quantized("zeros/kernel", math.inf, fmt="nvfp4", act_fmt="if4", choice_share=None),
        quantized("empty/kernel", None, shape=(64, 0), bits_per_value=math.nan, bytes_before=0, bytes_after=4),
        kept("moe/wi", "no module tells", module=None, expected=False, rule="moe/.*"),
    )
)


# --- entries and totals


def test_an_entry_took_a_format_or_has_a_reason_not_to():
    for fields in ({"fmt": None}, {"reason": "a bias"}):
        with pytest.raises(ValueError, match="either the format that it took or the reason"):
            quantized(**fields)


def test_a_shape_is_a_tuple_of_integers_however_it_comes():
    assert quantized(shape=[64, 32]) == quantized()
    assert quantized(shape=[64, 32]).values == 2048
    assert hash(Report([quantized()])) == hash(Report((quantized(),)))


def test_totals_are_sums_over_the_entries():
    assert Report((quantized(), kept())).totals == Totals(
        parameters=2, quantized=1, values=2080, quantized_values=2048, bytes_before=8320, bytes_after=1284,
        bits_per_value=8 * 1284 / 2080, quantized_bits_per_value=8 * 1156 / 2048,
    )  # fmt: skip


# --- the empty report


def test_an_empty_report_is_defined():
    empty = Report(())
    assert str(empty) == "No parameters"
    assert empty.check(min_sqnr_db=10) is empty
    assert Report.from_json(empty.to_json()) == empty
    assert empty.totals[:6] == (0,) * 6
    assert all(map(math.isnan, empty.totals[6:]))
    with pytest.raises(ValueError, match="nothing is quantized"):
        empty.plot()


# --- JSON


def test_json_gives_the_report_back_exactly():
    text = REPORT.to_json()
    again = Report.from_json(text)
    assert again.to_json() == text
    assert repr(again) == repr(REPORT)  # NaN, too, which equals nothing
    finite = Report([entry for entry in REPORT.entries if not math.isnan(entry.bits_per_value)])
    assert Report.from_json(finite.to_json()) == finite


def test_what_earlier_versions_wrote_is_read():
    text = REPORT.to_json().replace('"choice_share"', '"int_share"')
    assert repr(Report.from_json(text)) == repr(REPORT)


def test_json_is_strict_json():
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    fields = json.loads(REPORT.to_json(), parse_constant=refuse)
    assert [entry["sqnr_db"] for entry in fields["entries"]] == [21.5, None, "inf", None, None]
    assert fields["entries"][3]["bits_per_value"] == "nan"
    assert fields["totals"]["bytes_after"] == REPORT.totals.bytes_after


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"entries": [{}]}', '{"entries": [{"colour": 1}]}', '{"entries": 3}']
)
def test_other_json_is_refused(text):
    with pytest.raises(ValueError, match=r"not a report as Report\.to_json writes it"):
        Report.from_json(text)


def test_a_number_that_is_none_is_refused():
    text = Report((quantized(),)).to_json().replace("21.5", '"high"')
    with pytest.raises(ValueError, match="high"):
        Report.from_json(text)


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    REPORT.save(path)
    assert Report.from_json(path.read_text()).to_json() == REPORT.to_json()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        Report(()).save(path)
    assert path.read_text() == REPORT.to_json()
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    with pytest.raises(FileNotFoundError, match="create it first"):
        REPORT.save(tmp_path / "no" / "report.json")


# --- the check


def test_a_report_as_it_should_be_is_returned():
    report = Report((quantized(), quantized("lossless", math.inf), quantized("unmeasured", None), kept()))
    assert report.check() is report
    assert Report((quantized(), kept())).check(min_sqnr_db=21.5)


def test_check_lists_everything_that_is_unexpected():
    report = Report(
        (
            quantized("low/kernel", 5.0),
            quantized("fine/kernel"),
            quantized("nan/kernel", math.nan),
            quantized("gone/kernel", -math.inf),
            quantized("unmeasured/kernel", None),
            kept("moe/wi", "no module tells its contraction axis", module=None, expected=False),
            quantized("fallback/kernel", note="its activations stay in float", expected=False),
            kept(),
        )
    )
    with pytest.raises(ValueError, match=r"weight_fmt=None") as error:
        report.check(min_sqnr_db=10)
    lines = str(error.value).splitlines()
    assert lines[0] == "6 of 8 parameters are not as it should be:"
    assert lines[1] == "  low/kernel (Dense 64x32, if4): its SQNR of 5 dB is below 10 dB"
    assert [line.split()[0] for line in lines[1:-1]] == [
        "low/kernel", "nan/kernel", "gone/kernel", "unmeasured/kernel", "moe/wi", "fallback/kernel",
    ]  # fmt: skip
    assert "moe/wi (32, not quantized): no module tells its contraction axis" in lines[5]
    assert "its activations stay in float" in lines[6]
    with pytest.raises(ValueError, match=r"^4 of 8"):  # without a minimum, low and unmeasured ones are fine
        report.check()


def test_nothing_quantized_at_all_is_unexpected():
    with pytest.raises(ValueError, match=r"none of 2 parameters is quantized \(mlp/bias: a bias is added; b: .*'\.\*'"):
        Report((kept(), kept("b"))).check()


# --- the table


def lines_with(report, text):
    return [line for line in str(report).splitlines() if text in line]


def test_the_table_says_where_nothing_was_packed():
    report = Report((quantized(bits_per_value=32.0, bytes_after=8192), kept()))
    first, second = str(report).splitlines()[:2]
    assert first == "1 of 2 parameters, 98.5% of 2080 values, are quantized, and stored as they were: 8.32 kB"
    assert second == "by the rule '.*' 1"


def test_the_table_tells_each_parameter():
    text = str(REPORT)
    assert text.startswith("3 of 5 parameters are quantized: 16.64 kB -> 2.57 kB, 6.47 times less\n")
    assert "by the rule '.*' 3" in text
    (line,) = lines_with(REPORT, "mlp/kernel")
    assert line.split() == [
        "mlp/kernel", "[1]", "64x32", "if4", "4.516", "0.00819", "->", "0.00116", "21.5", "62",
    ]  # fmt: skip
    assert " [1] weights are dequantized for the module's own dot_general" in text
    (line,) = lines_with(REPORT, "zeros/kernel")
    assert "nvfp4, act if4" in line and "inf" in line
    (line,) = lines_with(REPORT, "moe/wi")
    assert "NOT EXPECTED: no module tells" in line
    (line,) = lines_with(REPORT, "a bias is added")
    assert line.split()[:5] == ["mlp/bias", "Dense", "1", "0.13", "kB"]


def test_what_stays_for_the_same_reason_shares_a_line():
    report = Report([quantized(), *(kept(f"layer_{i}/bias") for i in range(12)), kept("norm/scale", "no matmul")])
    (line,) = lines_with(report, "a bias is added")
    assert line.split()[:3] == [".../bias", "Dense", "12"]
    assert len(lines_with(report, "norm/scale")) == 1


def test_rules_have_a_column_where_there_are_several():
    report = Report((quantized(), quantized("a", rule="a|b")))
    assert "by the rules '.*' 1, 'a|b' 1" in str(report)
    assert lines_with(report, "64x32")[1].endswith("a|b")


def test_many_layers_share_a_line():
    entries = [quantized(f"layer_{i}/{name}/kernel", 20 + i) for i in range(24) for name in ("up", "down")]
    assert len(lines_with(Report(entries[:40]), "/kernel")) == 40
    up, down = lines_with(Report(entries), "/kernel")
    assert up.split()[:3] == ["24", "x", "layer_*/up/kernel"] and "20.0..43.0" in up and "0.197 -> 0.0277" in up
    assert "layer_*/down/kernel" in down
    different = [quantized(f"{'abcdefghij'[i % 10]}{'klmnopqrst'[i // 10]}/kernel") for i in range(100)]
    assert len(lines_with(Report(different), "/kernel")) == 40
    assert len(lines_with(Report(different), "and 60 more")) == 1


@pytest.mark.parametrize("width", [80, 110, 200])
def test_the_table_fits_the_page(width):
    long = "/".join(f"a_module_with_a_long_name_{i}" for i in range(9))
    report = Report(
        (
            quantized(f"{long}/kernel", shape=(12, 30522, 1024), act_fmt="nvfp4", rule=f".*{long}.*", note="w " * 99),
            quantized(),
            kept(f"{long}/bias", "for a reason that takes many words " * 9, module="AModuleWhoseNameIsLong" * 3),
            *(kept(f"{name}/bias", f"reason {name}") for name in "abcdefghijklmnopqrstuvwxyz"),
        )
    )
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(report)
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    (line,) = [line for line in lines if re.search(r"a_mo.*\.\.\..*nel", line)]  # both ends of the name are there
    assert "21.5" in line
    assert max(map(len, str(report).splitlines())) <= 110


def test_brackets_in_names_are_names_not_markup():
    report = Report((quantized("w[bold]/kernel", rule="[abc]+"), kept("[/]", "because [red]")))
    assert "w[bold]/kernel" in str(report) and "because [red]" in str(report) and "'[abc]+'" in str(report)


# --- the picture


def test_the_picture_has_a_bar_for_each_parameter(tmp_path):
    pytest.importorskip("matplotlib")
    figure = REPORT.plot(tmp_path / "report.png")
    upper, lower = figure.axes
    assert [label.get_text() for label in upper.get_yticklabels()] == ["mlp/kernel", "zeros/kernel", "empty/kernel"]
    assert [bar.get_width() for bar in upper.patches] == [21.5]
    assert {text.get_text().strip() for text in upper.texts} == {"inf", "not measured"}
    assert [text.get_text() for text in upper.get_legend().get_texts()] == ["if4", "nvfp4"]
    assert [bar.get_width() for bar in lower.patches] == [16640 / 1e6, 2572 / 1e6]
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_the_picture_takes_many_layers_together():
    pytest.importorskip("matplotlib")
    upper, _ = Report([quantized(f"layer_{i}/kernel", 20.0 + i % 2) for i in range(50)]).plot().axes
    assert [label.get_text() for label in upper.get_yticklabels()] == ["50 x layer_*/kernel"]
    assert [bar.get_width() for bar in upper.patches] == [20.5]
