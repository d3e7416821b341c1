"""Rules match whole paths, the first one wins, files give back what was saved, and every error says what to write."""

import dataclasses
import json
import os
import re
import sys

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ifjax.codec import LOSSES, SEARCHES, BlockLoss, Search
from ifjax.formats import FORMATS, Candidate, Format, Grid, Scale, TableScale, get_format
from ifjax.formats.grids import E2M1, INT4
from ifjax.formats.scales import E4M3
from ifjax.models.decisions import reason_against
from ifjax.models.rule_checks import check_used
from ifjax.models.rule_files import load_rules, save_rules
from ifjax.models.rules import OPERANDS, Rule, RuleError, default_rules, first_match
from ifjax.models.sites import Site

GRIDS = Grid.sign_magnitude("odd", (0.0, 0.1, 0.7, 3.0)), Grid.sign_magnitude("even", (0, 1, 2, 3))
MINE = Format("mine", tuple(map(Candidate, GRIDS)), 24)
FAKE_IF4 = dataclasses.replace(FORMATS["if4"], block=4)  # a user's own, under a name that is taken
# Of what no named format has: a grid that is not symmetric, and a scale that no name stands for.
TABLE = Format(
    "table", (Candidate(Grid("low", (-3.0, 0.0, 1.0, 2.0), preferred=(1,))),), 8,
    TableScale("thirds", (0.0, 1 / 3, 2 / 3, 1.0), "up"), tensor_peak=None, ties="last", saturates=True,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class InHalves(Scale):
    """A scale with a factor for each half of a block of 16, which is code."""

    name = "in_halves"
    runs = (8,)

    def encode(self, scale, *parts):
        raise NotImplementedError

    def decode(self, payload, place=0):
        raise NotImplementedError


HALVES = Format("halves", (Candidate(E2M1),), 16, InHalves(), tensor_peak=None)



def dense(path, module="Dense", length=64):
    return Site(f"{path}/kernel", path, module, (length, 8), (-2,))


PATHS = [
    dense("encoder/layer_0/mlp/Dense_0"),
    dense("encoder/layer_0/mlp/Dense_1", length=256),
    Site("encoder/layer_0/LayerNorm_0", "encoder/layer_0/LayerNorm_0", "LayerNorm", reason="LayerNorm has no matmul"),
    Site("encoder/layer_0/attention", "encoder/layer_0/attention", "MultiHeadDotProductAttention", operands=OPERANDS),
    dense("stem", "Conv", 3),
    Site("moe/wi", "moe/wi", shape=(8, 64, 128)),
    dense("lm_head"),
]


# --- what matches


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("Dense_0", "Dense_0", True),
        ("Dense_0", "mlp/Dense_0", False),
        ("mlp", "mlp/Dense_0", False),
        ("Dense_0|mlp", "mlp/Dense_0", False),
        (".*/Dense_[0-9]", "mlp/Dense_7", True),
        (".*/Dense_[0-9]", "mlp/Dense_77", False),
        ("", "", True),
        ("", "a", False),
        (".*", "", True),
    ],
)
def test_a_path_matches_as_a_whole(pattern, path, fits):
    assert Rule(pattern).matches(path) is fits


@pytest.mark.parametrize(
    ("module", "name", "fits"),
    [
        ("Dense", "Dense", True),
        ("Dense", "DenseGeneral", False),
        ("Dense", None, False),
        (("Dense", "Einsum"), "Einsum", True),
        (["Dense", "Einsum"], "Conv", False),
        (None, "Anything", True),
        (None, None, True),
    ],
)
def test_a_class_matches_by_its_exact_name(module, name, fits):
    assert Rule(".*", module=module).matches("a", name) is fits


def test_the_first_match_wins():
    head, dense, rest = rules = [Rule("head", None), Rule(".*", "nvfp4", module="Dense"), Rule(".*", "if4")]
    assert first_match(rules, "head", "Dense") is head
    assert first_match(rules, "body", "Dense") is dense
    assert first_match(rules, "body", "Conv") is rest
    assert first_match(rules[:2], "body", "Conv") is None
    assert first_match([], "body") is None


# --- what a rule is


