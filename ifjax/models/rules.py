"""Quantization rules: which modules are quantized, to which format, and with which options.

A list of rules is searched from the top. The first rule that matches a module decides.
"""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from ifjax.codec import LOSSES, SEARCHES, BlockLoss, Encoding, Loss, Search
from ifjax.formats import FORMATS, Format, get_format
from ifjax.lookup import did_you_mean
from ifjax.models.patterns import UnsupportedPattern, check_pattern, fullmatch
from ifjax.numerics.orders import is_order, longest_run
from ifjax.training import RECIPES, Recipe, get_recipe

# The operands of attention's two products: query times key, and probabilities times value.
OPERANDS = ("query", "key", "probabilities", "value")


Operands = Mapping[str, str | Format | None] | tuple[tuple[str, str | Format | None], ...]


class RuleError(ValueError):
    """An invalid `Rule`. `field` names the field at fault; it is "" if none is."""

    def __init__(self, message: str, field: str = ""):
        super().__init__(message)
        self.field = field


@dataclasses.dataclass(frozen=True)
class Rule:
    """How to quantize the modules that the rule matches. Hashable; usable as a static jit argument.

    A module uses the options of the first rule that matches it and inherits none from later rules. A format that
    equals a registered one is stored by name, any other as a record.

    Attributes:
        path: regular expression that must match the whole '/'-joined path of the module, as in
            "encoder/layer_0/mlp/Dense_0"; "" is the model itself. A parameter that belongs to no known layer (a matrix
            of `self.param`, a leaf of a plain dictionary) is matched by its own path, such as "moe/wi".
        weight_fmt: name or record of the weights' format; None excludes the matched modules.
        act_fmt: format of the input activations; None leaves them unquantized (weight-only).
        module: class name, such as "Dense", or several; None for any class. A subclass is matched by its own name.
        loss: loss for the weights, as in `ifjax.quantize`. A rule with a function cannot be saved.
        search: search for the weights, as in `ifjax.quantize`.
        block: block length of the weights, in place of their format's. Activations keep the block of `act_fmt`.
        block_2d: square blocks for the weights, as in `ifjax.quantize`.
        weight_amax: "tensor": one amax per weight; stacked layers and experts have one each. "row": one per output
            (entry of the axes that are not contracted), for weights whose rows differ by more than the range of the
            format's scales. `Entry.flushed_share` of the report tells which these are.
        recipe: training recipe, a name or record from `ifjax.recipes`: how the products of the forward and backward
            pass are quantized. Training reads only this field, path, module and whether weight_fmt is None.
        gptq: round the weights with `ifjax.gptq` and the Hessians of `ifjax.calibrate`, instead of each value to
            nearest.
        damping: of gptq, as in `ifjax.gptq`. With few calibration rows a larger one than 0.01 can serve better.
        smooth: divide the product's inputs by one scale per channel and multiply the weights by it, before both are
            quantized. A number is SmoothQuant's alpha (0.5 in the paper); "awq" searches AWQ's scales, with
            this rule's formats and rotation. Needs `ifjax.calibrate`.
        rotate: rotate runs of inputs and weights along the contraction axis, after smoothing. A number is the run's
            length for `ifjax.hadamard`, such as 16; "whole" is the longest one that divides the axis: the whole axis if
            its length is a power of two, or one times 12, 20, 28 and others. "greedy" builds a rotation of one block
            from calibration (DuQuant++). Smoothing and rotation are folded into what makes the inputs where the model's
            program shows it. Otherwise inputs are changed at each call, and such weights run only under
            `ifjax.quantized`; notes of the report say which.
        act_loss: loss for activations and operands.
        act_search: search for activations and operands, at each call, as in `ifjax.quantize`.
        act_amax: source of the amax of activations and operands. "tensor": one amax of the current values (one per
            layer or expert if their stacked weights have one each). "token": one amax per row of the current values.
            "static": the amax from calibration.
        axis: contraction axis of parameters that belong to no known layer. It is negative so that it also holds for
            stacked layers: -2 for [in, out]. A known layer's own axis takes precedence.
        operands: formats of attention's operands, by name: "query", "key", "probabilities", "value". An operand that
            is missing or None stays unquantized. Given as a mapping, stored as pairs in this order.
        optional: `check_used` accepts a rule that matches nothing, and parameters shorter than a block.

    Raises:
        ValueError: a field is invalid or has no effect; the message says what to write instead.

    Example:
        >>> import ifjax
        >>> rule = ifjax.Rule(".*/mlp/.*", "if4", module="Dense", block=8)
        >>> rule.matches("encoder/layer_0/mlp/Dense_0", "Dense")
        True
        >>> rule.matches("encoder/layer_0/mlp", "MLP")
        False
        >>> rule.weight_format.name
        'if4_bs8'
    """

    path: str
    weight_fmt: str | Format | None = "if4"
    act_fmt: str | Format | None = None
    _: dataclasses.KW_ONLY
    module: str | Sequence[str] | None = None
    loss: Loss | None = None
    search: str | Search | None = None
    block: int | None = None
    block_2d: bool = False
    weight_amax: Literal["tensor", "row"] = "tensor"
    gptq: bool = False
    damping: float = 0.01
    recipe: str | Recipe | None = None
    smooth: float | Literal["awq"] | None = None
    rotate: int | Literal["greedy", "whole"] | None = None
    act_loss: Loss | None = None
    act_search: str | Search | None = None
    act_amax: Literal["tensor", "token", "static"] = "tensor"
    axis: int | None = None
    operands: Operands = ()
    optional: bool = False

    def __post_init__(self):
        self._check_path()
        self._check_module()
        for field in ("weight_fmt", "act_fmt"):
            self._set(field, self._named(field, getattr(self, field)))
        self._check_operands()
        self._check_recipe()
        for field in ("loss", "act_loss"):
            loss = getattr(self, field)
            known = isinstance(loss, str) and loss in LOSSES
            fits = loss is None or callable(loss) or isinstance(loss, BlockLoss) or known
            self._need(fits, field, f"one of {sorted(LOSSES)} or a function")
            self._set(field, LOSSES.name_of(loss) if isinstance(loss, BlockLoss) else loss)
        self._check_search()
        block_fits = self.block is None or (_is_int(self.block) and self.block >= 1)
        self._need(block_fits, "block", "an integer >= 1, or None for the format's own")
        for field in ("block_2d", "gptq", "optional"):
            self._need(isinstance(getattr(self, field), bool), field, "True or False")
        alpha_fits = isinstance(self.smooth, int | float) and not isinstance(self.smooth, bool)
        alpha_fits = alpha_fits and 0 <= float(self.smooth) <= 1  # pyright: ignore[reportArgumentType]
        self._need(self.smooth in (None, "awq") or alpha_fits, "smooth", "a number from 0 to 1, 'awq', or None")
        turns = self.rotate in (None, "greedy", "whole") or (_is_int(self.rotate) and is_order(self.rotate))
        self._need(turns, "rotate", "a power of two, or one times 12, 20, 28 ..; 'whole', 'greedy', or None")
        self._need(self.weight_amax in ("tensor", "row"), "weight_amax", "'tensor' or 'row'")
        amaxes = ("tensor", "token", "static")
        self._need(self.act_amax in amaxes, "act_amax", "'tensor', 'token' or 'static'")
        axis_fits = self.axis is None or (_is_int(self.axis) and self.axis < 0)
        self._need(axis_fits, "axis", "an integer < 0, counted from the last axis (-2 for a matrix [in, out])")
        is_number = isinstance(self.damping, int | float) and not isinstance(self.damping, bool)
        self._need(is_number and self.damping >= 0, "damping", "a number >= 0")
        if self.gptq and self.block_2d:
            raise self._error("gptq", "gptq feeds errors along one axis, and block_2d shares scales across: use one")
        if (self.smooth is not None or self.rotate is not None) and self.act_amax == "static":
            raise self._error("act_amax", "calibration sees inputs as they are before smoothing and rotation: use "
                              "act_amax='tensor' or 'token'")
        if self.weight_amax == "row" and self.block_2d:
            raise self._error("weight_amax", "block_2d shares scales across rows, which then have no amax of their "
                              "own: leave one out")
        if self.block_2d and self.axis is not None:
            self._need(self.axis >= -2, "axis", "-1 or -2, as block_2d takes squares of the last two axes")
        self._check_effects()
        for field, made_of_it in (("block", "weight_format"), ("block_2d", "weights")):
            try:
                getattr(self, made_of_it)
            except ValueError as error:
                raise self._error(field, f"{field}: {error}") from None

    @functools.cached_property
    def weights(self) -> Encoding | None:
        """Encoding of the weights; None if they are excluded."""
        fmt = self.weight_format
        return None if fmt is None else Encoding.of(fmt, loss=self.loss, search=self.search, block_2d=self.block_2d)

    @functools.cached_property
    def activations(self) -> Encoding | None:
        """Encoding of the activations; None for weight-only."""
        return None if self.act_fmt is None else Encoding.of(self.act_fmt, loss=self.act_loss, search=self.act_search)

    @functools.cached_property
    def operand_encodings(self) -> dict[str, Encoding]:
        """Encodings of attention's quantized operands, by name."""
        return {
            name: Encoding.of(fmt, loss=self.act_loss, search=self.act_search)
            for name, fmt in self.operand_formats.items()
        }

    @property
    def weight_format(self) -> Format | None:
        """Format record of the weights, with `block` applied and shown in its name; None if they are excluded."""
        if self.weight_fmt is None:
            return None
        fmt = get_format(self.weight_fmt)
        return fmt if self.block is None else _with_block(fmt, self.block)

    @property
    def activation_format(self) -> Format | None:
        """Format record of the activations; None for weight-only."""
        return None if self.act_fmt is None else get_format(self.act_fmt)

    @property
    def operand_formats(self) -> dict[str, Format]:
        """Format records of attention's quantized operands, by name."""
        return {name: get_format(fmt) for name, fmt in dict(self.operands).items() if fmt is not None}

    def rotation_run(self, length: int) -> int | None:
        """Return the length of the runs that are rotated on a contraction of this length; None without a rotation."""
        if self.rotate is None or self.weight_format is None:
            return None
        if self.rotate == "greedy":
            return self.weight_format.block
        return longest_run(length) if self.rotate == "whole" else int(self.rotate)

    @property
    def needs_inputs(self) -> bool:
        """Whether smoothing or rotation needs the calibrated inputs (gptq needs Hessians instead)."""
        return self.smooth is not None or self.rotate == "greedy"

    @property
    def excludes(self) -> bool:
        """Whether the rule leaves the modules that it matches unquantized."""
        return self.weight_fmt is None and not self.operands

    def matches(self, path: str, module: str | None = None) -> bool:
        """Return whether the whole path matches, and the class name if the rule has `module`."""
        if self.module is not None and module not in as_tuple(self.module):
            return False
        return fullmatch(self.path, path)

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)

    def _error(self, field: str, message: str) -> RuleError:
        return RuleError(f"Rule({self.path!r}): {message}", field)

    def _need(self, fits: bool, field: str, needed: str) -> None:
        if not fits:
            raise self._error(field, f"{field} must be {needed}, got {getattr(self, field)!r}")

    def _check_path(self) -> None:
        self._need(isinstance(self.path, str), "path", "a regular expression (a string)")
        try:
            check_pattern(self.path)
        except UnsupportedPattern as error:
            raise self._error("path", f"path {error}: paths are matched in polynomial time") from None
        except (re.error, OverflowError, RecursionError) as error:
            at = getattr(error, "pos", None)
            where = "" if at is None else f" at position {at}, before {self.path[at:]!r}"
            what = getattr(error, "msg", error)
            raise self._error(
                "path",
                f"path is not a regular expression: {what}{where}. '.*' stands for anything, and re.escape(name) for "
                "a name as it is",
            ) from None

    def _check_module(self) -> None:
        if isinstance(self.module, list):
            self._set("module", tuple(self.module))
        elif isinstance(self.module, set | frozenset):
            self._set("module", tuple(sorted(self.module, key=str)))
        if isinstance(self.module, type):
            raise self._error("module", f"module must be a class's name: write {self.module.__name__!r}")
        if self.module is None:
            return
        names = as_tuple(self.module) if isinstance(self.module, str | tuple) else ()
        fits = bool(names) and all(isinstance(name, str) and name.isidentifier() for name in names)
        self._need(fits, "module", "the name of a class alone, such as 'Dense', a tuple of names, or None for any")

    def _named(self, field: str, fmt: Any) -> str | Format | None:
        """Return the name of a registered format, the record of any other, None for None."""
        if fmt is None:
            return None
        try:
            fmt = get_format(fmt)
        except (TypeError, ValueError) as error:
            raise self._error(field, f"{field}: {error}") from None
        return FORMATS.name_of(fmt)

    def _check_operands(self) -> None:
        try:
            given = dict(self.operands)
        except (TypeError, ValueError):
            message = f"operands must map names to formats, as in {{'key': 'if4'}}, got {self.operands!r}"
            raise self._error("operands", message) from None
        for name in given:
            if name not in OPERANDS:
                near = did_you_mean(str(name), OPERANDS)
                raise self._error("operands", f"operands are those of attention's products, not {name!r}; {near}")
        pairs = tuple((name, self._named("operands", given[name])) for name in OPERANDS if given.get(name) is not None)
        self._set("operands", pairs)

    def _check_recipe(self) -> None:
        if self.recipe is None:
            return
        try:
            recipe = get_recipe(self.recipe)
        except (TypeError, ValueError) as error:
            raise self._error("recipe", str(error)) from None
        self._set("recipe", RECIPES.name_of(recipe))

    def _check_search(self) -> None:
        for field in ("search", "act_search"):
            search = getattr(self, field)
            if search is None:
                continue
            try:
                self._set(field, SEARCHES.name_of(SEARCHES.find(search)))
            except (TypeError, ValueError) as error:
                raise self._error(field, str(error)) from None

    def _check_effects(self) -> None:
        """Raise if an option is set that has no effect."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}

        def check(fields, reason):
            for field in fields:
                if getattr(self, field) != defaults[field]:
                    raise self._error(field, f"{field}={getattr(self, field)!r} has no effect {reason}")

        if self.weight_fmt is None:
            weight = (
                "act_fmt", "loss", "search", "block", "block_2d", "weight_amax", "gptq", "recipe", "smooth", "rotate",
                "axis",
            )  # fmt: skip
            check(weight, "with weight_fmt=None, which excludes what matches: leave it out, or name a weight_fmt")
        elif not get_format(self.weight_fmt).has_tensor_scale:
            check(("weight_amax",), f"on {get_format(self.weight_fmt).name}, which has no tensor scale: leave it out")
        if not self.gptq:
            check(("damping",), "without gptq: leave it out, or write gptq=True")
        formats = [fmt for fmt in (self.activation_format, *self.operand_formats.values()) if fmt is not None]
        if not formats:
            check(("act_loss", "act_search", "act_amax"), "without act_fmt: leave it out, or name an act_fmt")
        elif not any(fmt.has_tensor_scale for fmt in formats):
            check(("act_amax",), f"on {formats[0].name}, which has no tensor scale: leave it out")


def as_rules(rules: Iterable[Rule] | Rule | str | Format | None) -> tuple[Rule, ...]:
    """Return a tuple of rules: those given, or `default_rules` for a format (None: "if4")."""
    if rules is None or isinstance(rules, str | Format):
        return default_rules("if4" if rules is None else rules)
    rules = (rules,) if isinstance(rules, Rule) else tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"rules must be ifjax.Rule records, a format's name or None, got {type(rule).__name__}")
    return rules


def training_rules(rules: Iterable[Rule] | Rule | Recipe | str) -> tuple[Rule, ...]:
    """Return rules, at least one with a recipe. A recipe's name or record stands for `default_rules` with that recipe.

    Raises:
        ValueError: no rule has a recipe.
    """
    if isinstance(rules, Recipe | str):
        *others, everything = default_rules()
        return *others, dataclasses.replace(everything, recipe=get_recipe(rules))
    rules = as_rules(rules)
    if not any(rule.recipe is not None for rule in rules):
        raise ValueError("no rule has a recipe: write Rule('.*', recipe='if4'), or pass a recipe")
    return rules


def first_match(rules: Iterable[Rule], path: str, module: str | None = None) -> Rule | None:
    """Return the first rule that matches, which may be an excluding one; None if none does."""
    return next((rule for rule in rules if rule.matches(path, module)), None)


# Names that linen and NNX models, including those of transformers and of Flax's examples, give to their last matmul.
# Only whole names match: "head_0" and "decoder" are inner layers. BERT's pooler is an inner layer, too, because a
# classifier follows it.
_HEADS = (
    "lm_head", "generator_lm_head", "head", "output_head", "classification_head", "classifier", "cls", "logits",
    "logits_dense", "logitdense", "output_layer", "vocab_projector", "qa_outputs", "score",
)  # fmt: skip


# "output" is a head only at the top level, as in Meta's Llama: each layer of BERT has an "output" of its own.
_HEAD = rf"(?:.*/)?(?:{'|'.join(_HEADS)})(?:/.*)?|(?:model/|transformer/)?output"


_EMBEDDING = (
    r"(?:.*/)?(?:[^/]*(?i:embed)[^/]*|wte|wpe|(?:token|tok|word|pos|position|positional|type)_emb)(?:/.*)?|"
    r"(?:model/|transformer/)?(?:shared|emb)"
)


# Matrices that no product reads as weights, and routers. Only whole words of a name match. A projection is a weight in
# spite of such a word: "codebook_proj", "to_latents" and the layers of a "rotary_attention" are quantized.
_NAME = r"(?:.*/)?(?:[^/]*_)?"
_STATE_SPACE = (
    r"(?:.*/)?(?:[Aa](?:_b)?_logs?|dt_bias|D|Ds|D_b|log_dt|inv_dt|ssm_[adAD]|(?<=mixer/)A|(?<=mamba/)A|(?<=ssm/)A|(?:log_)?A_(?:log_)?(?:real|imag)|"
    r"Lambda_re|Lambda_im|time_(?:decay|first|faaaa|maa|mix|mix_(?:k|v|r|g|w)|maa_(?:k|v|r|g|w|x)))"
)
_TABLES = (
    _NAME + r"(?:rotary|rope|inv_freq|freqs|freqs_cis|(?:cos|sin)_cached|relative_position|rel_pos|rel_bias|"
    r"relative_attention_bias|bias_table|alibi|codebooks?|codevectors)(?:_[^/]*)?(?<!_proj)(?<!_dense)(?<!_linear)"
    r"(?:/(?:\d+|cos|sin|table|slopes|weight))*"
)
_LATENTS = (
    _NAME + r"(?<!to_)(?<!from_)(?:latents?(?:_(?:queries|query|tokens|array))?|(?:learned|object)_queries|"
    r"(?:query|cls|class|dist|mask|register|storage|readout|global)_tokens?)"
)
_ROUTER = (
    rf"(?:{_NAME}routers?|(?:.*/)?[^/]*Router|{_NAME}gate_logits)(?:_[^/]*)?(?:/.*)?|"
    r"(?:.*/)?(?:[^/]*(?i:moe)[^/]*|mlp|mixer|feed_forward|ffn|experts?)/gat(?:e|ing)|"
    r"(?:.*/)?(?:gate/wg|shared_expert_gate|gat(?:e|ing)_network(?:/.*)?)"
)

BY_DEFAULT = {  # the reasons that a report gives in place of these long patterns
    (_HEAD, None): "output heads stay, by default",
    (_EMBEDDING, None): "embeddings stay, by default",
    (".*", "Embed"): "a rule excludes modules of class Embed",
    (_STATE_SPACE, None): "parameters of state spaces stay, by default",
    (_TABLES, None): "tables of positions and codebooks stay, by default",
    (_LATENTS, None): "latents stay, by default",
    (_ROUTER, None): "routers stay, by default",
}


def default_rules(weight_fmt: str | Format = "if4", act_fmt: str | Format | None = None) -> tuple[Rule, ...]:
    """Return rules that quantize every matmul kernel except output heads, embeddings and routers.

    The papers do the same. They quantize all linear layers except embeddings and head (HiFloat4, arXiv 2602.11287)
    and keep these two in BF16 (NVFP4 pretraining, arXiv 2509.25149). The published IF4 and 4/6 code also excludes
    `lm_head`. None of them quantizes attention's products; set `Rule.operands` for that. Training also keeps the last
    blocks in BF16 (4 of 24 for IF4, arXiv 2603.28765); post-training quantization does not.

    Expert routers stay unquantized because a small error there changes which expert a token goes to. So do parameters
    that are not weights of a product: state-space parameters (A_log, dt_bias, D), tables of rotary and relative
    positions, codebooks and latents.

    Heads are recognized by name: lm_head, head, classifier, logits, output_layer and the like, and "output" at the top
    level. Embeddings are modules of class Embed, names that contain "embed" (patch projections too), wte, wpe, and
    "shared" at the top level. Routers, tables and latents are recognized by whole words. For other names, put a rule
    in front: (Rule("Dense_7", weight_fmt=None), *default_rules()).

    All the rules are optional: parameters shorter than a block and matrices of `self.param` stay unquantized.
    `Report.check` then requires a decision about these matrices: a rule with their axis, or a rule that excludes them.
    """
    excluded = (Rule(path, None, module=module, optional=True) for path, module in BY_DEFAULT)
    return *excluded, Rule(".*", weight_fmt, act_fmt, optional=True)


def _with_block(fmt: Format, block: int) -> Format:
    """Return fmt with another block length; its name gets a suffix, such as if4_bs8, unless a registered name fits."""
    name = re.sub(r"_bs\d+$", "", fmt.name)
    plain = dataclasses.replace(fmt, name=name, block=block)
    if block == fmt.block:
        return fmt
    return plain if FORMATS.get(name) == plain else dataclasses.replace(plain, name=f"{name}_bs{block}")


def as_tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return names as a tuple; a single string becomes a tuple of one."""
    return (names,) if isinstance(names, str) else tuple(names)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
