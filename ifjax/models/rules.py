"""Rules: which modules are quantized, to which format, and how; read from and written to YAML and JSON.

A list of rules is searched from the top, and the first that matches a module decides.
"""

import contextlib
import dataclasses
import difflib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from ifjax import codec
from ifjax.arrays.qtensor import Search
from ifjax.formats import FORMATS, Format, get_format
from ifjax.training.recipes import RECIPES, Recipe, get_recipe

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
        act_loss: of activations and operands.
        act_amax: amax of activations and operands: "tensor" and "token" take it from the values at hand, one for all
            or one for each row; "static" from calibration.
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
    loss: codec.Loss | None = None
    search: Search | None = None
    block: int | None = None
    block_2d: bool = False
    gptq: bool = False
    recipe: str | Recipe | None = None
    act_loss: codec.Loss | None = None
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
            known = isinstance(loss, str) and loss in codec.LOSSES
            self._need(loss is None or callable(loss) or known, field, f"one of {sorted(codec.LOSSES)} or a function")
        self._need(self.search in (None, "fast", "exhaustive"), "search", "None, 'fast' or 'exhaustive'")
        block_fits = self.block is None or (_is_int(self.block) and self.block >= 1)
        self._need(block_fits, "block", "an integer >= 1, or None for the format's own")
        for field in ("block_2d", "gptq", "optional"):
            self._need(isinstance(getattr(self, field), bool), field, "True or False")
        amaxes = ("tensor", "token", "static")
        self._need(self.act_amax in amaxes, "act_amax", "'tensor', 'token' or 'static'")
        axis_fits = self.axis is None or (_is_int(self.axis) and self.axis < 0)
        self._need(axis_fits, "axis", "an integer < 0, counted from the last axis (-2 for a matrix [in, out])")
        if self.gptq and self.block_2d:
            raise self._error("gptq", "gptq feeds errors along one axis, and block_2d shares scales across: use one")
        if self.block_2d and self.axis is not None:
            self._need(self.axis >= -2, "axis", "-1 or -2, as block_2d takes squares of the last two axes")
        self._check_effects()

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
    def excludes(self) -> bool:
        """Whether the rule is there to leave alone what it matches."""
        return self.weight_fmt is None and not self.operands

    def matches(self, path: str, module: str | None = None) -> bool:
        """Whether the whole path matches, and the class's name where the rule asks for one."""
        if self.module is not None and module not in _as_tuple(self.module):
            return False
        return re.fullmatch(self.path, path) is not None

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
            re.compile(self.path)
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
        if isinstance(self.module, type):
            raise self._error("module", f"module must be a class's name: write {self.module.__name__!r}")
        if self.module is None:
            return
        names = _as_tuple(self.module)
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
        return fmt.name if FORMATS.get(fmt.name) == fmt else fmt

    def _check_operands(self) -> None:
        try:
            given = dict(self.operands)
        except (TypeError, ValueError):
            message = f"operands must map names to formats, as in {{'key': 'if4'}}, got {self.operands!r}"
            raise self._error("operands", message) from None
        for name in given:
            if name not in OPERANDS:
                near = _did_you_mean(str(name), OPERANDS)
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
        self._set("recipe", recipe.name if RECIPES.get(recipe.name) == recipe else recipe)

    def _check_effects(self) -> None:
        """No option is given in vain."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}

        def check(fields, reason):
            for field in fields:
                if getattr(self, field) != defaults[field]:
                    raise self._error(field, f"{field}={getattr(self, field)!r} has no effect {reason}")

        if self.weight_fmt is None:
            weight = ("act_fmt", "loss", "search", "block", "block_2d", "gptq", "recipe", "axis")
            check(weight, "with weight_fmt=None, which excludes what matches: leave it out, or name a weight_fmt")
        formats = [fmt for fmt in (self.activation_format, *self.operand_formats.values()) if fmt is not None]
        if not formats:
            check(("act_loss", "act_amax"), "without act_fmt: leave it out, or name an act_fmt")
        elif all(fmt.scale.largest is None for fmt in formats):
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
_HEAD = rf"(?:.*/)?(?:{'|'.join(_HEADS)})(?:/.*)?"
_EMBEDDING = r"(?:.*/)?(?:[^/]*(?i:embed)[^/]*|wte|wpe)(?:/.*)?"
_BY_DEFAULT = {  # what a report says of them, instead of such patterns
    (_HEAD, None): "output heads stay, by default",
    (_EMBEDDING, None): "embeddings stay, by default",
    (".*", "Embed"): "a rule excludes modules of class Embed",
}


def default_rules(weight_fmt: str | Format = "if4", act_fmt: str | Format | None = None) -> tuple[Rule, ...]:
    """Every matmul kernel, except those of the output head and of embeddings, which stay in high precision.

    As in the papers: all linear layers but embeddings and head (HiFloat4, arXiv 2602.11287), these two in BF16
    (NVFP4 pretraining, arXiv 2509.25149); the published IF4 and 4/6 code leaves `lm_head` out, too. Attention's
    products stay as they are there as well (`Rule.operands` asks for them). Training also keeps the last blocks in
    BF16 (4 of 24 for IF4, arXiv 2603.28765), quantization after it does not.

    A head is known by name: lm_head, head, classifier, logits, output_layer and the like. Embeddings are the modules
    of class Embed, and whatever has "embed" in its name (patch projections too), or is called wte or wpe. Other names
    need a rule of their own in front: (Rule("Dense_7", weight_fmt=None), *default_rules()).

    All are optional: parameters shorter than a block, and matrices of `self.param`, stay as they are. Of the matrices
    `Report.check` asks for a decision: a rule with their axis, or one that excludes them.
    """
    excluded = (Rule(path, None, module=module, optional=True) for path, module in _BY_DEFAULT)
    return *excluded, Rule(".*", weight_fmt, act_fmt, optional=True)


LOOKUP = "it looks rows up and multiplies nothing"


class Kernel(NamedTuple):
    """A parameter that a model multiplies by, as a walk over the model found it.

    Attributes:
        parameter: '/'-joined path in the tree of parameters; of a module without a kernel its own path.
        path: of the module.
        module: the class's name.
        axes: those that are contracted, negative.
        stacked: those along which layers were stacked, by nn.scan or nn.vmap, negative.
        unfit_for: why its activations cannot be quantized; None if they can.
        reason: why nothing of it can be quantized; None if it can.
        operands: which of OPERANDS the module multiplies.
        note: what else a report should say.
        training: why no recipe applies; None if one does.
    """

    parameter: str
    path: str
    module: str | None = None
    axes: tuple[int, ...] = ()
    stacked: tuple[int, ...] = ()
    unfit_for: str | None = None
    reason: str | None = None
    operands: tuple[str, ...] = ()
    note: str | None = None
    training: str | None = None


def blocked_axis(axes: Sequence[int], shape: tuple[int, ...], block: int) -> int:
    """Which of a kernel's contracted axes blocks lie along: the last that is no shorter than one.

    For what it is multiplied by: the same, if the axes come in the kernel's order.
    """
    return axes[max(range(len(axes)), key=lambda i: (shape[axes[i]] >= block, i))]


class Walk(NamedTuple):
    """What a walk over a model showed.

    Attributes:
        kernels: by the parameter's path.
        modules: class names of modules, by path.
        reached: for the path of each parameter that was read, the axes along which layers are stacked, negative.
        reasons: why a parameter is no kernel, by path, where the model tells.
    """

    kernels: dict[str, Kernel]
    modules: dict[str, str]
    reached: dict[str, tuple[int, ...]]
    reasons: dict[str, str]


def innermost(path: str, modules: Mapping[str, str]) -> str | None:
    """The class of the module around a parameter; lists and dictionaries of parameters may lie between."""
    while path and path not in modules:
        path = path.rpartition("/")[0]
    return modules.get(path)


def join_path(keys: Iterable[Any]) -> str:
    """'/'-joined names: of a module's path, or of a key path in a tree."""
    return "/".join(key if isinstance(key, str) else jax.tree_util.keystr((key,), simple=True) for key in keys)