def test_rules_are_equal_however_they_are_given():
    pairs = [
        (Rule("a", FORMATS["if4"]), Rule("a", "if4")),
        (Rule("a", "if6"), Rule("a", FORMATS["if6_e2m3"])),
        (Rule("a", module=["Dense", "Conv"]), Rule("a", module=("Dense", "Conv"))),
        (Rule("a", loss=LOSSES["mae"], search=SEARCHES["fast"]), Rule("a", loss="mae", search="fast")),
        (Rule("a", operands={"value": "if4", "query": "nvfp4"}),
         Rule("a", operands=(("query", FORMATS["nvfp4"]), ("key", None), ("value", "if4")))),
    ]  # fmt: skip
    for one, other in pairs:
        assert one == other and hash(one) == hash(other)
    assert Rule("a", FAKE_IF4) != Rule("a", "if4")
    assert Rule("a", FAKE_IF4).weight_format is FAKE_IF4


def test_a_rule_is_a_static_argument_of_jit():
    traces = []

    @jax.jit(static_argnums=0)
    def bits(rule, x):
        traces.append(rule)
        return x * rule.weight_format.bits

    assert bits(Rule("a", "if4"), 1) == 4 and bits(Rule("a", FORMATS["if4"]), 1) == 4
    assert len(traces) == 1
    assert bits(Rule("a", "if3"), 1) == 3 and len(traces) == 2


def test_a_rule_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Rule("a").path = "b"


@pytest.mark.parametrize(
    ("fmt", "block", "name"),
    [
        ("if4", 8, "if4_bs8"), ("if4_bs8", 16, "if4"), ("if4_bs8", 32, "if4_bs32"), ("mxfp4", 16, "mxfp4_bs16"),
        ("if4", 16, "if4"), ("if4_bs8", 8, "if4_bs8"), ("if4", None, "if4"),
    ],
)  # fmt: skip
def test_block_replaces_the_formats_block_and_names_it(fmt, block, name):
    made = Rule("a", fmt, block=block).weight_format
    assert made == dataclasses.replace(get_format(fmt), name=name, block=block or get_format(fmt).block)
    assert name not in FORMATS or made == FORMATS[name]


def test_block_leaves_other_formats_alone():
    rule = Rule("a", MINE, "if4", block=8, operands={"key": MINE})
    assert (rule.weight_format.name, rule.weight_format.block) == ("mine_bs8", 8)
    assert rule.activation_format == FORMATS["if4"]
    assert rule.operand_formats == {"key": MINE}


def test_no_format_means_left_alone():
    assert Rule("a", None).excludes and Rule("a", None).weight_format is None
    assert not Rule("a").excludes and Rule("a").activation_format is None
    assert not Rule("a", None, operands={"key": "if4"}).excludes


