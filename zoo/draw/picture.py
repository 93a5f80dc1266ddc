"""A Spec as a picture: what is drawn, and where.

Read from below: tokens, embedding, frames of layers, final norm, head. A frame is all layers with the same norms in the same
places; where they differ in their mixer or feed-forward, the kinds stand in a dashed group, each with its letter, and the
strip at the top says which layer has which. The line at the left of a frame is the residual stream (lines, with AltUp).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from zoo.draw import words
from zoo.draw.boxes import Canvas, text_width
from zoo.draw.words import Line, number
from zoo.order import MEANINGS, Order, order, pattern, sees_all
from zoo.spec import FFN, Attention, CompressedAttention, LatentAttention, Layer, Mixer, MoE, Norm, Spec

WIDTH = 400.0
_MARGIN, _RAIL, _INNER = 12.0, 32.0, 54.0
_GAP, _TITLE, _SIZE, _SMALL = 12.0, 12.5, 11.5, 10.5
_CELL, _PER_ROW, _MAX_ROWS = 14.0, 24, 12


# What this module draws, or leaves to the words of the parts; any other field that says something is written as it is.
_LAYER = (
    "mixer", "ffn", "beside", "attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm", "parallel", "residual_scale", "scalar",
)  # fmt: skip
_SPEC = (
    "d_model", "vocab_size", "layers", "norm", "tied", "context_length", "positions", "positions_offset", "embed_scale", "embed_norm",
    "logit_scale", "logit_softcap", "altup", "per_layer_embedding", "head_bias", "dtype", "hyper",
)  # fmt: skip


@dataclass(frozen=True)
class Box:
    """Title, lines, a note at the right of the title; boxes inside; `dots`: how many squares, how many of them full."""

    style: str
    title: str = ""
    lines: Sequence[Line] = ()
    note: str = ""
    inside: Sequence[Node] = ()
    dots: tuple[int, int] | None = None
    icon: str = ""


@dataclass(frozen=True)
class Row:
    """Side by side; `joined`: they read the same, and their sum goes on."""

    nodes: Sequence[Node]
    joined: bool = False


@dataclass(frozen=True)
class Stack:
    """From top to bottom, joined by arrows that point up; in a dashed frame with a title, one or the other."""

    nodes: Sequence[Node]
    one_of: str = ""


Node = Box | Row | Stack


@dataclass(frozen=True)
class Frame:
    """Layers that differ in their mixer and feed-forward alone."""

    layer: Layer  # the first of them
    mixers: list[str] = field(default_factory=list)  # letters
    ffns: list[str] = field(default_factory=list)
    count: dict[str, int] = field(default_factory=dict)
    n: int = 0


@dataclass(frozen=True)
class Ahead:
    """Layers that predict further tokens: how many the config names, None where only the family's rules know of them."""

    layers: int | None


@dataclass(frozen=True)
class Facts:
    """What stands above the picture and beside the Spec: a name, lines below it, layers of multi-token prediction."""

    name: str
    lines: Sequence[str] = ()
    ahead: Ahead | None = None


def draw(spec: Spec, facts: Facts) -> tuple[Canvas, float]:
    """The picture, `WIDTH` wide, and its height."""
    c, found = Canvas(), order(spec)
    y = _MARGIN + c.lines(_MARGIN, _MARGIN, facts.name, 17, WIDTH - 2 * _MARGIN, "b")
    for line in facts.lines:
        y += c.lines(_MARGIN, y + 1, line, _SIZE, WIDTH - 2 * _MARGIN, "m")
    y = _strip(c, spec, found, y + 8) + 8
    head = y
    for node in _top(spec, facts.ahead):
        if isinstance(node, Box) and node.title == "Head":
            head = y
        y += _put(c, node, _MARGIN, y, WIDTH - 2 * _MARGIN, 1)
        y = _arrow(c, WIDTH / 2, y)
    frames = _frames(spec, found)
    for frame in reversed(frames):
        y = _arrow(c, WIDTH / 2, _frame(c, spec, found, frame, y))
    low = y
    for node in _bottom(spec):
        y += _put(c, node, _MARGIN, y, WIDTH - 2 * _MARGIN, 1)
        y = _arrow(c, WIDTH / 2, y)
    text = f"token ids, context {number(spec.context_length)}"
    c.text(WIDTH / 2, y + 12, text, _SIZE, "m", "middle", WIDTH)
    if spec.tied:
        x = WIDTH - 6
        c.path(f"M{WIDTH - _MARGIN:g} {head + 12:g}H{x:g}V{low + 12:g}H{WIDTH - _MARGIN:g}", "t")
    y += 25
    if any(t.text.startswith("◆") for t in c.texts):
        y += c.lines(_MARGIN, y, "◆ unusual: few families have it", _SMALL, WIDTH - 2 * _MARGIN, "m")
    return c, y + 8


