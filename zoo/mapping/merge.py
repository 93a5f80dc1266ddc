"""A PEFT adapter merged into a canonical folder: `zoo merge CANON ADAPTER DST`.

An adapter names modules as transformers has them; the family's rules say where a module's weight lies in the canonical
tensors, fused or stacked. So a weight is taken out of them as it was released, changed, and put back:

    LoRA            W + s B A                                      s = alpha / r, or alpha / sqrt(r) (rsLoRA)
    DoRA            m / |W + s B A| (W + s B A)                    |.| of each output row; arXiv 2402.09353
    whole tensors   what the adapter holds in the place of W       modules_to_save, biases

All of it in fp32, rounded once to the dtype that the folder has. What no module of the adapter touches is copied from
file to file.

Unusual: an adapter of packed experts (PEFT's `target_parameters`) does not say which parameter of a module it is for.
Its shapes do.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zoo.errors import ZooError
from zoo.formats import canonical, pickle, safetensors
from zoo.formats.base import inside, read_json
from zoo.formats.canonical import Canonical
from zoo.formats.trained import Mapped
from zoo.layout import layout
from zoo.mapping.execute import Progress
from zoo.mapping.fold import fold
from zoo.mapping.names_out import by_rule, family_of, held_aside
from zoo.mapping.recipe import Output, transposes
from zoo.mapping.rules import Fit, RuleSet, respell
from zoo.mapping.save import assembled, elements
from zoo.mapping.values import New, Values, extras_of, refuse_part, unchanged
from zoo.model.load import Source
from zoo.untrusted.patterns import LONGEST_NAME, endless
from zoo.untrusted.printable import warn

log = logging.getLogger("zoo")

StrPath = str | os.PathLike[str]
CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
WITHIN = re.compile(
    r"^(?P<module>.+?)(?P<nested>(\.base_layer)*)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.default)?(\.(?P<leaf>weight|bias))?$"
)
OTHERWISE = (
    "use_bdlora", "use_qalora", "arrow_config", "kasa_config", "monteclora_config", "alora_invocation_tokens", "layer_replication",
    "megatron_config", "trainable_token_indices",
)  # fmt: skip
"""Fields of an adapter's config that stand for another formula, or another model, when they are set."""
READ = frozenset((
    # of these the tensors, or the names of the modules that they are in, show what was made
    "r", "target_modules", "exclude_modules", "fan_in_fan_out", "bias", "modules_to_save", "layers_to_transform", "layers_pattern",
    "rank_pattern", "use_dora", "lora_bias", "target_parameters", "ensure_weight_tying",
    # read here
    "peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights", "base_model_name_or_path",
    # of training, and of other fields that are
    "task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "megatron_core", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size", "runtime_config", "merge_weights",
))  # fmt: skip
"""Fields of an adapter's config of which it is known what they are for: with `OTHERWISE` all of PEFT 0.21."""
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that change the weights which the adapter is added to."""
LONGEST = 500
"""Characters of a name in an adapter."""
MAX_TENSORS = 150_000
"""Of an adapter; one of every expert of Kimi K2 has 139,000."""
MATCHING = 3.0
"""Seconds for all of an adapter's patterns, compiled and matched."""