@pytest.mark.parametrize(
    ("field", "values", "message"),
    [
        ("path", {"path": "enc(oder"},
         "missing ), unterminated subpattern at position 3, before '(oder'. '.*' stands for anything"),
        ("path", {"path": "*Dense"}, "nothing to repeat at position 0, before '*Dense'"),
        ("path", {"path": "a{99999999999999}"}, "path is not a regular expression"),
        ("path", {"path": 3}, "path must be a regular expression (a string), got 3"),
        ("weight_fmt", {"weight_fmt": "if5"}, "weight_fmt: unknown format 'if5'; did you mean if6, if4, if3?"),
        ("weight_fmt", {"weight_fmt": 4}, "weight_fmt: format must be a name or an ifjax.Format, got int"),
        ("act_fmt", {"act_fmt": "nvpf4"}, "act_fmt: unknown format 'nvpf4'; did you mean nvfp4"),
        ("module", {"module": "nn.Dense"}, "module must be the name of a class alone, such as 'Dense'"),
        ("module", {"module": ()}, "module must be the name of a class alone"),
        ("module", {"module": ("Dense", 3)}, "module must be the name of a class alone"),
        ("module", {"module": 3}, "module must be the name of a class alone"),
        ("module", {"module": {"Dense": 1}}, "module must be the name of a class alone"),
        ("module", {"module": int}, "module must be a class's name: write 'int'"),
        ("loss", {"loss": "mes"}, "loss must be one of ['abs_max', 'mae', 'mse'] or a function, got 'mes'"),
        ("act_loss", {"act_fmt": "if4", "act_loss": 2}, "act_loss must be one of"),
        ("search", {"search": "slow"},
         "unknown search 'slow'; did you mean soar? See ifjax.codec.SEARCHES"),
        ("search", {"search": 3}, "search must be a name or "),
        ("block", {"block": 0}, "block must be an integer >= 1, or None for the format's own, got 0"),
        ("block", {"block": True}, "block must be an integer >= 1"),
        ("block", {"block": 8.0}, "block must be an integer >= 1"),
        ("block", {"weight_fmt": HALVES, "block": 12}, "block: halves: runs of (8,) do not divide a block of 12"),
        ("block_2d", {"block_2d": 1}, "block_2d must be True or False, got 1"),
        ("block_2d", {"weight_fmt": HALVES, "block_2d": True},
         "block_2d: halves scales parts of a block, which squares cannot share: use 1-D blocks"),
        ("optional", {"optional": None}, "optional must be True or False, got None"),
        ("act_amax", {"act_fmt": "if4", "act_amax": "row"}, "act_amax must be 'tensor', 'token' or 'static', got"),
        ("weight_amax", {"weight_amax": "token"}, "weight_amax must be 'tensor' or 'row', got 'token'"),
        ("weight_amax", {"weight_amax": "row", "block_2d": True}, "block_2d shares scales across rows"),
        ("weight_amax", {"weight_amax": "row", "weight_fmt": "mxfp4"}, "no effect on mxfp4, which has no tensor scale"),
        ("weight_amax", {"weight_amax": "row", "weight_fmt": None}, "has no effect with weight_fmt=None"),
        ("axis", {"axis": 0}, "axis must be an integer < 0, counted from the last axis (-2 for a matrix [in, out])"),
        ("axis", {"axis": -3, "block_2d": True}, "axis must be -1 or -2, as block_2d takes squares"),
        ("operands", {"operands": {"qeury": "if4"}}, "not 'qeury'; did you mean query"),
        ("operands", {"operands": {"query": "if5"}}, "operands: unknown format 'if5'; did you mean if6, if4, if3?"),
        ("operands", {"operands": "query"}, "operands must map names to formats, as in {'key': 'if4'}, got 'query'"),
        ("loss", {"weight_fmt": None, "loss": "mae"}, "loss='mae' has no effect with weight_fmt=None"),
        ("act_fmt", {"weight_fmt": None, "act_fmt": "if4"}, "act_fmt='if4' has no effect with weight_fmt=None"),
        ("act_amax", {"act_amax": "token"}, "act_amax='token' has no effect without act_fmt"),
        ("act_loss", {"act_loss": "mae"}, "act_loss='mae' has no effect without act_fmt"),
        ("act_search", {"act_search": "fast"}, "act_search='fast' has no effect without act_fmt"),
        ("act_search", {"act_fmt": "if4", "act_search": "quick"}, "quick"),
        ("damping", {"damping": 0.1}, "damping=0.1 has no effect without gptq"),
        ("damping", {"gptq": True, "damping": -1}, "damping must be a number >= 0"),
        ("act_amax", {"act_fmt": "mxfp4", "act_amax": "static"}, "no effect on mxfp4, which has no tensor scale"),
    ],
)  # fmt: skip
def test_a_rule_refuses(field, values, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Rule(**{"path": ".*"} | values)
    assert isinstance(caught.value, RuleError) and caught.value.field == field
    assert str(caught.value).startswith(f"Rule({values.get('path', '.*')!r}): ")


def test_activation_options_apply_to_operands():
    rule = Rule("a", None, act_amax="token", act_loss="mae", operands={"key": "if4"})
    assert (rule.act_amax, rule.act_loss) == ("token", "mae")


# --- the default


@pytest.mark.parametrize("path", [
    "lm_head", "head", "head/Dense_0", "model/classifier", "cls/predictions/decoder", "logits",
    "embeddings/word_embeddings", "transformer/wte", "wpe", "Embed_0", "PatchEmbedding_0/Conv_0", "embeddings_project",
])  # fmt: skip
def test_heads_and_embeddings_stay_in_high_precision(path):
    assert first_match(default_rules(), path, "Dense").excludes


@pytest.mark.parametrize("path", [
    "", "Dense_0", "encoder/layer/0/attention/self/query", "attention/head_0/query", "decoder/layer_0/Dense_0",
    "attention/output/dense", "pooler/dense", "overhead", "my_lm_head2", "heads/Dense_0",
])  # fmt: skip
def test_other_matmuls_are_quantized_by_default(path):
    rule = first_match(default_rules("nvfp4", "if4"), path, "Dense")
    assert (rule.weight_fmt, rule.act_fmt) == ("nvfp4", "if4")


def test_a_table_by_any_name_is_an_embedding():
    assert first_match(default_rules(), "tokens", "Embed").excludes


# --- files

names = st.text("abcXYZ_", min_size=1).filter(str.isidentifier)
patterns = st.one_of(
    st.text().map(re.escape), st.sampled_from([".*", "", "a|b", r"layer_\d+/.*", "(?i)head", "[a-c]+"])
)
formats = st.one_of(
    st.sampled_from(sorted(FORMATS)),
    st.sampled_from([*FORMATS.values(), MINE, FAKE_IF4, TABLE]),
    st.builds(
        lambda name, step, block, peak: Format(name, (Candidate(E2M1), Candidate(INT4, step)), block, E4M3, peak),
        st.text(min_size=1),
        st.floats(1e-6, 1e6),
        st.integers(1, 64),
        st.none() | st.floats(1, 6),
    ),
)
losses = st.sampled_from([None, "mse", "mae", "abs_max"])


@st.composite
def rules_of_all_kinds(draw):
    values = {"optional": draw(st.booleans()), "module": draw(st.none() | names | st.lists(names, min_size=1))}
    values["operands"] = draw(st.dictionaries(st.sampled_from(OPERANDS), st.none() | formats))
    values["weight_fmt"] = draw(st.none() | formats)
    if values["weight_fmt"] is not None:
        values |= {"loss": draw(losses), "search": draw(st.sampled_from([None, "fast", "exhaustive"]))}
        runs = get_format(values["weight_fmt"]).scale.runs
        lengths = st.sampled_from([16, 64]) if runs else st.integers(1, 64)
        values |= {"block": draw(st.none() | lengths), "block_2d": not runs and draw(st.booleans())}
        if get_format(values["weight_fmt"]).has_tensor_scale and not values["block_2d"]:
            values["weight_amax"] = draw(st.sampled_from(["tensor", "row"]))
        values |= {"axis": draw(st.sampled_from([None, -1, -2])), "act_fmt": draw(st.none() | formats)}
    inputs = [fmt for fmt in (values.get("act_fmt"), *values["operands"].values()) if fmt is not None]
    if inputs:
        values["act_loss"] = draw(losses)
        if any(get_format(fmt).has_tensor_scale for fmt in inputs):
            values["act_amax"] = draw(st.sampled_from(["tensor", "token", "static"]))
    return Rule(draw(patterns), **values)


@pytest.mark.by_default(".Json", ".yaml")
@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ".YAML", ".Json"])
@given(rules=st.lists(rules_of_all_kinds(), max_size=4))
def test_files_give_back_the_rules(tmp_path_factory, suffix, rules):
    file = tmp_path_factory.mktemp("rules") / f"rules{suffix}"
    save_rules(rules, file)
    assert load_rules(file) == tuple(rules)
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_files_are_short_and_say_named_formats_by_name(tmp_path, suffix):
    file = tmp_path / f"rules{suffix}"
    save_rules([Rule("head", None), Rule(".*", FORMATS["if4"], MINE, block=8)], file)
    text = file.read_text()
    if suffix == ".yaml":
        assert text.startswith("- path: head\n  weight_fmt: null\n- path: .*\n  weight_fmt: if4\n  act_fmt:\n")
    else:
        assert json.loads(text)[0] == {"path": "head", "weight_fmt": None}
        assert json.loads(text)[1]["weight_fmt"] == "if4"
    assert text.endswith("\n") and "values" in text and "loss" not in text