# ---- the order of layers


def _strip(c: Canvas, spec: Spec, o: Order, y: float) -> float:
    """A cell a layer, with its letter; below it a second row where feed-forwards vary; what the order is, in words."""
    rows = [o.letters] + ([o.feeding] if o.feeding_varies else [])
    styles = {k: _mixer_style(m, spec.context_length) for k, m in o.mixers.items()} | {
        k: _ffn_style(f) for k, f in o.ffns.items()
    }
    left = _MARGIN + 24
    shown = min(spec.n_layers, _PER_ROW * _MAX_ROWS)
    for start in range(0, shown, _PER_ROW):
        c.text(left - 4, y + 9, str(start), 9, "m", "end", 24)
        for letters in rows:
            part = letters[start : start + _PER_ROW]
            for letter in dict.fromkeys(part):
                style = styles.get(letter, "n")
                boxes, between = _cells(part, letter, left, y)
                c.path(boxes, style)
                if between:
                    c.path(between, f"{style} j")
            c.cells(left, y + 9, part, 9, _CELL)
            y += _CELL
        y += 3 if len(rows) > 1 else 0
    if shown < spec.n_layers:
        y += c.lines(left, y, f"… and {spec.n_layers - shown:,} more", _SMALL, WIDTH - left - _MARGIN, "m")
    named = {x: MEANINGS[x.upper()] for x in (*o.mixers, *o.ffns) if x.upper() in MEANINGS and x != "-"}
    named = {x: f"other {text}" if x.islower() else text for x, text in named.items()}
    key = ", ".join(f"{x} {text}" for x, text in named.items() if x in o.letters or len(rows) > 1)
    parts = [pattern(o.letters)] + ([f"feed-forward {pattern(o.feeding)}"] if o.feeding_varies else [])
    if len(text := "Layers: " + "; ".join(parts)) <= 110:  # the strip says it better
        y += c.lines(_MARGIN, y + 2, text, _SMALL, WIDTH - 2 * _MARGIN, "m")
    return y + c.lines(_MARGIN, y + 2, key, _SMALL, WIDTH - 2 * _MARGIN, "m") + 2


def _cells(row: str, letter: str, left: float, y: float) -> tuple[str, str]:
    """The cells of a row that hold `letter`: each run of them as one box, and what is between its cells, a line of dashes."""
    boxes = between = ""
    for run in re.finditer(f"{re.escape(letter)}+", row):
        n, x = len(run[0]), left + run.start() * _CELL
        w = n * _CELL - 1
        boxes += f"M{x:g} {y:g}h{w:g}v{_CELL - 2:g}h-{w:g}z"
        if n > 1:
            between += f"M{x + _CELL - 1:g} {y + _CELL / 2 - 1:g}h{(n - 2) * _CELL + 1:g}"
    return boxes, between


# ---- frames


def _frames(spec: Spec, o: Order) -> list[Frame]:
    frames: dict[tuple[Layer, tuple[bool, bool, bool]], Frame] = {}
    for n, layer in enumerate(spec.layers):
        # What a frame is known by: everything but which mixer and which feed-forward.
        key = dataclasses.replace(layer, mixer=None, ffn=None, beside=None)
        halves = (layer.mixer is not None, layer.ffn is not None, layer.beside is not None)
        at = frames.setdefault((key, halves), Frame(layer))
        for letters, letter in ((at.mixers, o.mixing[n]), (at.ffns, o.feeding[n])):
            if letter not in letters:
                letters.append(letter)
            at.count[letter] = at.count.get(letter, 0) + 1
        frames[key, halves] = dataclasses.replace(at, n=at.n + 1)
    return list(frames.values())


