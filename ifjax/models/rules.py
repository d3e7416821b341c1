"""Rules: which modules are quantized, to which format, and how; read from and written to YAML and JSON.

A list of rules is searched from the top, and the first that matches a module decides.
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
from ifjax.numerics.hadamard import SIZES
from ifjax.training import RECIPES, Recipe, get_recipe

# Of attention's two products: query times key, and probabilities times value.
OPERANDS = ("query", "key", "probabilities", "value")


Operands = Mapping[str, str | Format | None] | tuple[tuple[str, str | Format | None], ...]


class RuleError(ValueError):
    """A rule that cannot be. `field` names the one at fault."""

    def __init__(self, message: str, field: str = ""):
        super().__init__(message)
        self.field = field


@dataclasses.dataclass(frozen=True)
class Rule:
    """How to quantize the modules that it matches. Hashable; usable as a static jit argument.

    Options belong to the one rule that matches first: nothing is inherited from later ones. Named formats are kept by
    their name, others as records, whichever way they are given.

    Attributes:
        path: a regular expression that must match the whole '/'-joined path of the module, as in
            "encoder/layer_0/mlp/Dense_0"; "" is the model itself. A parameter that no module explains (a matrix of
            `self.param`, a leaf of a plain dictionary) goes by its own path, such as "moe/wi".
        weight_fmt: a format's name or record; None excludes the matched modules.
        act_fmt: the format that activations take on the way in; None leaves them alone (weight-only).
        module: class name, such as "Dense", or several; any class unless given. Subclasses go by their own name.
        loss: of weights, as for `ifjax.quantize`. Rules with functions cannot be saved.
        search: of weights, as for `ifjax.quantize`.
        block: block length of the weights instead of their format's. Activations keep that of `act_fmt`.
        block_2d: of weights, as for `ifjax.quantize`.
        recipe: of training, a name or record of `ifjax.recipes`: what the products of forward and backward pass
            multiply. Only training goes by it, and by nothing else but path and module.
        gptq: round weights by `ifjax.gptq` with what `ifjax.calibrate` saw, instead of each to its nearest value.
        smooth: divide the product's inputs by a scale for each channel, and multiply the weights by it, before both are
            quantized: SmoothQuant's with this alpha (0.5), or "awq". Needs `ifjax.calibrate`.
        rotate: rotate runs of inputs and weights along the contraction, after smoothing: 16, 32, 64 or 128 by
            `ifjax.hadamard`; "greedy" by a rotation of a block that calibration makes (DuQuant++). Weights that are
            smoothed or rotated run through `ifjax.quantized` only.
        act_loss: of activations and operands.
        act_amax: amax of activations and operands: "tensor" and "token" take it from the values at hand, one for all
            (one for each layer or expert, where their weights in a stack have one each) or one for each row; "static"
            from calibration.
        axis: the contraction axis of parameters that no module explains, negative so that it holds for stacked layers
            too: -2 for [in, out]. Where a module explains a parameter, the module is followed.
        operands: formats for the operands of attention's products, by name: "query", "key" and "probabilities",
            "value". Those left out, or None, stay as they are. A mapping, kept as pairs in this order.
        optional: `check_used` accepts that the rule matches nothing, and that parameters are too short for a block.

    Raises:
        ValueError: a field that cannot be, or has no effect; the message says what to write instead.

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
    gptq: bool = False
    recipe: str | Recipe | None = None
    smooth: float | Literal["awq"] | None = None
    rotate: int | Literal["greedy"] | None = None
    act_loss: Loss | None = None
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
        turns = self.rotate in (None, "greedy") or (_is_int(self.rotate) and self.rotate in SIZES)
        self._need(turns, "rotate", f"one of {SIZES}, 'greedy', or None")
        amaxes = ("tensor", "token", "static")
        self._need(self.act_amax in amaxes, "act_amax", "'tensor', 'token' or 'static'")
        axis_fits = self.axis is None or (_is_int(self.axis) and self.axis < 0)
        self._need(axis_fits, "axis", "an integer < 0, counted from the last axis (-2 for a matrix [in, out])")
        if self.gptq and self.block_2d:
            raise self._error("gptq", "gptq feeds errors along one axis, and block_2d shares scales across: use one")
        if (self.smooth is not None or self.rotate is not None) and self.act_amax == "static":
            raise self._error("act_amax", "calibration sees inputs as they are before smoothing and rotation: use "
                              "act_amax='tensor' or 'token'")
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
        """How weights are encoded; None if they are excluded."""
        fmt = self.weight_format
        return None if fmt is None else Encoding.of(fmt, loss=self.loss, search=self.search, block_2d=self.block_2d)

    @functools.cached_property
    def activations(self) -> Encoding | None:
        """How activations are encoded; None for weight-only."""
        return None if self.act_fmt is None else Encoding.of(self.act_fmt, loss=self.act_loss)

    @functools.cached_property
    def operand_encodings(self) -> dict[str, Encoding]:
        """How the operands of attention's products are encoded, of those that are."""
        return {name: Encoding.of(fmt, loss=self.act_loss) for name, fmt in self.operand_formats.items()}

    @property
    def weight_format(self) -> Format | None:
        """The weights' record, with `block` put in and a name that says so; None if they are excluded."""
        if self.weight_fmt is None:
            return None
        fmt = get_format(self.weight_fmt)
        return fmt if self.block is None else _with_block(fmt, self.block)

    @property
    def activation_format(self) -> Format | None:
        """The activations' record; None for weight-only."""
        return None if self.act_fmt is None else get_format(self.act_fmt)

    @property
    def operand_formats(self) -> dict[str, Format]:
        """Records of the operands of attention's products that are quantized."""
        return {name: get_format(fmt) for name, fmt in dict(self.operands).items() if fmt is not None}

    @property
    def rotation_block(self) -> int | None:
        """The run that is rotated; None without a rotation."""
        if self.rotate is None or self.weight_format is None:
            return None
        return self.weight_format.block if self.rotate == "greedy" else int(self.rotate)

    @property
    def needs_inputs(self) -> bool:
        """Whether weights are changed by what calibration has seen of the inputs, besides gptq."""
        return self.smooth is not None or self.rotate == "greedy"

    @property
    def excludes(self) -> bool:
        """Whether the rule is there to leave alone what it matches."""
        return self.weight_fmt is None and not self.operands

    def matches(self, path: str, module: str | None = None) -> bool:
        """Whether the whole path matches, and the class's name where the rule asks for one."""
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
        """The name of a named format, the record of any other."""
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
        if self.search is None:
            return
        try:
            self._set("search", SEARCHES.name_of(SEARCHES.find(self.search)))
        except (TypeError, ValueError) as error:
            raise self._error("search", str(error)) from None

    def _check_effects(self) -> None:
        """No option is given in vain."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}

        def check(fields, reason):
            for field in fields:
                if getattr(self, field) != defaults[field]:
                    raise self._error(field, f"{field}={getattr(self, field)!r} has no effect {reason}")

        if self.weight_fmt is None:
            weight = ("act_fmt", "loss", "search", "block", "block_2d", "gptq", "recipe", "smooth", "rotate", "axis")
            check(weight, "with weight_fmt=None, which excludes what matches: leave it out, or name a weight_fmt")
        formats = [fmt for fmt in (self.activation_format, *self.operand_formats.values()) if fmt is not None]
        if not formats:
            check(("act_loss", "act_amax"), "without act_fmt: leave it out, or name an act_fmt")
        elif not any(fmt.has_tensor_scale for fmt in formats):
            check(("act_amax",), f"on {formats[0].name}, which has no tensor scale: leave it out")


def as_rules(rules: Iterable[Rule] | Rule | str | Format | None) -> tuple[Rule, ...]:
    """A list of rules, from one rule, or the default ones for a format (None: if4)."""
    if rules is None or isinstance(rules, str | Format):
        return default_rules("if4" if rules is None else rules)
    rules = (rules,) if isinstance(rules, Rule) else tuple(rules)
    for rule in rules:
        if not isinstance(rule, Rule):
            raise TypeError(f"rules must be ifjax.Rule records, a format's name or None, got {type(rule).__name__}")
    return rules


def training_rules(rules: Iterable[Rule] | Rule | Recipe | str) -> tuple[Rule, ...]:
    """Rules of which some have a recipe; a recipe alone, by name or record, stands for `default_rules` with it.

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
    """The first rule that matches, which may be one that excludes; None if none does."""
    return next((rule for rule in rules if rule.matches(path, module)), None)


