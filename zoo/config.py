"""Reading a released `config.json`: every field by name, nothing guessed, nothing ignored.

A family's `spec(config)` reads its fields through `Config`, so that a missing field, an unknown choice or
a field of another family is one clear error that names the file. Keys are read as released and as later
re-saved: `c["rope_theta"]`, `c.first("num_experts", "num_local_experts")`. What was read is recorded:
`Config.unread` is the rest, which `zoo.unread` judges.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, cast

from zoo.errors import ZooError
from zoo.spec import Activation, Rope, RopeScaling, Rounding

_MISSING: Any = object()

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""Activations by the names configs have for them: use with `Config.table`."""


_WHOLE = re.compile(
    r"""(?!mscale|\w+_adjust)((\w+_)?(num|n)_\w+ | (\w+_)?(dim|size|rank|d_(conv|head|ssm|state))(_out|_mlp|_per_layer_input)? | (\w+_)?position_embeddings
    | \w+_(kernel|cache|chunk_size|context_length|interval|step) | sliding_window | (moe_|index_)?(top_?k|k)(_group|_experts)?
    | experts_per_token | first_k_dense_replace | moe_layer_\w+_index)""",
    re.VERBOSE,
)
"""Fields that count something: whole numbers, or a list of them."""
_REAL = re.compile(
    r"""(?!altup_|apply_|rope_scaling)(\w+_)?(eps|epsilon|theta|factor|multipliers?|scaling|mscale|mscale_all_dim|softcapping|soft_cap|beta|beta_fast|beta_slow
    | alpha|base|base_freq|pct|limits?) | query_pre_attn_scalar | scale_(emb|depth) | (logit|routed?|attention_value|expert_weights)_scale""",
    re.VERBOSE,
)
"""Fields that scale something: numbers, or a list or table of them."""
_LIST = re.compile(
    r"(long|short)_factor | \w+_(idxs|indices) | mlp_only_layers | (kda|full_attn)_layers", re.VERBOSE
)
"""Fields that list numbers."""
_TRUTH = re.compile(r"norm_topk_prob|tie_word_embeddings")
"""Fields that are true or false, whatever they are read with; others are so where their default is."""
_NUMBER = re.compile(r"\s*[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?\s*")


def sound(key: str, value: Any, where: str, default: Any = None) -> Any:
    """The value of a field, which is of the type that JSON has for such: one that is true or false, a number, a whole
    number, a text or a list, as its name or the `default` it is read with says. 0 and 1 stand for false and true.

    Raises ZooError, naming `where`, the field and what is expected: upstream refuses such values too, and Python takes
    "no" and [0] for true, and true for the number 1.
    """
    if isinstance(value, str):
        if _NUMBER.fullmatch(value):
            raise ZooError(
                f"{where}: {key} is {value!r}, a text; expected a number: write {value.strip()}, without quotes"
            )
        if value.lower() in ("true", "false", "null"):
            raise ZooError(f"{where}: {key} is {value!r}, a text; write {value.lower()}, without quotes")
    if isinstance(default, bool) or _TRUTH.fullmatch(key):
        if type(value) is int and value in (0, 1):
            return bool(value)
        if not isinstance(value, bool):
            raise ZooError(f"{where}: {key} is {_shown(value)}; expected true or false")
    elif _LIST.fullmatch(key):
        if not isinstance(value, list) or any(type(x) not in (int, float) for x in value):
            raise ZooError(f"{where}: {key} is {_shown(value)}; expected a list of numbers")
    elif _WHOLE.fullmatch(key):
        for x in value if isinstance(value, list) else [value]:
            if isinstance(x, float | dict) or x is True or (isinstance(x, str) and x != "auto"):
                write = f": write {int(x)}" if isinstance(x, float) and x.is_integer() else ""
                raise ZooError(f"{where}: {key} is {str(x)[:40]}; expected a whole number{write}")
    elif _REAL.fullmatch(key) or isinstance(default, float):
        for x in value if isinstance(value, list) else [value]:
            if isinstance(x, bool | str) or (x is value and isinstance(x, float) and not math.isfinite(x)):
                raise ZooError(f"{where}: {key} is {_shown(x)}; expected a finite number")
    elif isinstance(default, int) and isinstance(value, bool):
        raise ZooError(f"{where}: {key} is {_shown(value)}; expected a number")
    elif isinstance(default, str) and not isinstance(value, str):
        raise ZooError(f"{where}: {key} is {_shown(value)}; expected a text")
    elif isinstance(default, list | tuple) and not isinstance(value, list | tuple):
        raise ZooError(f"{where}: {key} is {_shown(value)}; expected a list")
    return value