# --- were the rules of use? ------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What a walk over a model found: one record for each module with parameters or products of its own.

    Attributes:
        path: '/'-joined. Of a parameter that no module explains, its own name included.
        module: the class's name; None where there is no module.
        quantizable: whether its kernel can be quantized at all.
        reason: why not, as in "LayerNorm has no matmul".
        length: of the contraction, as far as known.
        raw_shape: of a parameter that no module explains, whose contraction axis is the rule's.
        operands: which of OPERANDS it multiplies.
    """

    path: str
    module: str | None = None
    quantizable: bool = True
    reason: str | None = None
    length: int | None = None
    raw_shape: tuple[int, ...] | None = None
    operands: tuple[str, ...] = ()


def without_matmul(modules: Mapping[str, str], seen: Iterable[Seen]) -> list[Seen]:
    """Records of the modules, by path and class, that `seen` has none of: rules may name them, too."""
    known = {s.path for s in seen}
    return [Seen(path, name, False, f"{name} has no matmul of its own")
            for path, name in modules.items() if path not in known]  # fmt: skip


def seen_in_training(kernel: Kernel) -> Seen:
    """Lengths do not matter there: the last block of any is filled up."""
    reason = kernel.reason or kernel.training
    return Seen(kernel.path, kernel.module, reason is None, reason)


def reason_against(rule: Rule, seen: Seen) -> str | None:
    """Why the rule leaves the kernel of what it matches alone; None if it quantizes it."""
    if rule.weight_fmt is None:
        return _BY_DEFAULT.get((rule.path, rule.module)) or f"the rule {rule.path!r} excludes it"
    return _unfit(rule, seen) or _too_short(rule, seen)


def check_used(rules: Sequence[Rule], seen: Sequence[Seen]) -> None:
    """Raise if a rule is of no use on the model that was seen: all faults in one message, with the closest paths.

    A rule that is not optional must decide for something: something that can be quantized, and is no shorter than a
    block. One that excludes may match anything but a mere container whose inner modules are quantized all the same.
    All rules together must quantize something, unless nothing was seen.

    Raises:
        ValueError: one of these does not hold; the message says what to write instead.
    """
    seen = tuple(dict.fromkeys(seen))
    matches = [[rule.matches(s.path, s.module) for s in seen] for rule in rules]
    owners = [next((i for i in range(len(rules)) if matches[i][k]), None) for k in range(len(seen))]
    decided = {s: rules[i] for s, i in zip(seen, owners, strict=True) if i is not None}

    faults = []
    for i, rule in enumerate(rules):
        if rule.optional:
            continue
        matched = [s for s, match in zip(seen, matches[i], strict=True) if match]
        own = [s for s, owner in zip(seen, owners, strict=True) if owner == i]
        if not matched:
            found = [f"matches nothing: {_near_misses(rule, seen)}"]
        elif not own:
            earlier = sorted({k for k, match in zip(owners, matches[i], strict=True) if match and k is not None})
            paths = " and ".join(f"rule {k + 1} ({rules[k].path!r})" for k in earlier)
            found = [f"matches only what {paths} matched before it: move it to the front, or remove it"]
        elif rule.excludes:
            found = list(_faults_of_exclusion(own, decided))
        else:
            found = list(_faults_of_use(rule, own, seen))
        faults += [f"rule {i + 1} ({rule.path!r}{_of_class(rule)}) {fault}" for fault in found]
    if not faults and seen and not any(_is_used(rule, s) for s, rule in decided.items()):
        faults.append(_nothing_used(decided, seen))
    if faults:
        raise ValueError("\n".join(faults))


def _faults_of_exclusion(own: list[Seen], decided: dict[Seen, Rule]) -> Iterator[str]:
    inner = [t.path for t, rule in decided.items() if _is_used(rule, t) and any(_is_inside(t, s) for s in own)]
    if inner and not any(s.quantizable or s.operands for s in own):
        path = re.escape(own[0].path)
        yield (
            f"excludes {_listed(s.path for s in own)}, but not what is inside: {_listed(inner)} would be quantized. "
            f"Write {(path + '/.*' if path else '.*')!r}"
        )


def _faults_of_use(rule: Rule, own: list[Seen], seen: Sequence[Seen]) -> Iterator[str]:
    fits = [s for s in own if rule.weight_fmt is not None and _unfit(rule, s) is None]
    multiplied = {name for s in own for name in s.operands}
    missing = [name for name in rule.operand_formats if name not in multiplied]
    if missing:
        have = [s.path for s in seen if set(s.operands) & set(missing)]
        why = "".join(f" ({s.path!r}: {s.reason})" for s in own if s.reason is not None and not s.quantizable)
        yield f"names operands {missing} that nothing it matches multiplies{why}: {_closest(rule, have)}"
    elif not fits and not rule.operands:
        why = "; ".join(f"{s.path!r}: {_unfit(rule, s)}" for s in own[:3])
        others = [s.path for s in seen if _unfit(rule, s) is None]
        yield f"matches only what cannot be quantized ({why}): {_closest(rule, others)}"
    short = [s for s in fits if _too_short(rule, s)]
    if short:
        why = "; ".join(f"{s.path!r}: {_too_short(rule, s)}" for s in short[:3])
        others = [s.path for s in fits if s not in short]
        yield (
            f"matches what is shorter than a block ({why}){f': {_closest(rule, others)}' if others else ''}. Take "
            f"shorter blocks, or put Rule({re.escape(short[0].path)!r}, weight_fmt=None) in front"
        )


def _nothing_used(decided: dict[Seen, Rule], seen: Sequence[Seen]) -> str:
    reasons = [
        f"{s.path!r}: " + (str(reason_against(decided[s], s)) if s in decided else "no rule matches it")
        for s in seen[:5]
    ]
    return (
        f"no rule quantizes anything ({'; '.join(reasons)}{'; ...' if len(seen) > 5 else ''}). "
        "Write Rule('.*') as the last one to take whatever no rule before it matches"
    )


def _is_used(rule: Rule, s: Seen) -> bool:
    return reason_against(rule, s) is None or any(name in s.operands for name in rule.operand_formats)


def _unfit(rule: Rule, s: Seen) -> str | None:
    if not s.quantizable:
        return s.reason or f"{s.module or 'it'} cannot be quantized"
    if s.raw_shape is None:
        return None
    if rule.axis is None:
        return f"no module tells the contraction axis of its shape {s.raw_shape}: give the rule axis=-2 for [in, out]"
    if -rule.axis > len(s.raw_shape):
        return f"its shape {s.raw_shape} has no axis {rule.axis}: give the rule axis={-len(s.raw_shape)} or above"
    return None


def _too_short(rule: Rule, s: Seen) -> str | None:
    length = s.length
    if s.raw_shape is not None and rule.axis is not None:
        length = s.raw_shape[rule.axis]
    for fmt in (rule.weight_format, rule.activation_format):
        if fmt is not None and length is not None and length < fmt.block:
            return f"its contraction length {length} is below the block of {fmt.block} of {fmt.name}"
    return None


def _is_inside(inner: Seen, outer: Seen) -> bool:
    return inner.path != outer.path and inner.path.startswith(f"{outer.path}/" if outer.path else "")


def _near_misses(rule: Rule, seen: Sequence[Seen]) -> str:
    """What a rule that matches nothing may have meant."""
    paths = [s.path for s in seen if rule.module is None or s.module in _as_tuple(rule.module)]
    classes = {s.module for s in seen if s.module is not None and re.fullmatch(rule.path, s.path)}
    if classes:
        return f"the modules at such paths are of class {_listed(sorted(classes))}. Write one of these as module="
    part = f"(?:{rule.path})" if "|" in rule.path else rule.path
    for wider in (f".*{part}", f"{part}.*", f".*{part}.*"):
        with contextlib.suppress(re.error):  # flags such as (?i) must stand in front
            parts = [path for path in paths if re.fullmatch(wider, path)]
            if parts:
                return f"a rule matches whole paths, and this is a part of {_listed(parts)}. Write {wider!r}"
    return _closest(rule, paths or [s.path for s in seen])


def _closest(rule: Rule, paths: Iterable[str]) -> str:
    plain = re.sub(r"\\[dDwWsSbB]|\.[*+]|[^\w/.-]", "", rule.path).strip("/")
    parts = plain.count("/") + 1

    def likeness(path):  # of the whole path or of as many parts at its end
        ends = path, "/".join(path.split("/")[-parts:])
        return max(difflib.SequenceMatcher(None, plain, end).ratio() for end in ends)

    near = sorted(dict.fromkeys(paths), key=likeness, reverse=True)[:3]
    return f"the closest paths are {_listed(near)}" if near else "there is no other path"


def _listed(paths: Iterable[str]) -> str:
    paths = list(paths)
    return ", ".join(map(repr, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")


def _of_class(rule: Rule) -> str:
    return "" if rule.module is None else f", module={rule.module!r}"


# --- files -----------------------------------------------------------------------------------------------------------


def load_rules(path: str | os.PathLike) -> tuple[Rule, ...]:
    """Rules from a YAML (.yaml, .yml) or JSON file: a list of mappings from `Rule`'s fields to values.

    A format is a name or a record as `Format.to_dict` gives it, `operands` a mapping, `module` a name or a list.

    Raises:
        ValueError: the file does not hold rules; the message names file, line and key, and what to write instead.
        OSError: the file cannot be read.

    Example:
        >>> import pathlib, tempfile
        >>> import ifjax
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder) / "rules.yaml"
        ...     _ = file.write_text('''
        ... - path: .*/lm_head
        ...   weight_fmt: null  # excluded
        ... - path: .*
        ...   weight_fmt: if4
        ...   search: fast
        ... ''')
        ...     head, rest = ifjax.load_rules(file)
        >>> head.excludes, rest.search
        (True, 'fast')
    """
    path = Path(path)
    read = _read_json if _suffix(path) == ".json" else _read_yaml
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: is not UTF-8 text: save it as UTF-8") from None
    try:
        return tuple(_rule_of(entry) for entry in read(text))
    except _FileFault as fault:
        raise ValueError(f"{path}:{fault.line}: {fault.message}") from None
    except RecursionError:
        raise ValueError(f"{path}:1: is nested too deeply for a list of rules") from None


def save_rules(rules: Iterable[Rule], path: str | os.PathLike) -> None:
    """Write rules for `load_rules`, as YAML or JSON by the suffix. The file is written whole, or stays as it was.

    Raises:
        ValueError: a suffix of neither, or a rule with a loss or a format's scale that is code.
        TypeError: something that is no Rule.
        OSError: the file cannot be written.
    """
    path = Path(path)
    suffix = _suffix(path)
    # Through JSON both ways: YAML, too, is handed plain lists, numbers and strings.
    text = json.dumps([_record_of(rule) for rule in rules], indent=2) + "\n"
    if suffix != ".json":
        text = _yaml().safe_dump(json.loads(text), sort_keys=False, width=math.inf)
    _write_whole(path, text)


class _Entry(NamedTuple):
    line: int
    fields: dict[str, tuple[int, Any]]  # key: its line and its value


class _FileFault(Exception):
    def __init__(self, line: int, message: str):
        super().__init__(line, message)
        self.line, self.message = line, message


_FIELDS = tuple(field.name for field in dataclasses.fields(Rule))
_FORMAT_KEYS = {"name", "candidates", "block", "scale", "peak"}
_CANDIDATE_KEYS = {"grid", "step", "stretch"}
_NO_LIST = 'needs a list of rules, as in `- path: .*`, in JSON [{"path": ".*"}]'


def _rule_of(entry: _Entry) -> Rule:
    values = {}
    for key, (line, value) in entry.fields.items():
        if key not in _FIELDS:
            near = difflib.get_close_matches(key, _FIELDS, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}? The" if near else "the"
            raise _FileFault(line, f"unknown key {key!r}; {hint} keys are {', '.join(_FIELDS)}")
        try:
            if key in ("weight_fmt", "act_fmt"):
                value = _format_of(value)
            elif key == "operands" and isinstance(value, dict):
                value = {name: _format_of(fmt) for name, fmt in value.items()}
        except (ValueError, AttributeError) as error:
            raise _FileFault(line, f"{key}: {error}") from None
        values[key] = value
    if "path" not in values:
        raise _FileFault(entry.line, "the rule needs the key 'path', a regular expression: '.*' matches all")
    try:
        return Rule(**values)
    except RuleError as error:
        line, _ = entry.fields.get(error.field, (entry.line, None))
        raise _FileFault(line, str(error)) from None


def _format_of(value: Any) -> Any:
    """A format's record from its content; anything else is left for Rule to judge."""
    if not isinstance(value, dict):
        return value
    fmt = Format.from_dict(value)
    keys = (set(value), _FORMAT_KEYS), *((set(c), _CANDIDATE_KEYS) for c in value["candidates"])
    for given, known in keys:
        if given - known:
            raise ValueError(f"unknown keys {sorted(map(str, given - known))} in a format record: {sorted(known)}")
    if not isinstance(fmt.name, str):
        raise ValueError(f"a format's name must be a string, got {fmt.name!r}")
    return fmt