def test_a_file_by_hand_may_use_all_of_yaml_but_aliases(tmp_path):
    file = tmp_path / "rules.yaml"
    record = json.dumps(MINE.to_dict())  # YAML's flow style
    file.write_text(
        "\ufeff# heads first\n"
        "- {path: '.*head', weight_fmt: ~}\n"
        f"- path: &any .*\n  module: [Dense, Conv]\n  act_fmt: {record}\n"
        f"- path: .*\n  operands: {{key: {record}, value: null}}\n",
        encoding="utf-8",
    )
    assert load_rules(file) == (
        Rule(".*head", None),
        Rule(".*", act_fmt=MINE, module=("Dense", "Conv")),
        Rule(".*", operands={"key": MINE}),
    )


# What follows the file's name, or with "..." at its end the beginning of that.
ALL_KEYS = (
    "act_amax, act_fmt, act_loss, act_search, axis, block, block_2d, damping, gptq, loss, module, operands, optional, "
    "path, recipe, rotate, search, smooth, weight_amax, weight_fmt"
)
NO_LIST = 'needs a list of rules, as in `- path: .*`, in JSON [{"path": ".*"}]'
NO_EXPRESSION = (
    "path is not a regular expression: missing ), unterminated subpattern at position 1, before '('. '.*' stands for "
    "anything, and re.escape(name) for a name as it is"
)
QUOTE = "Quote regular expressions: '[ab].*'"
ALIAS = "aliases (*name) are not for lists of rules: write the value out, and quote regular expressions: '[ab].*'"
NO_RECORD = "not a format record (see Format.to_dict): "