def _frame(c: Canvas, spec: Spec, o: Order, f: Frame, top: float) -> float:
    """A frame whose top is `top`; where it ends. Its branches, from the last to the first."""
    x = f.layer
    y = top + 8
    title = f"{spec.n_layers} layers" if f.n == spec.n_layers else f"{f.n} of {spec.n_layers} layers"
    y += c.lines(_INNER, y, title, _TITLE, WIDTH - _INNER - 2 * _MARGIN, "b") + 4
    streams = spec.altup.n_streams if spec.altup else spec.hyper.n_streams if spec.hyper else 1
    if others := words.others(x, _LAYER):
        y += _put(c, Box("n", "Also", others), _RAIL - 8, y, WIDTH - _RAIL - 14, 1) + 6
    if spec.altup is not None:
        predict, correct, laurel = words.altup(spec.altup)
    if spec.hyper is not None:
        box = Box("n", "Hyper-connections", words.hyper(spec.hyper)[0])
        y += _put(c, box, _RAIL - 8, y, WIDTH - _RAIL - 14, 1) + 6
    if x.scalar:
        y += (
            _put(c, Box("n", lines=[Line("x × a learned number", True)]), _RAIL - 8, y, WIDTH - _RAIL - 14, 1)
            + 6
        )
    if spec.per_layer_embedding is not None:
        p = spec.per_layer_embedding
        y = _branch(c, [Box("v", "Per-layer input", words.per_layer(p, spec.n_layers)[1])], y, "")
    if spec.altup is not None:
        y += _put(c, Box("n", "AltUp", correct), _RAIL - 8, y, WIDTH - _RAIL - 14, 1) + 6
    scale = f"× {number(x.residual_scale)}" if x.residual_scale != 1 else ""
    mixing = _wrapped(x.attn_norm, _mixing(o, f, spec.context_length), x.attn_post_norm)
    feeding = _wrapped(x.ffn_norm, _feeding(o, f), x.ffn_post_norm)
    if x.parallel and x.mixer is not None and x.ffn is not None:
        one = x.ffn_norm is None
        left = _wrapped(None if one else x.attn_norm, _mixing(o, f, spec.context_length), x.attn_post_norm)
        branch: list[Node] = [Row([Stack(left), Stack(feeding)], joined=True)]
        y = _branch(c, [*branch, *(_norm(x.attn_norm) if one else [])], y, scale)
    else:
        if x.ffn is not None:
            y = _branch(c, feeding, y, scale)
        if x.mixer is not None:
            if spec.altup is not None:
                mixing = [Box("n", "LAuReL", laurel), *mixing]
            y = _branch(c, mixing, y, scale)
    if spec.altup is not None:
        y += 4
        y += _put(c, Box("n", "AltUp", predict), _RAIL - 8, y, WIDTH - _RAIL - 14, 1)
    y += 6
    c.rect(_MARGIN, top, WIDTH - 2 * _MARGIN, y - top, "f", 0)
    for n in range(min(streams, 4)):
        c.path(f"M{_RAIL - 4 * n:g} {y:g}V{top:g}", "u")
    return y


def _branch(c: Canvas, nodes: Sequence[Node], y: float, scale: str) -> float:
    """What is added to the stream: from the fork below the last node to the sum above the first."""
    room = WIDTH - _INNER - _MARGIN - 8
    middle = _INNER + room / 2
    room_above = 24 if scale else 14
    c.path(f"M{middle:g} {y + room_above:g}V{y + 6:g}H{_RAIL + 5:g}", "w")
    c.path(f"M{_RAIL + 9:g} {y + 3:g}l-4 3 4 3", "w")
    c.path(f"M{_RAIL - 5:g} {y + 6:g}a5 5 0 1 1 0 .1zm1 0h8m-4-4v8", "k")
    if scale:
        c.text(_RAIL + 14, y + 18, scale, _SMALL, "r", room=100)
    y += room_above
    for n, node in enumerate(nodes):
        y += _put(c, node, _INNER, y, room, 1)
        if n < len(nodes) - 1:
            y = _arrow(c, middle, y)
    c.path(f"M{_RAIL:g} {y + 8:g}H{middle:g}V{y:g}m-3 4l3-4 3 4", "w")
    return y + 14


def _arrow(c: Canvas, x: float, y: float) -> float:
    c.path(f"M{x:g} {y + _GAP:g}V{y:g}m-3 4l3-4 3 4", "w")
    return y + _GAP


def _norm(n: Norm | None) -> list[Node]:
    return [Box("n", lines=[Line(words.norm(n))])] if n is not None else []


def _wrapped(before: Norm | None, what: Node, after: Norm | None) -> list[Node]:
    """From top to bottom: what comes last is above."""
    return [*_norm(after), what, *_norm(before)]


def _mixing(o: Order, f: Frame, context: int) -> Node:
    kinds: list[Node] = []
    for letter in (x for x in f.mixers if x != "-"):
        boxes = [
            _mixer_box(m, f"{letter} · {f.count[letter]}" if len(o.mixers) > 1 else "", context)
            for m in o.mixers[letter]
        ]
        kinds.append(Row(boxes, joined=True) if len(boxes) > 1 else boxes[0])
    return kinds[0] if len(kinds) == 1 else Stack(kinds[::-1], "one of these, by layer")