# Names by which linen and NNX models (those of transformers and Flax's examples among them) call their last matmul.
# Whole names only: "head_0" and "decoder" are inner layers. BERT's pooler is one too: a classifier follows it.
_HEADS = (
    "lm_head", "generator_lm_head", "head", "output_head", "classification_head", "classifier", "cls", "logits",
    "logits_dense", "logitdense", "output_layer", "vocab_projector", "qa_outputs", "score",
)  # fmt: skip


# "output" is a head at the top only, as Meta's Llama has it: BERT's layers have one each.
_HEAD = rf"(?:.*/)?(?:{'|'.join(_HEADS)})(?:/.*)?|(?:model/|transformer/)?output"


_EMBEDDING = (
    r"(?:.*/)?(?:[^/]*(?i:embed)[^/]*|wte|wpe|(?:token|tok|word|pos|position|positional|type)_emb)(?:/.*)?|"
    r"(?:model/|transformer/)?(?:shared|emb)"
)


# Matrices that no product reads as weights, or that decide. Whole words of a name count, and a projection of such a
# thing is none: "codebook_proj", "to_latents" and the layers of a "rotary_attention" are weights.
_NAME = r"(?:.*/)?(?:[^/]*_)?"
_STATE_SPACE = (
    r"(?:.*/)?(?:[Aa](?:_b)?_logs?|dt_bias|D|Ds|D_b|log_dt|inv_dt|ssm_[ad]|(?:log_)?A_(?:log_)?(?:real|imag)|"
    r"Lambda_re|Lambda_im|time_(?:decay|first|faaaa|maa|mix|mix_(?:k|v|r|g|w)|maa_(?:k|v|r|g|w|x)))"
)
_TABLES = (
    _NAME + r"(?:rotary|rope|inv_freq|freqs|freqs_cis|(?:cos|sin)_cached|relative_position|rel_pos|rel_bias|"
    r"relative_attention_bias|bias_table|codebooks?|codevectors)(?:_[^/]*)?(?<!_proj)(?<!_dense)(?<!_linear)"
    r"(?:/(?:\d+|cos|sin|table|weight))*"
)
_LATENTS = _NAME + r"(?<!to_)(?<!from_)(?:latents?(?:_(?:queries|query|tokens|array))?|query_tokens|learned_queries)"
_ROUTER = (
    rf"(?:{_NAME}routers?|(?:.*/)?[^/]*Router|{_NAME}gate_logits)(?:_[^/]*)?(?:/.*)?|"
    r"(?:.*/)?(?:[^/]*(?i:moe)[^/]*|mlp|mixer|feed_forward|ffn|experts?)/gate|(?:.*/)?(?:gate/wg|shared_expert_gate)"
)