def merge(
    canon: StrPath,
    adapter: StrPath,
    to: StrPath,
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the canonical folder `to`: `canon` with the PEFT adapter in the folder `adapter` merged into it; return it.

    LoRA, rsLoRA and DoRA, with patterns of ranks and alphas, `modules_to_save`, biases, fused weights and experts. In memory
    are one canonical tensor, and one released one in fp32. Raises ZooError if `adapter` is none, is of another kind or
    for another model (naming its modules by pattern), or changes a weight that is quantised; and as `Values` does.
    """
    old = canonical.read(canon)
    refuse_part(old)
    found = read_adapter(Path(adapter))
    where = _find(old, found)
    source = Source(old)
    extras = {n: (unchanged(old.extra_tensors[n]), why) for n, why in extras_of(old).items()}
    touched = {o.name for name in where.changed for o, _ in where.places.get(name, ())}
    tensors = [
        New(ref.name, ref.dtype, ref.shape, None if ref.name in touched else ref)
        for ref in old.tensors.values()
    ]
    for name in where.aside:
        ref = old.extra_tensors[name]
        extras[name] = New(name, ref.dtype, ref.shape), extras[name][1]
    said = {"by": "zoo merge, of an adapter", "adapter": str(Path(adapter).resolve())}
    with Values(old, to, tensors, extras, old.quant, said, force=force, progress=progress) as new:
        for tensor in new.tensors:
            if tensor.same is not None:
                continue
            if tensor.name in where.aside:
                w = source.tensor(old.extra_tensors[tensor.name])
                made = where.changed[tensor.name](w.float()).to(w.dtype)
            else:
                made = _merged(where, tensor.name, source)
            new.put(tensor, [made])
        return new.finish()


# ---------------------------------------------------------------------------------------------------
# The adapter


@dataclass
class Low:
    """What is added to one weight, of low rank: `a` [r, in], `b` [out, r]; of E experts [r E, in], [out, r E] with an
    expert's ranks E apart in b. `embedding`: they are of a table, whose rows are inputs. `magnitude` [out]: DoRA's m."""

    a: Tensor | None = None
    b: Tensor | None = None
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    embedding: bool = False


@dataclass
class Adapter:
    """`low`: module -> what is added, from the innermost of nested wrappers on. `whole`: tensors by name that take the place
    of others."""

    root: Path
    config: dict[str, Any]
    low: dict[str, list[Low]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    _matching: float = 0.0

    @cached_property
    def alphas(self) -> list[tuple[re.Pattern[str], float]]:
        """What modules have alphas of their own. Raises ZooError for what is no pattern, or no number."""
        told = self.config.get("alpha_pattern") or {}
        if not isinstance(told, dict):
            raise ZooError(f"{self.root / CONFIG}: alpha_pattern is {told!r:.80}; expected an object")
        out, began = list[tuple[re.Pattern[str], float]](), time.process_time()
        for p, alpha in told.items():
            self._refuse_endless(began)
            if endless(p):
                raise ZooError(
                    f"{self.root / CONFIG}: alpha_pattern has {p!r:.80}, which could be matched without end: not read"
                )
            try:
                with warnings.catch_warnings(action="ignore"):
                    out.append((re.compile(rf"(.*\.)?({p})$"), self._alpha(alpha)))
            except (re.error, OverflowError, RecursionError) as e:
                raise ZooError(
                    f"{self.root / CONFIG}: alpha_pattern has {p!r:.80}, which is no pattern ({e!s:.80})"
                ) from None
        self._matching += time.process_time() - began
        return out

    def _refuse_endless(self, began: float) -> None:
        """Raises ZooError where the patterns take too long, with what was begun at `began`."""
        if self._matching + time.process_time() - began > MATCHING:
            raise ZooError(f"{self.root / CONFIG}: alpha_pattern takes too long to be matched: refused")

    def _alpha(self, alpha: Any) -> float:
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise ZooError(f"{self.root / CONFIG}: an alpha is {alpha!r:.80}; expected a number")
        return float(alpha)

    def scale(self, module: str, parameter: str | None, rank: int) -> float:
        """s of a module, or of its `parameter`, whose patterns are matched as PEFT does: the end of its name."""
        alpha, patterns = self._alpha(self.config.get("lora_alpha", 8)), self.alphas
        began = time.process_time()
        key = f"{module}.{parameter}" if parameter else module
        if patterns and len(key) > LONGEST_NAME:
            raise ZooError(
                f"{self.root / CONFIG}: {key:.100}... has {len(key)} characters (limit {LONGEST_NAME}), and is not matched with alpha_pattern"
            )
        alpha = next((a for p, a in patterns if p.match(key)), alpha)
        self._refuse_endless(began)
        self._matching += time.process_time() - began
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


def read_adapter(root: Path) -> Adapter:
    """The adapter in a folder. Raises ZooError for a kind that is not merged here, or tensors of none."""
    config = read_json(root / CONFIG, "an adapter has one")
    kind = str(config.get("peft_type")).upper()
    if kind != "LORA":
        raise ZooError(
            f"{root / CONFIG}: a {kind:.30} adapter; LoRA, rsLoRA and DoRA are merged here: merge it with peft"
        )
    if odd := [k for k in OTHERWISE if config.get(k)]:
        raise ZooError(
            f"{root / CONFIG}: {odd[0]} is {config[odd[0]]!r:.80}, which is not merged here: merge it with peft"
        )
    begun = str(config.get("init_lora_weights", "")).lower()
    if begun.startswith(CHANGES_BASE):
        raise ZooError(
            f"{root / CONFIG}: init_lora_weights is {begun[:40]!r}: it was trained beside weights that this changed first. Save it as "
            "plain LoRA (peft: save_pretrained(..., path_initial_model_for_weight_conversion=...)), and merge that"
        )
    if unknown := sorted(k for k, v in config.items() if v and k not in READ):
        warn(
            log,
            "%s: %s: not known here, and taken to change nothing of what is merged",
            root / CONFIG,
            ", ".join(f"{k:.80}" for k in unknown[:8]),
        )
    out = Adapter(root, config)
    parts: dict[tuple[str, int], Low] = {}
    for key, t in _tensors(root).items():
        if len(name := _plain(key)) > LONGEST:
            raise ZooError(f"{root}: a name of {len(name)} characters: {name:.80}...")
        if (m := WITHIN.match(name)) is None:
            if "lora_" in name or "token_adapter" in name:
                raise ZooError(f"{root}: {key!r} is none of LoRA's or DoRA's tensors: merge it with peft")
            if ".original_module." not in name:  # the bias of a module that `modules_to_save` replaces
                out.whole[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = t
            continue
        depth = m["nested"].count(".base_layer")
        module = m["module"].replace(".base_layer.", ".")  # within a module of which a parameter is wrapped
        low, part = parts.setdefault((module, depth), Low()), m["part"]
        if m["leaf"] == "bias":
            low.bias = t
        elif part == "lora_magnitude_vector":
            low.magnitude = t.flatten()
        else:
            low.embedding = "embedding" in part
            setattr(low, "a" if part.endswith("A") else "b", t)
    for (module, _), low in sorted(parts.items(), key=lambda x: -x[0][1]):
        if low.a is None or low.b is None:
            raise ZooError(f"{root}: of {module} it has only one of lora_A and lora_B: is the file whole?")
        if low.a.dim() != 2 or low.b.dim() != 2 or len(low.a) != low.b.shape[1] or not len(low.a):
            raise ZooError(
                f"{root}: {module}: lora_B {list(low.b.shape)} times lora_A {list(low.a.shape)} is no product of matrices: merge it with "
                "peft"
            )
        out.low.setdefault(module, []).append(low)
    if not out.low and not out.whole:
        raise ZooError(f"{root}: an adapter without tensors")
    return out


def _plain(key: str) -> str:
    """The name of a tensor in the model that was adapted."""
    name = key.removeprefix("base_model.").removeprefix("model.") if key.startswith("base_model.") else key
    return name.replace("._orig_mod", "").replace("modules_to_save.default.", "").replace("_orig_mod.", "")


def _tensors(root: Path) -> dict[str, Tensor]:
    """By the readers of weights, which run nothing and believe no size: views of the mapped file."""
    name = next((n for n in (WEIGHTS, PICKLED) if (root / n).is_file()), None)
    if name is None:
        raise ZooError(f"{root}: has neither {WEIGHTS} nor {PICKLED}: is the adapter whole?")
    file = inside(root, name, str(root))
    size = file.stat().st_size
    if name == WEIGHTS:
        refs = list(safetensors.parse_header(safetensors.read_header(file), name, size, str(file)))
    else:
        refs = pickle.read_pickle(file, name)
    if len(refs) > MAX_TENSORS:
        raise ZooError(
            f"{file}: {len(refs)} tensors (limit {MAX_TENSORS}), more than any adapter has: refused"
        )
    mapped = Mapped(root)
    return {ref.name: mapped.tensor(ref) for ref in refs}


# ---------------------------------------------------------------------------------------------------
# Where its modules are


Change = Callable[[Tensor], Tensor]
"""A released tensor in fp32 -> what it is merged."""


@dataclass
class Places:
    """`places`: name of a released tensor -> the parts of canonical tensors that it is (output, fit); `names`: the same from the
    other side. `beside`: names that tensors kept aside have in memory -> those of the folder. `swapped`: those that hold [in, out];
    `tied`: names of the head that is the embedding. `changed`: what the adapter changes; of these, `aside` are tensors kept aside."""

    places: dict[str, list[tuple[Output, int]]] = field(default_factory=dict)
    names: dict[str, dict[str, None]] = field(default_factory=dict)
    beside: dict[str, str] = field(default_factory=dict)
    swapped: set[str] = field(default_factory=set)
    tied: set[str] = field(default_factory=set)
    changed: dict[str, Change] = field(default_factory=dict)
    aside: set[str] = field(default_factory=set)

    @cached_property
    def within(self) -> dict[str, list[str]]:
        """Names of released tensors by the module that they are in."""
        out: dict[str, list[str]] = {}
        for name in self.places:
            out.setdefault(name.rpartition(".")[0], []).append(name)
        return out


def _find(like: Canonical, adapter: Adapter) -> Places:
    """The canonical places of all that the adapter changes, under the names that fit it best. Raises ZooError, listing the
    rest by pattern, if there are none that fit all of it."""
    family = family_of(like)
    best: Places | None = None
    fewest: list[str] = []
    for naming in ("transformers", "hf"):
        if (rules := family.rules.get(naming)) is None:
            continue
        released = tuple((a, b) for a, b in like.source["prefix"])
        for prefix in dict.fromkeys((*([released] if naming == "hf" else []), *rules.prefixes)):
            places = placed(like, rules, prefix)
            rest = _changes(like, adapter, places)
            if best is None or len(rest) < len(fewest):
                best, fewest = places, rest
            if not rest:
                _refuse_changes(like, adapter, best)
                return best
    listed = "".join(f"\n  {text}" for text, _ in fold(fewest)[:12])
    raise ZooError(
        f"{adapter.root}: {len(fewest)} of its modules are none of {like.root} (family {family.name}): is it for another model "
        f"({adapter.config.get('base_model_name_or_path')!s:.100})? Nothing was written{listed}"
    )


def placed(like: Canonical, rules: RuleSet, prefix: tuple[tuple[str, str], ...]) -> Places:
    """Where the tensors that these rules name lie in a canonical folder."""
    spell = respell(rules, prefix)
    out = Places(beside={called: name for name, called in held_aside(like).items()})
    for slot in layout(like.spec).values():
        layer = None if slot.layer is None else like.spec.layers[slot.layer]
        keys = (slot.key, "head.weight") if slot.key == "embed.weight" and like.spec.tied else (slot.key,)
        for rule in (r for key in keys for r in rules.by_key.get(key, ())):
            if rule.when is not None and not rule.when(layer, like.spec):
                continue
            try:
                made = list(by_rule(like, rule, slot, spell))
            except (ZooError, IndexError):  # a form that this model does not have
                continue
            for o in made:
                for k, name in enumerate(o.sources):
                    at = out.places.setdefault(name, [])
                    if (
                        at and at[0][0].fits[at[0][1]].shape != o.fits[k].shape
                    ):  # another form of the same name
                        continue
                    at.append((o, k))
                    out.names.setdefault(o.name, {})[name] = None
                    if transposes(rule.expr):
                        out.swapped.add(name)
                    if rule.key != slot.key:
                        out.tied.add(name)
    return out


def _changes(like: Canonical, adapter: Adapter, places: Places) -> list[str]:
    """Fill `changed`; the modules and tensors of the adapter that are not there."""
    rest: list[str] = []
    per_weight: dict[str, list[Change]] = {}

    def known(name: str) -> tuple[int, ...] | None:
        if (at := places.places.get(name)) is not None:
            o, k = at[0]
            return o.fits[k].shape
        ref = like.extra_tensors.get(home(name))
        return None if ref is None else ref.shape

    def home(name: str) -> str:
        """The folder's name of a tensor."""
        return name if name in places.places or name in like.extra_tensors else places.beside.get(name, name)

    for name, t in adapter.whole.items():
        if (shape := known(name)) is None:
            rest.append(name)
        elif shape != tuple(t.shape):
            raise ZooError(
                f"{adapter.root}: holds {name} whole, as {list(t.shape)}; the model has {list(shape)}: were tokens added? Merge it with "
                "peft, and convert the result"
            )
        else:
            per_weight.setdefault(home(name), []).append(lambda w, t=t: t.float())  # type: ignore[misc]
    for module, lows in adapter.low.items():
        for depth, low in enumerate(lows):
            if (found := _weight_of(adapter, module, depth, known, places)) is None:
                rest.append(module)
                continue
            name, parameter, experts = found
            per_weight.setdefault(home(name), []).append(
                _change(adapter, module, parameter, low, experts, name in places.swapped)
            )
            if low.bias is None:
                continue
            if known(bias := f"{module}.bias") != tuple(low.bias.shape):
                raise ZooError(
                    f"{adapter.root}: adds a bias {list(low.bias.shape)} to {module}, which has none of that shape in this model (lora_bias)"
                )
            s = adapter.scale(module, parameter, len(low.a) if low.a is not None else 1)
            per_weight.setdefault(home(bias), []).append(lambda b, t=low.bias, s=s: b + s * t.float())  # type: ignore[misc]
    places.changed = {name: _in_turn(steps) for name, steps in per_weight.items()}
    places.aside = {n for n in places.changed if n not in places.places}
    return rest


def _in_turn(steps: list[Change]) -> Change:
    def change(w: Tensor) -> Tensor:
        for step in steps:
            w = step(w)
        return w

    return change


Known = Callable[[str], tuple[int, ...] | None]


def _weight_of(
    adapter: Adapter, module: str, depth: int, known: Known, places: Places
) -> tuple[str, str | None, int] | None:
    """The weight of a module that its `depth`th LoRA, from the innermost on, is for: its name, that of the parameter where it is no
    `weight`, and how many experts it is of (0: it is one matrix).

    Parameters that fit alike (experts without a gate) are told apart by `target_parameters`, and by their order: PEFT wraps those of a
    module as its class lists them, which is the order of the rules."""
    lows = adapter.low[module]
    low = lows[depth]
    assert low.a is not None and low.b is not None
    if known(f"{module}.weight") is not None:
        return f"{module}.weight", None, 0
    fitting = []
    for name in places.within.get(module, ()):
        parameter, shape = name.rpartition(".")[2], known(name)
        if shape is None:
            continue
        if len(shape) == 2 and shape == (len(low.b), low.a.shape[1]):
            fitting.append((name, parameter, 0))
        elif len(shape) == 3 and {shape[1:], shape[:0:-1]} & {(len(low.b), low.a.shape[1])}:
            if len(low.a) % shape[0] == 0 and len(low.a) == low.b.shape[1]:
                fitting.append((name, parameter, shape[0]))
    if len({frozenset(o.name for o, _ in places.places[name]) for name, *_ in fitting}) > 1:
        told = adapter.config.get("target_parameters")
        ends = tuple(f".{t}" for t in told if isinstance(t, str)) if isinstance(told, list) else ()
        meant = [at for at in fitting if f".{at[0]}".endswith(ends)]
        if len(meant) == len(lows):
            return meant[depth]
        raise ZooError(
            f"the adapter's {module} may be for {' or '.join(name for name, *_ in fitting)}, which have one shape: merge it with peft"
        )
    return fitting[0] if fitting else None


def _change(
    adapter: Adapter, module: str, parameter: str | None, low: Low, experts: int, swapped: bool
) -> Change:
    """What a LoRA or DoRA makes of a weight. `swapped`: it is a Conv1D's, [in, out]; the config's `fan_in_fan_out` says what peft met
    last, and peft itself goes by the module."""
    assert low.a is not None and low.b is not None
    a, b = low.a.float(), low.b.float()
    rank = len(a) // max(experts, 1)
    s = adapter.scale(module, parameter, rank)

    def change(w: Tensor) -> Tensor:
        turned = low.embedding or swapped  # the weight is [in, out]
        made = (len(b), a.shape[1])
        if tuple(w.shape[1:] if experts else w.shape) not in (
            (made, made[::-1]) if experts else (made[:: -1 if turned else 1],)
        ):
            raise ZooError(
                f"{adapter.root}: {module}: lora_B {list(b.shape)} times lora_A {list(a.shape)} does not go with the weight "
                f"{list(w.shape)}: is it for another model?"
            )
        if experts:
            if low.magnitude is not None:
                raise ZooError(f"{adapter.root}: {module}: DoRA of packed experts: merge it with peft")
            return _added_to_experts(w, a.view(experts, rank, -1), b.view(len(b), rank, experts), s, swapped)
        delta = s * (b @ a)  # [out, in]
        v = w + (delta.T if turned else delta)
        if low.magnitude is None:
            return v
        if len(low.magnitude) != len(b):
            raise ZooError(
                f"{adapter.root}: {module}: a magnitude of {len(low.magnitude)} rows, expected {len(b)}: is it for another model?"
            )
        norm = torch.linalg.vector_norm(v, dim=0 if turned else 1, keepdim=True)
        m = low.magnitude.float()
        scaled: Tensor = (m[None] if turned else m[:, None]) / norm * v
        return scaled

    return change


def _added_to_experts(w: Tensor, a: Tensor, b: Tensor, s: float, swapped: bool) -> Tensor:
    """w [E, out, in], or [E, in, out]; a [E, r, in], b [out, r, E]; one expert at a time."""
    turned = swapped if w.shape[1] == w.shape[2] else w.shape[1:] == (a.shape[2], b.shape[0])
    out = w.clone()
    for e in range(len(w)):
        delta = s * (b[:, :, e] @ a[e])
        out[e] += delta.T if turned else delta
    return out


def _refuse_changes(like: Canonical, adapter: Adapter, places: Places) -> None:
    """Raises ZooError for changes that the folder can't hold: of a quantised weight, and of a tied embedding, or head, alone."""
    _settle_tied(like, adapter, places)
    for name in places.changed:
        for o, _ in places.places.get(name, ()):
            slot = o.name.rpartition(".")[0]
            if slot in like.quant:
                raise ZooError(
                    f"{like.root}: {slot} is quantised ({like.quant[slot]}), and {adapter.root} changes it ({name}): convert the source "
                    "again with --dtype bf16, and merge into that"
                )


def _settle_tied(like: Canonical, adapter: Adapter, places: Places) -> None:
    """Of a head that is the embedding: peft's modules are two, and it trains either alone, unless the adapter holds the same for both
    (`ensure_weight_tying`), which is then the change of one. What is so of low rank peft's own merge adds twice, to the one tensor that
    both are; computing with the adapter it adds it once to each."""
    ends = [n for n in places.names.get("embed.weight", ()) if like.spec.tied and n in places.changed]
    if len(ends) == 2 and _holds_the_same(adapter, *sorted(ends, key=lambda n: n in places.tied)):
        places.changed.pop(next(n for n in ends if n in places.tied))
    elif ends:
        raise ZooError(
            f"{adapter.root}: changes {ends[-1]}, and embedding and head of {like.root} are one (tied): merged, it would change both alike, which "
            "is not what peft trained. Untie the model: in transformers `model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())`, "
            "`model.config.tie_word_embeddings = False`, save_pretrained; `zoo convert` that, and merge into it"
        )


def _holds_the_same(adapter: Adapter, embed: str, head: str) -> bool:
    """Whether an adapter makes the same of the embedding [V, d] and of the head, whose A and B are the other's, turned."""
    whole = [adapter.whole.get(n) for n in (embed, head)]
    low = [adapter.low.get(n.removesuffix(".weight"), []) for n in (embed, head)]
    if [t is None for t in whole] not in ([True, True], [False, False]) or len(low[0]) != len(low[1]):
        return False
    if whole[0] is not None and whole[1] is not None and not torch.equal(whole[0], whole[1]):
        return False
    for e, h in zip(*low):
        assert e.a is not None and e.b is not None and h.a is not None and h.b is not None
        scales = {adapter.scale(n.removesuffix(".weight"), None, len(e.a)) for n in (embed, head)}
        plain = e.embedding and e.magnitude is None is h.magnitude and e.bias is None is h.bias
        if not plain or len(scales) > 1 or not (torch.equal(h.a, e.b.T) and torch.equal(h.b, e.a.T)):
            return False
    return True


# ---------------------------------------------------------------------------------------------------
# Merging


def _merged(places: Places, tensor: str, source: Source) -> Tensor:
    """A canonical tensor with what the adapter changes in it."""
    out = source.tensor(source.folder.tensors[tensor]).clone()
    for name in places.names[tensor]:
        if name not in places.changed:
            continue
        made = places.changed[name](_released(places, name, source)).to(out.dtype).contiguous()
        for fit in _fits_of(places.places[name], tensor):
            elements(out, fit.canonical).copy_(elements(made, fit.source))
    return out


def _released(places: Places, name: str, source: Source) -> Tensor:
    """A tensor as it was released, in fp32."""
    held = source.folder.tensors
    return assembled(
        ((source.tensor(held[o.name]), o.fits[k]) for o, k in places.places[name]), torch.float32
    )


def _fits_of(at: Iterable[tuple[Output, int]], name: str) -> Iterator[Fit]:
    return (o.fits[k] for o, k in at if o.name == name)