YAML_FAULTS = {
    "unknown key": (
        "- path: a\n  weight_format: if4\n",
        "rule 1: unknown key 'weight_format'; did you mean weight_fmt, weight_amax, act_fmt?",
    ),
    "far key": ("- path: a\n- path: a\n  zzz: 1\n", f"rule 2: unknown key 'zzz'; did you mean {ALL_KEYS}?"),
    "number as key": ("- path: a\n  3: 1\n", f"rule 1: unknown key 3; did you mean {ALL_KEYS}?"),
    "unknown format": (
        "- path: a\n- path: b\n  weight_fmt: if5\n",
        "rule 2, key 'weight_fmt': Rule('b'): weight_fmt: unknown format 'if5'; did you mean if6, if4, if3? See "
        "ifjax.FORMATS",
    ),
    "wrong type": (
        "- path: a\n  block: '8'\n",
        "rule 1, key 'block': Rule('a'): block must be an integer >= 1, or None for the format's own, got '8'",
    ),
    "bad value": (
        "# c\n\n- path: a\n  act_fmt: if4\n  search: slow\n",
        "rule 1, key 'search': Rule('a'): unknown search 'slow'; did you mean soar? See ifjax.codec.SEARCHES",
    ),
    "bad expression": ("- weight_fmt: if4\n  path: a(\n", f"rule 1, key 'path': Rule('a('): {NO_EXPRESSION}"),
    "no path": (
        "- path: a\n\n- block: 8\n", "rule 2: needs the key 'path', a regular expression: '.*' matches all",
    ),
    "no effect": (
        "- path: a\n  weight_fmt: null\n  block: 8\n",
        "rule 1, key 'block': Rule('a'): block=8 has no effect with weight_fmt=None, which excludes what matches: "
        "leave it out, or name a weight_fmt",
    ),
    "duplicate key": (
        "- path: a\n  block: 8\n  block: 16\n", "line 3: the key 'block' occurs twice: remove one",
    ),
    "duplicate on one line": ("- {path: a, path: b}\n", "line 1: the key 'path' occurs twice: remove one"),
    "duplicate inside": (
        "- path: a\n  operands:\n    key: if4\n    key: if3\n", "line 4: the key 'key' occurs twice: remove one",
    ),
    "unknown operand": (
        "- path: a\n  operands:\n    kye: if4\n",
        "rule 1, key 'operands': Rule('a'): operands are those of attention's products, not 'kye'; did you mean key?",
    ),
    "merge key": ("- &a {path: a}\n- <<: *a\n", f"line 2: {ALIAS}"),
    "not a format": (
        "- path: a\n  weight_fmt: {name: x}\n",
        f"rule 1, key 'weight_fmt': {NO_RECORD}KeyError('candidates') in {{'name': 'x'}}",
    ),
    "not a format inside": (
        "- path: a\n  operands:\n    key: {name: x}\n",
        f"rule 1, key 'operands': {NO_RECORD}KeyError('candidates') in {{'name': 'x'}}",
    ),
    "no mapping": ("- path: a\n- Dense_0\n", "rule 2: must be a mapping such as `path: .*`, got 'Dense_0'"),
    "no list": ("path: a\n", NO_LIST),
    "empty": ("# nothing\n", NO_LIST),
    "syntax": (
        "- path: a\n- path: [a-z]+\n", f"line 2: is not YAML: expected <block end>, but found '<scalar>'. {QUOTE}",
    ),
    "glob": ("- path: a\n- path: *Dense\n", f"line 2: {ALIAS}"),
    "no date": ("- path: 2001-13-45\n", "line 1: is not YAML: month must be in 1..12..."),
    "no integer": (
        "- path: a\n  block: !!int eight\n",
        "line 2: is not YAML: invalid literal for int() with base 10: 'eight' in 'eight': quote strings",
    ),
    "python object": (
        "- path: !!python/name:os.system\n",
        "line 1: is not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'. "
        f"{QUOTE}",
    ),
    "recursion": ("- path: a\n  operands: &a {key: *a}\n", f"line 2: {ALIAS}"),
    "deep": ("[" * 10_000, "is nested too deeply for a list of rules"),
    "control character": (
        "- path: a\n- path: '\x07'\n", f"line 2: is not YAML: special characters are not allowed. {QUOTE}",
    ),
    "two documents": (
        "- path: a\n---\n- path: b\n", f"line 2: is not YAML: but found another document. {QUOTE}",
    ),
}  # fmt: skip