def _mixer_box(m: Mixer, note: str, context: int) -> Box:
    icon = ""
    if isinstance(m, Attention):
        icon = "full" if sees_all(m, context) else "window" if m.window else "chunk"
    elif isinstance(m, LatentAttention):
        icon = "full" if m.indexer is None and m.indexer_from is None else "sparse"
    elif isinstance(m, CompressedAttention):
        icon = "window" if m.compressor is None else "entries"
    return Box(_mixer_style((m,), context), words.mixer_title(m), words.mixer(m), note, icon=icon)


def _feeding(o: Order, f: Frame) -> Node:
    letters = [x for x in f.ffns if x != "-"]
    known = sum(x is not None for x in o.ffns.values()) > 1
    kinds = [
        _ffn_box(m, f"{x} · {f.count[x]}" if known else "") for x in letters if (m := o.ffns[x]) is not None
    ]
    if not kinds:
        return Stack([])
    return kinds[0] if len(kinds) == 1 else Stack(kinds[::-1], "one of these, by layer")


def _ffn_box(x: FFN, note: str) -> Box:
    if not isinstance(x, MoE):
        return Box("d", "Feed-forward", words.mlp(x), note)
    said = words.experts(x)
    routed = Box("i", "Routed experts", said.routed, dots=(x.n_experts, x.router.top_k))
    router = Box("i", "Router", said.router)
    shared = [Box("i", "Shared expert", said.shared)] if x.shared is not None else []
    return Box("e", "Mixture of experts", said.about, note, inside=[Row([*shared, routed]), router])


def _mixer_style(m: tuple[Mixer, ...], context: int) -> str:
    if isinstance(m[0], Attention) and not sees_all(m[0], context):
        return "h"
    if isinstance(m[0], CompressedAttention):
        return "h" if m[0].compressor is None else "a"
    return "a" if isinstance(m[0], Attention | LatentAttention) else "l"


def _ffn_style(f: FFN | None) -> str:
    return "n" if f is None else "e" if isinstance(f, MoE) else "d"


# ---- ends


def _top(spec: Spec, ahead: Ahead | None) -> list[Node]:
    head = [
        Line(
            f"{number(spec.d_model)} → {number(spec.vocab_size)}"
            + (", tied: the embedding itself" if spec.tied else "")
        )
    ]
    head += [Line("with a bias", True)] if spec.head_bias else []
    head += [Line(f"logits × {number(spec.logit_scale)}", True)] if spec.logit_scale != 1 else []
    head += (
        [Line(f"logits capped at {number(spec.logit_softcap)}", True)]
        if spec.logit_softcap is not None
        else []
    )
    out: list[Node] = []
    if others := words.others(spec, _SPEC):
        out.append(Box("g", "Also", others))
    if ahead is not None:
        many = "" if ahead.layers is None else f"{ahead.layers} more layer{'s' * (ahead.layers != 1)}, "
        out.append(Box("g", "Multi-token prediction", [Line(f"{many}kept aside: no part in these logits")]))
    last: list[Node] = [Box("n", "Hyper-connections", words.hyper(spec.hyper)[1])] if spec.hyper else []
    return [*out, Box("v", "Head", head), *_norm(spec.norm), *last]


def _bottom(spec: Spec) -> list[Node]:
    lines = [Line(f"{number(spec.vocab_size)} × {number(spec.d_model)}")]
    lines += [Line(f"× {number(spec.embed_scale)}")] if spec.embed_scale != 1 else []
    if spec.positions is not None:
        offset = f", from row {spec.positions_offset}" if spec.positions_offset else ""
        lines.append(Line(f"+ learned positions: {number(spec.positions)}{offset}"))
    lines += [Line(f"then {words.norm(spec.embed_norm)}", True)] if spec.embed_norm is not None else []
    table: list[Node] = []
    if (p := spec.per_layer_embedding) is not None:
        table = [Box("v", "Per-layer embeddings", words.per_layer(p, spec.n_layers)[0])]
    return [Box("v", "Embedding", lines), *table]


# ---- placing


def _put(c: Canvas, node: Node, x: float, y: float, w: float, depth: int) -> float:
    """Put a node at (x, y), `w` wide, in so many boxes; its height."""
    if isinstance(node, Row):
        if w / len(node.nodes) < 140:  # too narrow to be read: one above the other
            return _put(c, Stack(node.nodes), x, y, w, depth)
        return _put_row(c, node, x, y, w, depth)
    if isinstance(node, Stack):
        return _put_stack(c, node, x, y, w, depth)
    return _put_box(c, node, x, y, w, depth)