def _record_of(rule: Rule) -> dict[str, Any]:
    """The fields that are not as by default, and the two that say what the rule is about."""
    if not isinstance(rule, Rule):
        raise TypeError(f"save_rules needs a list of ifjax.Rule, got {type(rule).__name__} in it")
    record = {}
    for field in dataclasses.fields(rule):
        value = getattr(rule, field.name)
        if value == field.default and field.name not in ("path", "weight_fmt"):
            continue
        if isinstance(value, Recipe):
            raise ValueError(
                f"Rule({rule.path!r}): {value.name!r} is a recipe of your own, and files hold names: take one of "
                f"{sorted(RECIPES)}, or keep the rule in Python"
            )
        if callable(value):
            raise ValueError(
                f"Rule({rule.path!r}): {field.name} is a function, and files hold no code: take one of "
                f"{sorted(codec.LOSSES)}, or keep the rule in Python"
            )
        if field.name == "operands":
            value = {name: _format_record(fmt) for name, fmt in value}
        record[field.name] = _format_record(value)
    return record


def _format_record(value: Any) -> Any:
    return value.to_dict() if isinstance(value, Format) else value


def _read_json(text: str) -> Iterator[_Entry]:
    def line_at(at):
        return text.count("\n", 0, at) + 1

    decoder = json.JSONDecoder(object_pairs_hook=_without_duplicates)

    def decode(at):
        try:
            value, end = decoder.raw_decode(text, at)
        except _Duplicate as error:  # of a mapping inside this value, which starts here
            raise _FileFault(line_at(at), str(error)) from None
        return value, skip(end)

    def skip(at):  # what separates values; that it is well-formed is known by then
        return re.compile(r"[\s,:]*").match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]

    try:
        if not isinstance(json.loads(text), list):
            raise _FileFault(1, _NO_LIST)
    except json.JSONDecodeError as error:
        raise _FileFault(error.lineno, f"is not JSON: {error.msg} (column {error.colno})") from None
    except ValueError as error:  # a number of thousands of digits
        raise _FileFault(1, f"is not a list of rules: {error}") from None
    at = skip(text.index("[") + 1)
    while text[at] != "]":
        line, fields = line_at(at), {}
        if text[at] != "{":
            raise _FileFault(line, f'a rule must be a mapping such as {{"path": ".*"}}, got {decode(at)[0]!r}')
        at = skip(at + 1)
        while text[at] != "}":
            key_at = at
            key, at = decode(at)
            if key in fields:
                raise _FileFault(line_at(key_at), f"the key {key!r} occurs twice in one rule: remove one")
            value, at = decode(at)
            fields[key] = line_at(key_at), value
        at = skip(at + 1)
        yield _Entry(line, fields)