JSON_FAULTS = {
    "unknown key": (
        '[\n {"path": "a",\n  "weight_format": "if4"}\n]',
        "rule 1: unknown key 'weight_format'; did you mean weight_fmt, weight_amax, act_fmt?",
    ),
    "unknown format": (
        '[{"path": "a"},\n {"path": "b", "weight_fmt":\n "if5"}]',
        "rule 2, key 'weight_fmt': Rule('b'): weight_fmt: unknown format 'if5'; did you mean if6, if4, if3? See "
        "ifjax.FORMATS",
    ),
    "wrong type": (
        '[{"path": "a",\n\n"block": [8]}]',
        "rule 1, key 'block': Rule('a'): block must be an integer >= 1, or None for the format's own, got [8]",
    ),
    "bad expression": ('[{"block": 8,\n "path": "a("}]', f"rule 1, key 'path': Rule('a('): {NO_EXPRESSION}"),
    "no path": (
        '[{"path": "a"},\n {"block": 8}]', "rule 2: needs the key 'path', a regular expression: '.*' matches all",
    ),
    "duplicate key": (
        '[{"path": "a",\n "block": 8,\n "block": 8}]',
        "the key 'block' occurs twice in {'path': 'a', 'block': 8}: remove one",
    ),
    "duplicate inside": (
        '[{"path": "a",\n "operands":\n {"key": "if4", "key": "if4"}}]',
        "the key 'key' occurs twice in {'key': 'if4'}: remove one",
    ),
    "no mapping": ('[{"path": "a"},\n "Dense_0"]', "rule 2: must be a mapping such as `path: .*`, got 'Dense_0'"),
    "no list": ('{"path": "a"}', NO_LIST),
    "syntax": ('[{"path": "a"},\n {"path" "b"}]', "line 2: is not JSON: Expecting ':' delimiter (column 10)"),
    "empty": ("", "line 1: is not JSON: Expecting value (column 1)"),
    "deep": ("[" * 100_000, "is nested too deeply for a list of rules"),
    "long number": ('[{"path": "a", "block": ' + "8" * 10_000 + "}]", "Exceeds the limit (4300 digits)..."),
    "no number": (
        '[\n{"path": "a", "weight_fmt": ' + json.dumps(MINE.to_dict()).replace('"step": 1.0', '"step": NaN') + "}]",
        "rule 1, key 'weight_fmt': step, scale_multiplier and peak must be numbers > 0, such as 1.0e-5, got nan",
    ),
    "extra in a format": (
        '[\n{"path": "a", "weight_fmt": ' + json.dumps(MINE.to_dict() | {"blocks": 8}) + "}]",
        f"rule 1, key 'weight_fmt': {NO_RECORD}"
        "TypeError(\"Format.__init__() got an unexpected keyword argument 'blocks'...",
    ),
    "step is a string": (
        '[\n{"path": "a", "act_fmt": '
        + json.dumps(FAKE_IF4.to_dict()).replace(f'"step": {6 / 7!r}', '"step": "1e-5"')
        + "}]",
        "rule 1, key 'act_fmt': step, scale_multiplier and peak must be numbers > 0, such as 1.0e-5, got '1e-5'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [pytest.param(".yaml", *fault, id=f"yaml: {name}") for name, fault in YAML_FAULTS.items()]
    + [pytest.param(".json", *fault, id=f"json: {name}") for name, fault in JSON_FAULTS.items()],
)
def test_an_error_names_file_rule_and_key(tmp_path, suffix, text, message):
    file = tmp_path / f"rules{suffix}"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        load_rules(file)
    given = str(caught.value).removeprefix(f"{file}: ")
    assert given != str(caught.value)
    if message.endswith("..."):
        assert given.startswith(message.removesuffix("..."))
    else:
        assert given == message


def test_a_file_must_be_text(tmp_path):
    file = tmp_path / "rules.json"
    file.write_bytes(b'[{"path":\n "\xff"}]')
    with pytest.raises(ValueError, match=f"^{re.escape(f'{file}: is not UTF-8 text: save it as UTF-8')}$"):
        load_rules(file)


@pytest.mark.parametrize("call", [load_rules, lambda file: save_rules([], file)])
def test_a_file_is_yaml_or_json(tmp_path, call):
    with pytest.raises(ValueError, match=r"\.yaml, \.yml or \.json files, got the suffix '\.toml'"):
        call(tmp_path / "rules.toml")


def test_what_cannot_be_read_or_written_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_rules(tmp_path / "none.yaml")
    with pytest.raises(FileNotFoundError, match=r"is not a folder: create it first: .*none'$") as caught:
        save_rules([], tmp_path / "none" / "rules.yaml")
    assert caught.value.filename == str(tmp_path / "none")


def test_code_is_not_saved(tmp_path):
    file = tmp_path / "rules.yaml"
    with pytest.raises(ValueError, match=r"Rule\('a'\): loss is a function, and files hold no code"):
        save_rules([Rule("a", loss=lambda x, y: abs(x - y).sum(-1))], file)
    with pytest.raises(ValueError, match=r"Rule\('a'\): act_loss is a function, and files hold no code"):
        save_rules([Rule("a", act_fmt="if4", act_loss=BlockLoss("cube", lambda e: abs(e) ** 3, max))], file)
    with pytest.raises(ValueError, match=r"Rule\('a'\): 'near' is a search of your own, .* ifjax\.codec\.SEARCHES"):
        save_rules([Rule("a", search=Search("near", (-1, 1)))], file)
    scale = dataclasses.replace(E4M3, name="mine")
    with pytest.raises(ValueError, match="the scale 'mine' has a dtype, which is code: leave it out, or register"):
        save_rules([Rule("a", dataclasses.replace(MINE, scale=scale))], file)
    with pytest.raises(ValueError, match="the scale 'in_halves' is code, which cannot be written down: register it"):
        save_rules([Rule("a", HALVES)], file)
    with pytest.raises(TypeError, match=r"save_rules needs a list of ifjax\.Rule, got str in it"):
        save_rules(["a"], file)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch, failing):
    file = tmp_path / "rules.yaml"
    save_rules([Rule("old")], file)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space left"):
        save_rules([Rule("new")], file)
    assert load_rules(file) == (Rule("old"),)
    assert os.listdir(tmp_path) == ["rules.yaml"]