def _put_row(c: Canvas, row: Row, x: float, y: float, w: float, depth: int) -> float:
    each = (w - 6 * (len(row.nodes) - 1)) / len(row.nodes)
    bar = 8.0 if row.joined else 0.0
    heights = [_put(c, n, x + i * (each + 6), y + bar, each, depth) for i, n in enumerate(row.nodes)]
    if row.joined:
        low = y + max(heights) + 2 * bar
        for i, h in enumerate(heights):
            middle = x + i * (each + 6) + each / 2
            c.path(
                f"M{x + w / 2:g} {y:g}H{middle:g}v{bar:g}M{middle:g} {y + bar + h:g}V{low:g}H{x + w / 2:g}",
                "w",
            )
    return max(heights) + 2 * bar


def _put_stack(c: Canvas, s: Stack, x: float, y: float, w: float, depth: int) -> float:
    top, pad = y, 6.0 if s.one_of else 0.0
    if s.one_of:
        y += 4 + c.lines(x + pad + 2, y + 4, s.one_of, _SMALL, w - 2 * pad, "m")
    for n, node in enumerate(s.nodes):
        y += _put(c, node, x + pad, y, w - 2 * pad, depth + bool(s.one_of))
        if n < len(s.nodes) - 1:
            y = y + 6 if s.one_of else _arrow(c, x + w / 2, y)
    y += pad
    if s.one_of:
        c.rect(x, top, w, y - top, "g", depth)
    return y - top


def _put_box(c: Canvas, b: Box, x: float, y: float, w: float, depth: int) -> float:
    top, pad = y, 8.0
    y += 5
    room = w - 2 * pad
    if b.note:
        c.text(x + w - pad, y + math.ceil(_TITLE), b.note, _SIZE, "m", "end", room)
    if b.title:
        left = room - (text_width(b.note, _SIZE) + 8 if b.note else 0)
        fits = text_width(b.title, _TITLE, bold=True) <= left
        y += c.lines(x + pad, y, b.title if fits else words.SHORT.get(b.title, b.title), _TITLE, left, "b")
    if b.icon and w > 200:
        _icon(c, b.icon, x + w - pad - 26, y + 2)
        room -= 32
    for line in b.lines:
        said = f"◆ {line.text.strip()}" if line.rare else line.text
        y += c.lines(x + pad, y, said, _SIZE, room, "r" if line.rare else "")
    if b.dots is not None:
        y += _dots(c, *b.dots, x + pad, y + 3, room) + 3
    y = max(y, top + 36) if b.icon and w > 200 else y
    for n, node in enumerate(b.inside):
        y += (5 if n or b.lines else 2) + _put(
            c, node, x + pad, y + (5 if n or b.lines else 2), w - 2 * pad, depth + 1
        )
    y += 6 if not b.inside else pad
    c.rect(x, top, w, y - top, b.style, depth)
    return y - top


def _dots(c: Canvas, n: int, full: int, x: float, y: float, w: float) -> float:
    """A square an expert, those that a token visits full. Lines of dashes: a thousand squares cost a few bytes."""
    size, pitch = (4.0, 6.0) if n <= 160 else (2.5, 4.0)
    per_row = int(w / pitch)
    rows = min(-(-n // per_row), 20)

    def lines(count: int) -> str:
        each = [min(per_row, count - r * per_row) for r in range(min(rows, -(-count // per_row)))]
        return "".join(
            f"M{x:g} {y + r * pitch + size / 2:g}h{k * pitch - (pitch - size):g}" for r, k in enumerate(each)
        )

    c.path(lines(n), "q y" if size == 4 else "q z")
    c.path(lines(full), "s y" if size == 4 else "s z")
    return rows * pitch


_ICONS = {
    "full": "v24h24z",
    "window": "v9l15 15h9z",
    "chunk": "v8h8zm8 8v8h8zm8 8v8h8z",
    "entries": "v9l15 15h9zm0 13h3v3h-3zm0 5h3v3h-3zm5 0h3v3h-3z",
    "sparse": "v4h4zm0 10h4v4h-4zm10 4h4v4h-4zm-4 4h4v4h-4zm16 2h4v4h-4zm-20 0h4v4h-4z",
}
"""Which keys (across) a query (down) may see."""


def _icon(c: Canvas, kind: str, x: float, y: float) -> None:
    c.path(f"M{x:g} {y:g}h24v24h-24z", "q")
    c.path(f"M{x:g} {y:g}{_ICONS[kind]}", "c")