class _Duplicate(Exception):
    pass


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = {}
    for key, value in pairs:
        if key in values:
            raise _Duplicate(f"the key {key!r} occurs twice in one mapping: remove one")
        values[key] = value
    return values


def _read_yaml(text: str) -> Iterator[_Entry]:
    yaml = _yaml()

    class Loader(yaml.SafeLoader):  # safe: plain values, no Python objects
        def construct_mapping(self, node, deep=False):
            self.check_keys(node)
            return super().construct_mapping(node, deep)

        def check_keys(self, node):
            keys = []
            for key_node, _ in node.value:
                key, line = key_node.value, key_node.start_mark.line + 1
                if isinstance(key, str) and key in keys:
                    raise _FileFault(line, f"the key {key!r} occurs twice in one mapping: remove one")
                keys.append(key)

    try:
        loader = Loader(text)
        top = loader.get_single_node()
        if not isinstance(top, yaml.SequenceNode):
            raise _FileFault(1 if top is None else top.start_mark.line + 1, _NO_LIST)
        for node in top.value:
            line = node.start_mark.line + 1
            if not isinstance(node, yaml.MappingNode):
                raise _FileFault(line, f"a rule must be a mapping such as `path: .*`, got {node.value!r}")
            loader.check_keys(node)
            fields = {}
            for key_node, value_node in node.value:
                line_of_key = key_node.start_mark.line + 1
                try:
                    value = loader.construct_object(value_node, deep=True)
                except ValueError as error:  # what looks like a date, and is none
                    raise _FileFault(line_of_key, f"{key_node.value} is not YAML: {error}; quote strings") from None
                fields[str(key_node.value)] = line_of_key, value
            yield _Entry(line, fields)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = getattr(error, "position", 0)
        line = mark.line + 1 if mark else text.count("\n", 0, at) + 1
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        quote = isinstance(error, yaml.parser.ParserError | yaml.scanner.ScannerError | yaml.composer.ComposerError)
        hint = ". Quote regular expressions: '[ab].*'" if quote else ""
        raise _FileFault(line, f"is not YAML: {what}{hint}") from None


def _yaml() -> Any:
    try:
        import yaml
    except ImportError:
        raise ImportError(
            "rules in YAML need PyYAML, which is not installed: pip install pyyaml (ifjax[flax] brings it, too), or "
            "keep them as .json"
        ) from None
    return yaml


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"{path}: rules are kept in .yaml, .yml or .json files, got the suffix {path.suffix!r}")
    return suffix


def _write_whole(path: Path, text: str) -> None:
    path = Path(os.path.realpath(path))  # a link stays one
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder: create it first")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# --- small things ----------------------------------------------------------------------------------------------------


def _with_block(fmt: Format, block: int) -> Format:
    """fmt with other blocks: the named record where there is one, such as if4_bs8."""
    name = re.sub(r"_bs\d+$", "", fmt.name)
    plain = dataclasses.replace(fmt, name=name, block=block)
    if block == fmt.block:
        return fmt
    return plain if FORMATS.get(name) == plain else dataclasses.replace(plain, name=f"{name}_bs{block}")


def _did_you_mean(name: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names
    return f"did you mean {', '.join(near)}?"


def _as_tuple(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