@pytest.mark.skipif(os.name != "posix", reason="modes and links of files")
def test_a_file_keeps_its_mode_and_a_link_its_target(tmp_path):
    file, link = tmp_path / "rules.yaml", tmp_path / "link.yaml"
    save_rules([Rule("old")], file)
    file.chmod(0o640)
    link.symlink_to(file)
    save_rules([Rule("new")], link)
    assert link.is_symlink() and load_rules(file) == (Rule("new"),)
    assert file.stat().st_mode & 0o777 == 0o640


def test_json_needs_no_yaml_and_yaml_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    save_rules([Rule("a")], tmp_path / "rules.json")
    assert load_rules(tmp_path / "rules.json") == (Rule("a"),)
    with pytest.raises(ImportError, match=r"pip install pyyaml .* or keep them as \.json"):
        save_rules([Rule("a")], tmp_path / "rules.yaml")


# --- use


def test_rules_that_are_of_use_pass():
    check_used([Rule("lm_head", None), Rule("stem", None), Rule("moe/wi", axis=-2), Rule(".*")], PATHS)
    check_used(default_rules(), PATHS)
    check_used([Rule(".*/attention", None, operands={"key": "if4"})], PATHS)
    check_used([Rule(".*LayerNorm.*", None), *default_rules()], PATHS)
    check_used(default_rules(), [])