BY_DEFAULT = {  # what a report says of them, instead of such patterns
    (_HEAD, None): "output heads stay, by default",
    (_EMBEDDING, None): "embeddings stay, by default",
    (".*", "Embed"): "a rule excludes modules of class Embed",
    (_STATE_SPACE, None): "parameters of state spaces stay, by default",
    (_TABLES, None): "tables of positions and codebooks stay, by default",
    (_LATENTS, None): "latents stay, by default",
    (_ROUTER, None): "routers stay, by default",
}


def default_rules(weight_fmt: str | Format = "if4", act_fmt: str | Format | None = None) -> tuple[Rule, ...]:
    """Every matmul kernel, except those of the output head and of embeddings, which stay in high precision.

    As in the papers: all linear layers but embeddings and head (HiFloat4, arXiv 2602.11287), these two in BF16
    (NVFP4 pretraining, arXiv 2509.25149); the published IF4 and 4/6 code leaves `lm_head` out, too. Attention's
    products stay as they are there as well (`Rule.operands` asks for them). Training also keeps the last blocks in
    BF16 (4 of 24 for IF4, arXiv 2603.28765), quantization after it does not.

    Routers of experts stay, too, as a small error there changes which expert a token goes to; and what is no weight of
    a product: parameters of state spaces (A_log, dt_bias, D), tables of rotary and relative positions, codebooks,
    latents.

    A head is known by name: lm_head, head, classifier, logits, output_layer and the like, and "output" at the top.
    Embeddings are the modules of class Embed, and whatever has "embed" in its name (patch projections too), or is
    called wte or wpe, and "shared" at the top. Routers, tables and latents are known by whole words. Other names
    need a rule of their own in front: (Rule("Dense_7", weight_fmt=None), *default_rules()).

    All are optional: parameters shorter than a block, and matrices of `self.param`, stay as they are. Of the matrices
    `Report.check` asks for a decision: a rule with their axis, or one that excludes them.
    """
    excluded = (Rule(path, None, module=module, optional=True) for path, module in BY_DEFAULT)
    return *excluded, Rule(".*", weight_fmt, act_fmt, optional=True)


def _with_block(fmt: Format, block: int) -> Format:
    """fmt with other blocks: the named record where there is one, such as if4_bs8."""
    name = re.sub(r"_bs\d+$", "", fmt.name)
    plain = dataclasses.replace(fmt, name=name, block=block)
    if block == fmt.block:
        return fmt
    return plain if FORMATS.get(name) == plain else dataclasses.replace(plain, name=f"{name}_bs{block}")


def as_tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    """One name, or several."""
    return (names,) if isinstance(names, str) else tuple(names)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