def _shown(value: Any) -> str:
    """A value as JSON spells it, and not all of a long one."""
    return json.dumps(value, default=str)[:40]


class Recorded(dict[str, Any]):
    """An object of a config that writes down which of its keys were read, and so do the objects in it.

    A key is read by `[]`, `get` and `pop`. Asking whether it is there (`in`) reads nothing, and neither does
    copying the whole: who copies passes the records on (`over`).
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        read: tuple[set[str], ...] = (),
        parts: dict[str, Recorded] | None = None,
    ) -> None:
        super().__init__(data)
        self.read = read or (set(),)
        self.parts = {} if parts is None else parts

    def over(self, data: Mapping[str, Any]) -> Recorded:
        """`data`, of which what is read counts as read of this object."""
        return Recorded(data, self.read, self.parts)

    def __getitem__(self, key: str) -> Any:
        return self._seen(key, super().__getitem__(key))

    def get(self, key: str, default: Any = None) -> Any:
        return self._seen(key, super().get(key, default))

    def pop(self, key: str, default: Any = None) -> Any:
        return self._seen(key, super().pop(key, default))

    def _seen(self, key: str, value: Any) -> Any:
        for read in self.read:
            read.add(key)
        if key not in self or not isinstance(value, dict) or isinstance(value, Recorded):
            return value
        if key not in self.parts:
            self.parts[key] = Recorded(value)
        return self.parts[key]

    def unread(self, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
        """The keys that nobody read, as the path to them (("text_config", "alibi")), and their values."""
        for key, value in self.items():
            if not any(key in read for read in self.read):
                yield (*at, key), value
            elif key in self.parts:
                yield from self.parts[key].unread((*at, key))

    def leaves(self, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
        """The keys that were read, as the path to them, and their values; an object after what is in it."""
        for key, value in self.items():
            if key in self.parts:
                yield from self.parts[key].leaves((*at, key))
            if any(key in read for read in self.read):
                yield (*at, key), value


class Config(Mapping[str, Any]):
    """A config.json (or a part of one) that knows where it came from, and what of it was read.

    `"key" in config` only asks; every other way to a value reads it.
    """

    def __init__(self, data: Mapping[str, Any], where: str = "config.json") -> None:
        self.data = data if isinstance(data, Recorded) else Recorded(data)
        self.where = where

    def with_defaults(self, defaults: Mapping[str, Any]) -> Config:
        """This config, where `defaults` fill in the keys it has not; what is read of it counts as read here."""
        return Config(self.data.over({**defaults, **self.data}), self.where)

    def unread(self) -> dict[str, Any]:
        """What nobody read so far, in nested objects too: values by the dotted path to them."""
        return {".".join(path): value for path, value in self.data.unread()}

    def leaves(self) -> dict[tuple[str, ...], Any]:
        """What was read so far: values by the path to them; an object after what is in it."""
        return dict(self.data.leaves())

    def __getitem__(self, key: str) -> Any:
        """A required field. Raises ZooError if it is absent or null."""
        value = self.data.get(key)
        if value is None:
            raise ZooError(f"{self.where}: field {key!r} is missing, and this family needs it")
        return sound(key, value, self.where)

    def __iter__(self) -> Iterator[str]:
        return iter(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __contains__(self, key: object) -> bool:
        return dict.get(self.data, cast(str, key)) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """An optional field; null counts as absent."""
        value = self.data.get(key)
        return default if value is None else sound(key, value, self.where, default)

    def said(self, key: str, default: Any) -> Any:
        """An optional field whose null says something: None where it is null, `default` where it is absent."""
        value = self.data.get(key, default)
        return None if value is None else sound(key, value, self.where, default)

    def first(self, *keys: str, default: Any = _MISSING) -> Any:
        """The first of several spellings that is there. Raises ZooError if none is and no default is given.

        The others are read too where they say the same; where they differ they stay unread.
        """
        if there := [key for key in keys if key in self]:
            value = self.data[there[0]]
            for other in there[1:]:
                if dict.get(self.data, other) == value:
                    self.data.get(other)
            return sound(there[0], value, self.where, None if default is _MISSING else default)
        if default is _MISSING:
            raise ZooError(
                f"{self.where}: none of the fields {', '.join(map(repr, keys))} is there; one is needed"
            )
        return default

    def choice(self, key: str, allowed: Iterable[Any], default: Any = _MISSING) -> Any:
        """A field whose value must be one of `allowed`; anything else is refused by name."""
        value = self[key] if default is _MISSING or key in self else default
        if value not in (options := list(allowed)):
            raise ZooError(
                f"{self.where}: {key} is {value!r}, which this family does not support "
                f"(supported: {', '.join(map(repr, options))})"
            )
        return value

    def table(self, key: str, choices: Mapping[Any, Any], default: Any = _MISSING) -> Any:
        """`choices[value of key]`, refused by name when the value is not among the choices."""
        return choices[self.choice(key, choices, default)]

    def refuse(self, **unsupported: Any) -> None:
        """Refuse any of these fields whose value differs from the one given (absent counts as that one)."""
        for key, neutral in unsupported.items():
            value = self.get(key, neutral)
            if value != neutral:
                raise ZooError(
                    f"{self.where}: {key} is {value!r}, which zoo does not support (only {neutral!r})"
                )

    def sub(self, key: str) -> Config:
        """A nested object, e.g. the `text_config` of a wrapper."""
        value = self[key]
        if not isinstance(value, Mapping):
            raise ZooError(f"{self.where}: {key} should be an object, found {type(value).__name__}")
        return Config(value, f"{self.where}: {key}")

    def each_layer(self, key: str, n_layers: int, allowed: Iterable[Any] | None = None) -> list[Any]:
        """A list with an entry for each layer (it may be longer), its values checked if `allowed` are given."""
        values = self[key]
        if not isinstance(values, list) or len(values) < n_layers:
            raise ZooError(f"{self.where}: {key} should list {n_layers} layers, found {values!r}"[:400])
        if allowed is not None:
            known = list(allowed)
            for i, v in enumerate(values[:n_layers]):
                if v not in known:
                    raise ZooError(f"{self.where}: {key}[{i}] is {v!r}; known: {', '.join(map(repr, known))}")
        return values[:n_layers]


def rope_parameters(
    c: Config,
    layer_type: str | None = None,
    *,
    theta: str = "rope_theta",
    scaling: str | None = "rope_scaling",
    default_theta: float | None = None,
    needed: bool = False,
) -> dict[str, Any]:
    """RoPE settings under one set of keys, whichever way the config spells them.

    transformers 5 writes `rope_parameters` (one dict, or one per layer type); releases have a theta
    (under the key `theta`) and a dict under the key `scaling` (its kind under `type` or `rope_type`).
    `scaling` None: a released scaling does not concern these layers. `default_theta` is for families
    whose older releases leave theta out. `needed`: upstream puts a scaled RoPE of its own in where a config has neither.
    Both at once, saying different things, are refused: which one counts differs between upstream's versions.
    """
    if needed and not (isinstance(said := c.first("rope_parameters", "rope_scaling"), Mapping) and said):
        raise ZooError(
            f"{c.where}: rope_parameters is {said!r}, and upstream would put a scaled RoPE of its own in"
        )
    p: Any = c.get("rope_parameters")
    old: Any = c.get(scaling) if scaling else None
    for key, settings in (("rope_parameters", p), (scaling, old)):
        if settings is not None and not isinstance(settings, Mapping):
            raise ZooError(f"{c.where}: {key} is {_shown(settings)}; expected an object of settings, or null")
    old = old or {}
    nested = p is not None and layer_type is not None
    if nested and not isinstance(p.get(layer_type), Mapping):
        raise ZooError(
            f"{c.where}: rope_parameters says nothing about {layer_type} layers; expected an object for each"
        )
    # A copy: what is read of it counts as read of each object that says it.
    said_in = [x for x in (p[layer_type] if nested else p, old) if x is not None]
    sources = [x if isinstance(x, Recorded) else Recorded(x) for x in said_in]
    out = Recorded(sources[0], tuple(read for x in sources for read in x.read))
    kind = out.pop("type", None)
    out["rope_type"] = out.get("rope_type") or kind or "default"
    if p is not None:
        said = {("rope_type" if k == "type" else k): v for k, v in dict(old).items()}
        if differ := sorted(k for k, v in said.items() if v != out.get(k)):
            raise ZooError(
                f"{c.where}: rope_parameters and {scaling} differ in {', '.join(differ)}: delete one of them"
            )
    if layer_type is not None:  # upstream reads this one beside the layer types, never inside
        out.pop("truncate", None)
        out |= {"truncate": p["truncate"]} if p is not None and "truncate" in p else {}
    if out.get("rope_theta") is None:
        out["rope_theta"] = c.get(theta, default_theta) if default_theta is not None else c[theta]
    # transformers 5 keeps a field of its own beside rope_parameters, often the class' default, and reads it where these are silent
    if out.get("partial_rotary_factor") in (None, dict.get(c.data, "partial_rotary_factor")):
        if "partial_rotary_factor" in c.data:  # null is kept, which is no default: see `read.turned`
            out["partial_rotary_factor"] = c.said("partial_rotary_factor", None)
    for key, value in out.items():
        sound(key, value, f"{c.where}: rope_parameters")
    return out


def rope(
    c: Config,
    p: Mapping[str, Any],
    dim: int,
    *,
    interleaved: bool = False,
    rounding: Rounding | Literal["both"] = "first",
    longrope: tuple[str, ...] = (),
) -> Rope:
    """The `Rope` of settings `p` (see `rope_parameters`) over `dim` channels. An unknown kind is refused.

    `longrope`: the names by which a family's configs ask for LongRoPE ("longrope", "su", "yarn" in Phi-3's); none: it is
    refused."""
    q = Config(p, f"{c.where}: rope_parameters")
    kind = q.choice("rope_type", dict.fromkeys(("default", "linear", "dynamic", "llama3", "yarn", *longrope)))
    theta = float(q["rope_theta"])
    if kind == "default":
        return Rope(theta, dim, None, interleaved, rounding)
    if kind in longrope:
        return Rope(theta, dim, _longrope(c, q, dim), interleaved, rounding)
    factor = float(q["factor"])
    if kind == "linear":
        return Rope(theta, dim, RopeScaling("linear", factor), interleaved, rounding)
    if kind == "dynamic":  # trainers write it into the config of any family
        return Rope(
            theta, dim, RopeScaling("dynamic", factor, c["max_position_embeddings"]), interleaved, rounding
        )
    original = _whole(
        q, q.first("original_max_position_embeddings", default=c.get("max_position_embeddings"))
    )
    if kind == "llama3":
        scaling = RopeScaling(
            "llama3", factor, original,
            low_freq_factor=float(q["low_freq_factor"]), high_freq_factor=float(q["high_freq_factor"]),
        )  # fmt: skip
    else:
        scaling = RopeScaling(
            "yarn", factor, original,
            beta_fast=float(q.get("beta_fast") or 32), beta_slow=float(q.get("beta_slow") or 1),
            truncate=bool(q.said("truncate", True)), attention_factor=yarn_attention_factor(q, factor),
        )  # fmt: skip
    return Rope(theta, dim, scaling, interleaved, rounding)


def _whole(q: Config, original: Any) -> int:
    if original is None or isinstance(original, bool) or original != int(original):
        raise ZooError(
            f"{q.where}: original_max_position_embeddings is {original!r}; expected a whole number"
        )
    return int(original)


def _longrope(c: Config, q: Config, dim: int) -> RopeScaling:
    """LongRoPE as Phi-3's configs have it: cos and sin are multiplied by sqrt(1 + ln(factor) / ln(original context)), where
    factor is by how much the context grew, unless the config says what (for both tables, or as `short_mscale` and
    `long_mscale`)."""
    original = _whole(q, q["original_max_position_embeddings"])
    factor = float(q.get("factor") or c["max_position_embeddings"] / original)
    magnitude = q.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    far = q.get("long_mscale")
    for key in ("short_factor", "long_factor"):
        if (n := len(q[key])) > dim:  # before a tuple of them is made for each layer
            raise ZooError(f"{q.where}: {key} lists {n} numbers; {dim} channels turn by {dim // 2}")
    return RopeScaling(
        "longrope", factor, original,
        attention_factor=float(q.get("short_mscale", magnitude)), long_attention_factor=None if far is None else float(far),
        short=tuple(map(float, q["short_factor"])), long=tuple(map(float, q["long_factor"])),
    )  # fmt: skip


def yarn_attention_factor(p: Mapping[str, Any], factor: float) -> float:
    """What cos and sin are multiplied by (so scores get its square). Source: arXiv 2309.00071, section 3.4."""
    if p.get("attention_factor") is not None:
        return float(p["attention_factor"])
    mscale, all_dim = p.get("mscale"), p.get("mscale_all_dim")
    if mscale and all_dim:
        return yarn_mscale(factor, float(mscale)) / yarn_mscale(factor, float(all_dim))
    return yarn_mscale(factor)


def yarn_mscale(factor: float, scale: float = 1.0) -> float:
    """0.1 * scale * ln(factor) + 1 for factor > 1, else 1."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0