@pytest.mark.parametrize(
    ("rules", "messages"),
    [
        ([Rule(".*/mpl/Dense_0")],
         ["rule 1 ('.*/mpl/Dense_0') matches nothing: the closest paths are 'encoder/layer_0/mlp/Dense_0'"]),
        ([Rule("Dense_9")], ["the closest paths are 'encoder/layer_0/mlp/Dense_0', 'encoder/layer_0/mlp/Dense_1', "]),
        ([Rule("Dense_0")],
         ["matches nothing: a rule matches whole paths, and this is a part of 'encoder/layer_0/mlp/Dense_0'. Write "
          "'.*Dense_0'"]),
        ([Rule("Dense_1|Dense_0")], ["Write '.*(?:Dense_1|Dense_0)'"]),
        ([Rule("encoder")], ["'encoder/layer_0/LayerNorm_0' and 1 more. Write 'encoder.*'"]),
        ([Rule("stem", module="Dense")],
         ["('stem', module='Dense') matches nothing: the modules at such paths are of class 'Conv'. Write one"]),
        ([Rule(".*"), Rule("lm_head", None)],
         ["rule 2 ('lm_head') matches only what rule 1 ('.*') matched before it: move it to the front, or remove it"]),
        ([Rule("encoder/.*/LayerNorm_0")],
         ["matches only what cannot be quantized ('encoder/layer_0/LayerNorm_0': LayerNorm has no matmul): the closest "
          "paths are 'encoder/layer_0/mlp/Dense"]),
        ([Rule("moe/wi")], ["no module tells the contraction axis of its shape (8, 64, 128): pass model= and sample="]),
        ([Rule("moe/wi", axis=-4)], ["its shape (8, 64, 128) has no axis -4: give the rule axis=-3 or above"]),
        ([Rule("moe/wi", axis=-3)], ["'moe/wi': its contraction length 8 is below the block of 16 of if4"]),
        ([Rule("stem"), Rule("lm_head")],
         ["rule 1 ('stem') matches what is shorter than a block ('stem': its contraction length 3 is below the block "
          "of 16 of if4). Take shorter blocks, or put Rule('stem', weight_fmt=None) in front"]),
        ([Rule("lm_head", "if4", "if4", block=128)], ["64 is below the block of 128 of if4_bs128"]),
        ([Rule("lm_head", "if4", dataclasses.replace(MINE, block=128))], ["64 is below the block of 128 of mine"]),
        ([Rule("stem|lm_head")], ["the closest paths are 'lm_head'"]),
        ([Rule("lm_head", operands={"key": "if4"})],
         ["names operands ['key'] that nothing it matches multiplies: the closest paths are "
          "'encoder/layer_0/attention'"]),
        ([Rule("lm_head", None)], ["no rule quantizes anything", "'stem': no rule matches it", "Write Rule('.*')"]),
        ([], ["no rule quantizes anything"]),
        ([Rule("x" * 30), Rule("stem")], ["rule 1 (", "rule 2 ('stem')"]),
    ],
)  # fmt: skip
def test_rules_of_no_use_are_an_error(rules, messages):
    with pytest.raises(ValueError) as caught:
        check_used(rules, PATHS)
    for message in messages:
        assert message in str(caught.value)


def test_a_container_is_not_excluded_by_its_own_path():
    sites = [Site("head", "head", "Head", reason="holds no kernel"), dense("head/Dense_0")]
    with pytest.raises(
        ValueError, match=re.escape("excludes 'head', but not what is inside: 'head/Dense_0'")
    ) as caught:
        check_used([Rule("head", None), Rule(".*")], sites)
    assert str(caught.value).endswith("Write 'head/.*'")
    check_used([Rule("head(/.*)?", None), Rule(".*")], [*sites, dense("body")])


def test_an_optional_rule_may_be_of_no_use():
    rule = Rule("nothing", None, optional=True)
    check_used([rule, Rule(".*", optional=True)], PATHS)
    with pytest.raises(ValueError, match="matches nothing"):
        check_used([dataclasses.replace(rule, optional=False), Rule(".*", optional=True)], PATHS)
    with pytest.raises(ValueError, match="no rule quantizes anything"):
        check_used(default_rules(), [dense("stem", "Conv", 3)])


def test_a_model_without_modules_has_no_closest_path():
    with pytest.raises(ValueError, match="matches nothing: there is no other path"):
        check_used([Rule(".*")], [])


def test_the_reason_against_is_none_for_what_is_quantized():
    assert reason_against(Rule(".*"), PATHS[0]) is None
    assert reason_against(Rule(".*", axis=-2), PATHS[5]) is None
    assert reason_against(Rule("lm_head", None), PATHS[6]) == "the rule 'lm_head' excludes it"
    assert reason_against(Rule(".*"), PATHS[2]) == "LayerNorm has no matmul"
    assert reason_against(Rule(".*"), PATHS[3]) == "MultiHeadDotProductAttention cannot be quantized"
    assert reason_against(Rule(".*", block=64), PATHS[0]) is None
    assert "below the block" in str(reason_against(Rule(".*", block=65), PATHS[0]))
