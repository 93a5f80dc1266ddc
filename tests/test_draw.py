"""Pictures of Specs: everything that a Spec says is in them, nothing overlaps, and they are sound SVG."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import typing
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from zoo import families, manifest
from zoo.cli import cli
from zoo.draw import Ahead, Facts, ahead, boxes, drawing, picture, side_by_side, words
from zoo.order import order, pattern
from zoo.spec import (
    MLP,
    Alibi,
    AltUp,
    Attention,
    DeltaNet,
    Indexer,
    LatentAttention,
    Layer,
    Mamba,
    MoE,
    Norm,
    PerLayerEmbedding,
    QKNorm,
    QueryScale,
    Rope,
    RopeScaling,
    Router,
    ShortConv,
    Spec,
)

CONFIGS = Path(__file__).parents[1] / "manifests" / "configs"


@functools.cache
def release(name: str) -> Spec:
    m = manifest.find(name)
    assert m.config is not None
    return families.spec_of(m.config, families.get(m.family), name)


def said(spec: Spec) -> str:
    """All text of the picture of `spec`, lines that were wrapped joined again."""
    return " ".join(t.text.strip() for t in picture.draw(spec, Facts("x"))[0].texts)


# ------------------------------------------------------------------ nothing of a Spec is left out

RMS = Norm(1e-6, weight="plus_one")
LAYER = Norm(1e-5, "layer")
YARN = Rope(
    1e4, 32, RopeScaling("yarn", 4.0, 4096, 2.0, 8.0, 16.0, 2.0, False, 1.1, 1.2), turning=8, backwards=True
)
LLAMA3 = Rope(5e5, 64, RopeScaling("llama3", 8.0, 8192, 1.5, 4.0), interleaved=True)
LONG = Rope(1e4, 64, RopeScaling("longrope", 32.0, 4096, short=(1.0, 1.5), long=(2.0, 60.0)))
GATED = MLP(640, "silu", limit=7.0, limit_after=True, sparsity=0.9, gate_scale=0.5, out_scale=0.25)
ROUTER = Router(
    3, "sigmoid", "near", True, True, 4, 2, 3, "zero", True, 1e-20, 2.5, 30.0, normalize_floor=0.1,
    expert_scale=True, norm=RMS, input_scale=0.1, near=0.02,
)  # fmt: skip
ATTENTION = Attention(
    8, 2, 64, v_head_dim=32, scale=0.2, rope=YARN, window=128, qkv_bias=True, out_bias=True, qk_norm=QKNorm(LAYER, "each_head", True),
    value_norm=RMS, query_scale=QueryScale("floor_log", 8192, 0.1, 1), sinks=True, softcap=50.0, gate=True, value_scale=0.9,
    kv_from=0, value_from_key=True, clip=8.0,
)  # fmt: skip
LATENT = LatentAttention(
    8, 512, 128, 64, 96, 0.1, RMS, 1536, LLAMA3, QueryScale("log", 4096), True, True,
    Indexer(4, 128, 2048, LONG, LAYER),
)  # fmt: skip
MIXERS = (
    ATTENTION,
    Attention(8, 8, 64, scale=0.125, chunk=8192, alibi=Alibi(0.5)),
    Attention(8, 1, 64, scale=0.125, rope=Rope(1e4, 64, RopeScaling("linear", 8.0))),
    LATENT,
    dataclasses.replace(LATENT, indexer=None, indexer_from=3, q_rank=None, query_scale=None),
    DeltaNet(4, 8, 96, 128, 4, "head", "silu", RMS),
    Mamba(24, 64, 2, 128, 4, RMS, True, 0.01, True, 1.25, (0.3, 0.4), 0.2),
    ShortConv(3, True),
)
FFNS = (
    GATED,
    MLP(640, "silu_clamped", limit=7.0, alpha=1.7, bias=True),
    MoE(64, GATED, ROUTER, MLP(320), True, True, 96, 0.5, 3.0, RMS, LAYER, RMS),
)
WHOLE = tuple(
    Layer(m, FFNS[n % 3], RMS, RMS, LAYER, RMS, residual_scale=0.22, scalar=True)
    for n, m in enumerate(MIXERS)
)
SPEC = Spec(
    "test", 256, 1000, WHOLE, RMS, True, 4096, 2048, 16.0, "first", 0.5, 30.0, AltUp(4, 1, 64, RMS, 120.0),
    PerLayerEmbedding(990, 24, RMS), positions_offset=2, embed_norm=LAYER,
)  # fmt: skip
PARTED = Layer(MIXERS[2], FFNS[0], RMS, None, LAYER, None, parallel=True, beside=MIXERS[6])  # type: ignore[arg-type]
# What has no meaning beside another value, or no number of its own in a picture.
MEANINGLESS = {
    "bias of an RMSNorm", "alpha of another activation", "beta of a log", "offset of a log", "bf16", "dtype", "notes",
    "kv_from", "indexer_from",  # which earlier layer: the strip would be a list of numbers
}  # fmt: skip


def changed(x: Any, tp: Any = None) -> Iterator[tuple[str, Any]]:
    """`x` with one thing in it changed, for every field below it, and the field's path."""
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        hints = typing.get_type_hints(type(x))
        for f in dataclasses.fields(x):
            value = getattr(x, f.name)
            if f.name in words.SILENT or f.name in MEANINGLESS or meaningless(x, f.name):
                continue
            for path, other in changed(value, hints[f.name]):
                yield f"{type(x).__name__}.{f.name} {path}", dataclasses.replace(x, **{f.name: other})
            if value is not None and type(None) in typing.get_args(hints[f.name]):
                yield f"{type(x).__name__}.{f.name} left out", dataclasses.replace(x, **{f.name: None})
    elif isinstance(x, tuple) and x:
        for n, item in enumerate(x):
            for path, other in changed(item):
                yield f"[{n}] {path}", (*x[:n], other, *x[n + 1 :])
    elif typing.get_origin(tp) is typing.Literal:
        for other in (
            *typing.get_args(tp),
            "what comes after",
        ):  # which zoo.json would refuse, until it is known
            if other != x:
                yield other, other
    elif isinstance(x, bool):
        yield str(not x), not x
    elif isinstance(x, int | float):
        yield "another number", x + 1 if isinstance(x, int) else x * 1.5 or 0.3


def meaningless(x: Any, field: str) -> bool:
    return (
        (isinstance(x, Norm) and field == "bias" and x.kind == "rms")
        or (isinstance(x, Norm) and field == "kind")
        or (isinstance(x, MLP) and field == "alpha" and x.act != "silu_clamped")
        or (
            isinstance(x, MLP) and field == "act"
        )  # names of activations have a table, and a test, of their own
        or (isinstance(x, QueryScale) and field in ("kind", "beta", "offset") and x.kind == "log")
        or (isinstance(x, RopeScaling) and (field == "kind" or (field == "truncate" and x.kind != "yarn")))
        or (isinstance(x, Router) and field == "over")
    )


def test_whatever_changes_in_a_part_of_a_spec_changes_its_words() -> None:
    seen = set()
    parts = itertools.chain(
        ((m, words.mixer) for m in MIXERS),
        ((f, words.mlp) for f in FFNS[:2]),
        ((FFNS[2], words.experts), (SPEC.altup, words.altup)),
        ((n, words.norm) for n in (RMS, LAYER)),
    )
    for part, say in parts:
        before = (words.mixer_title(part) if part in MIXERS else "", say(part))  # type: ignore[arg-type, operator]
        for path, other in changed(part):
            after = (words.mixer_title(other) if part in MIXERS else "", say(other))  # type: ignore[operator]
            assert after != before, f"{path}: the picture is the same"
            seen.add(path.split()[0])
    for cls in (Attention, LatentAttention, DeltaNet, Mamba, ShortConv, MLP, MoE, Norm, AltUp):
        silent = words.SILENT | MEANINGLESS
        missing = {f"{cls.__name__}.{f.name}" for f in dataclasses.fields(cls) if f.name not in silent} - seen
        assert missing <= {"MLP.act", "Attention.alibi"}, missing


def test_whatever_changes_in_a_layer_or_at_the_ends_changes_the_picture() -> None:
    plain = Layer(MIXERS[2], FFNS[0], RMS)
    for spec in (
        dataclasses.replace(SPEC, layers=(WHOLE[0], plain)),
        dataclasses.replace(SPEC, layers=(PARTED,), tied=False, head_bias=True, altup=None),
    ):
        before = said(spec)
        layer, ends = spec.layers[0], dataclasses.replace(spec, layers=())
        for path, other in changed(ends):
            assert said(dataclasses.replace(other, layers=spec.layers)) != before, path
        for f in (
            "attn_norm",
            "attn_post_norm",
            "ffn_norm",
            "ffn_post_norm",
            "residual_scale",
            "scalar",
            "beside",
        ):
            value = getattr(layer, f)
            other = (
                None
                if isinstance(value, Norm | Mamba)
                else RMS
                if value is None and "norm" in f
                else not value
            )
            if other != value and not (f == "beside" and value is None):
                one = dataclasses.replace(layer, **{f: other if f != "residual_scale" else 0.5})
                assert said(dataclasses.replace(spec, layers=(one, *spec.layers[1:]))) != before, f
    shapes = [
        picture.draw(
            dataclasses.replace(SPEC, layers=(dataclasses.replace(PARTED, parallel=p),)), Facts("x")
        )[0]
        for p in (True, False)
    ]
    assert shapes[0].rects != shapes[1].rects


def test_a_field_or_a_kind_that_pictures_do_not_know_is_written_as_it_stands() -> None:
    @dataclasses.dataclass(frozen=True)
    class Later(MLP):
        hash_routing: int = 0

    @dataclasses.dataclass(frozen=True)
    class Hyena:
        taps: int = 0
        kind: str = "hyena"

    later = dataclasses.replace(SPEC, layers=(Layer(Hyena(77), Later(640, hash_routing=12345)),))  # type: ignore[arg-type]
    assert "hash routing: 12,345" in said(later) and "taps: 77" in said(later) and "Hyena" in said(later)


def test_each_activation_has_a_name() -> None:
    acts = typing.get_args(typing.get_type_hints(MLP)["act"])
    names = {words.mlp_title(MLP(8, act, gated)) for act in acts for gated in (True, False)}
    assert not names & set(acts) - {"xielu", "silu_clamped"}


# ------------------------------------------------------------------ what the article's figures say is in ours


@pytest.mark.parametrize(
    ("name", "facts"),
    {
        "deepseek-v3": "61 layers; latent attention; 128 heads of 128 + 64 rotary; latent of 512; queries through 1,536; 3 D, 58 E; "
        "8 of 256 active; SwiGLU, width 2,048; Shared expert; best 4 of 8 groups; Multi-token prediction; 1 more layer",
        "llama-4-maverick": "48 layers; 12 × (3 C, N); 24 × (D, E); 1 of 128 active; Shared expert; SwiGLU, width 8,192; chunk of 8,192",
        "gemma-3-27b": "10 × (5 S, F), 2 S; sliding window 1,024; 32 query heads, 16 KV heads; QK-norm per head; 5,376 → 262,208; tied",
        "gpt-oss-20b": "12 × (S, F); sliding window 128; sinks: a learned logit per head; 4 of 32 active; biases on q, k, v and output; "
        "width 2,880",
        "qwen3-next-80b-a3b-instruct": "12 × (3 G, F); Gated DeltaNet; 16 key heads, 32 value heads; output gate: sigmoid; 64 of 256 "
        "channels; 10 of 512 active; behind a sigmoid gate; RMSNorm (1 + w); Multi-token prediction",
        "kimi-linear-48b-a3b": "6 × (3 K, L), 2 K, L; Kimi Delta Attention; decay per channel; 128 + 64 shared by all; no positions in attention; 8 of 256 active",
        "nemotron-3-nano-30b-a3b": "23 of 52 layers; 29 of 52 layers; Mamba-2; state 128; M · 23; N · 6; 6 of 128 active; squared ReLU; "
        "Shared expert",
        "gemma-4-26b-a4b-it": "5 × (5 S, F); values are the keys before their norm; 128 of 512 turn; sliding window 1,024; 8 of 128 active",
        "gemma-3n-e2b": "4 streams predicted; Per-layer embeddings; 262,144 × 30 layers × 256; low rank 64; keys and values of an earlier",
        "olmo-3-7b": "8 × (3 S, F); Multi-head attention; QK-norm over all heads; YaRN",
        "falcon-h1-0.5b": "GQA; Mamba-2; 36 H; gate × 0.883883; logits × 0.0390625",
        "jamba-v0.1": "4 × (4 B, N, 3 B); B Mamba, N attention without positions; dt from 256; 2 of 16 active",
        "minimax-m2": "on 64 of 128 channels; QK-norm over all heads; 8 of 256 active",
        "bloom-7b1": "ALiBi; then LayerNorm; biases; tied",
        "glm-5": "sparse: indexer picks 2,048 keys; indexer: 32 heads of 128",
    }.items(),
)
def test_the_picture_says_what_the_articles_figure_says(name: str, facts: str) -> None:
    m = manifest.find(name)
    told = Facts(name, (), ahead(m.config or {}, families.get(m.family)))
    text = " ".join(t.text.strip() for t in picture.draw(release(name), told)[0].texts)
    for fact in facts.split("; "):
        assert fact in text, f"{fact}: not in {text}"


# ------------------------------------------------------------------ geometry


def inside(a: boxes.Rect, b: boxes.Rect) -> bool:
    return a.x >= b.x and a.y >= b.y and a.x + a.w <= b.x + b.w + 0.01 and a.y + a.h <= b.y + b.h + 0.01


def apart(a: Any, b: Any) -> bool:
    return a[0] >= b[2] - 0.01 or b[0] >= a[2] - 0.01 or a[1] >= b[3] - 0.01 or b[1] >= a[3] - 0.01


def extent(t: boxes.Text) -> tuple[float, float, float, float]:
    left = t.x - {"start": 0.0, "middle": t.width / 2, "end": t.width}[t.anchor]
    if t.pitch:
        left = t.x - t.pitch / 2
    return left, t.y - 0.75 * t.size, left + t.width, t.y + 0.2 * t.size


def is_in_order(canvas: boxes.Canvas, height: float) -> None:
    page = boxes.Rect(0, 0, picture.WIDTH, height, "", -1)
    for a, b in itertools.combinations(canvas.rects, 2):
        ends = [(r.x, r.y, r.x + r.w, r.y + r.h) for r in (a, b)]
        assert apart(*ends) or (inside(a, b) and a.depth > b.depth) or (inside(b, a) and b.depth > a.depth), (
            a,
            b,
        )
    for t in canvas.texts:
        assert t.width <= max(t.room, 1) + 0.01, f"{t.text!r} is wider than its box"
        x0, y0, x1, y1 = extent(t)
        assert inside(boxes.Rect(x0, y0, x1 - x0, y1 - y0, "", 0), page), t
        for r in canvas.rects:
            r_ends = (r.x, r.y, r.x + r.w, r.y + r.h)
            assert apart((x0, y0, x1, y1), r_ends) or inside(
                boxes.Rect(x0, y0, x1 - x0, y1 - y0, "", 0), r
            ), (t, r)
    texts = sorted(canvas.texts, key=lambda t: t.y)
    for n, t in enumerate(texts):
        for other in texts[n + 1 : n + 9]:
            assert apart(extent(t), extent(other)), f"{t.text!r} lies on {other.text!r}"


def drawn(name: str) -> None:
    m = manifest.find(name)
    facts = Facts(name, ["a line of facts"], ahead(m.config or {}, families.get(m.family)))
    is_in_order(*picture.draw(release(name), facts))
    text = drawing(release(name), facts)
    assert text == drawing(release(name), facts)
    assert ET.fromstring(text).tag.endswith("svg")


WITH_CONFIG = [m for m in manifest.load_all() if m.config is not None]
# Every kind of frame: experts, hybrids, side by side, streams, per-layer inputs, many kinds of layer.
FRAMES = (
    "deepseek-v3", "gemma-3n-e2b", "glm-5.2", "gpt-neox-20b", "falcon-h1-0.5b", "nemotron-3-nano-30b-a3b", "step-3.5-flash", "tiny-aya-3b",
)  # fmt: skip


def test_in_pictures_of_every_kind_boxes_do_not_overlap_and_hold_their_text() -> None:
    for name in FRAMES:
        drawn(name)
    is_in_order(*picture.draw(SPEC, Facts("x" * 200, ["word " * 40], Ahead(3))))
    is_in_order(*picture.draw(dataclasses.replace(SPEC, layers=(PARTED, WHOLE[3]) * 20), Facts("")))


@pytest.mark.proof
def test_in_a_picture_of_every_release_boxes_do_not_overlap_and_hold_their_text() -> None:
    for m in WITH_CONFIG:
        drawn(m.name)


def test_text_is_never_wider_than_estimated_in_the_widest_font_asked_for() -> None:
    ft2font = pytest.importorskip("matplotlib.ft2font")
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    text = {
        t.text
        for name in ("deepseek-v3", "gemma-3n-e2b", "falcon-h1-0.5b")
        for t in picture.draw(release(name), Facts(name))[0].texts
    }
    for file, bold in (("DejaVuSans.ttf", False), ("DejaVuSans-Bold.ttf", True)):
        font = ft2font.FT2Font(folder / file)
        font.set_size(100, 72)
        for line in text:
            true = (
                sum(
                    font.load_char(ord(c), flags=ft2font.LoadFlags.NO_HINTING).linearHoriAdvance for c in line
                )
                / 65536
            )
            assert true <= boxes.text_width(line, 100, bold) * 1.02 + 10, line


# ------------------------------------------------------------------ the order of layers


@pytest.mark.parametrize(
    ("letters", "words"),
    [
        ("F", "F"), ("FFFF", "4 F"), ("SSSSSFSSSSSFSS", "2 × (5 S, F), 2 S"), ("DDDEEEE", "3 D, 4 E"), ("SFSFSF", "3 × (S, F)"),
        ("FSSSFSSSF", "2 × (F, 3 S), F"), ("SF", "S, F"), ("DEDEE", "2 × (D, E), E"),
    ],
)  # fmt: skip
def test_the_order_of_layers_is_told_in_few_words(letters: str, words: str) -> None:
    assert pattern(letters) == words


def test_the_order_of_four_thousand_layers_is_told_at_once_and_cut_in_the_picture() -> None:
    many = dataclasses.replace(SPEC, layers=(WHOLE[0], WHOLE[1], WHOLE[1]) * 1365, altup=None)
    assert "1365 × " in said(many) and "… and 3,807 more" in said(many)


def test_layers_that_reuse_different_layers_keys_are_of_one_kind() -> None:
    found = order(release("glm-5.2"))
    assert set(found.mixers) == {"X", "x"} and pattern(found.letters) == "2 X, 19 × (X, 3 x)"


def test_a_model_without_two_layers_alike_has_a_letter_and_a_box_for_each() -> None:
    many = tuple(Layer(dataclasses.replace(MIXERS[2], window=n), FFNS[0], RMS) for n in range(1, 301))  # type: ignore[arg-type]
    spec = dataclasses.replace(SPEC, layers=many, altup=None)
    assert len(set(order(spec).letters)) == 300
    assert said(spec).count("sliding window") >= 300


def test_a_window_as_long_as_the_context_bounds_nothing_and_learned_positions_are_positions() -> None:
    assert set(order(release("phi-3.5-mini")).letters) == {"F"} and set(order(release("gpt2")).letters) == {
        "F"
    }
    assert set(order(release("mistral-7b-v0.1")).letters) == {"S"} and set(
        order(release("smollm3-3b")).letters
    ) == {"F", "N"}


# ------------------------------------------------------------------ SVG, and the command


def test_names_from_elsewhere_are_text_and_nothing_else() -> None:
    name = "</text><script>alert(1)</script>&\x00\x1b]\ud800￿"
    for text in (drawing(SPEC, Facts(name)), side_by_side([(SPEC, Facts(name)), (SPEC, Facts("b"))])):
        root = ET.fromstring(text)
        assert not [e for e in root.iter() if e.tag.endswith("script")]
        assert root.find("{*}title") is not None and root.find("{*}desc") is not None
        assert "prefers-color-scheme:dark" in text


def test_side_by_side_marks_the_lines_that_differ_and_no_others() -> None:
    a, b = release("llama-3.1-8b"), release("qwen3-8b")
    root = ET.fromstring(side_by_side([(a, Facts("a")), (b, Facts("b"))]))
    groups = [g for g in root.findall(".//{*}g") if "o" in (g.get("class") or "").split()]
    marked = {e.text for g in groups for e in g.findall("{*}text")}
    assert "  RMSNorm, ε 1e-6" in marked and "36 layers" in marked and "32 layers" in marked
    assert not marked & {"Feed-forward", "a", "b", "Grouped-query attention", "Head"}
    same = side_by_side([(a, Facts("a")), (a, Facts("b"))])
    assert not [e for e in ET.fromstring(same).findall(".//{*}g") if "o" in (e.get("class") or "").split()]


def show(*args: str) -> Any:
    return CliRunner().invoke(cli, ["show", *args])


def test_show_draws_releases_and_what_lies_on_disk(tmp_path: Path) -> None:
    out = tmp_path / "x.svg"
    assert json.loads(show("gpt-oss-20b", "--svg", str(out), "--json").stdout)["drawn"] == ["gpt-oss-20b"]
    text = out.read_text(encoding="utf-8")
    assert "sinks: a learned logit per head" in text and "20.9B total" in text
    config = str(CONFIGS / "qwen3-8b.config.json")
    assert show(config, "gpt-oss-20b", "--svg", str(out)).exit_code == 0
    assert {"qwen3-8b", "gpt-oss-20b"} <= {e.text for e in ET.parse(out).findall(".//{*}text")}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(Path(config).read_text())
    shown = json.loads(show(str(tmp_path / "model" / "config.json"), "--json").stdout)
    assert shown["name"] == "model" and shown["params"]["total"] == 8_190_735_360


def test_the_documentation_shows_the_pictures_that_the_command_makes(tmp_path: Path) -> None:
    images = sorted((Path(__file__).parents[1] / "docs" / "images").glob("*.svg"))
    assert len(images) > 1
    for image in images:
        assert show(*image.stem.split("_"), "--svg", str(tmp_path / "x.svg")).exit_code == 0
        assert (tmp_path / "x.svg").read_bytes() == image.read_bytes(), (
            f"make it again: zoo show --svg {image}"
        )


def test_show_says_why_there_is_nothing_to_draw(tmp_path: Path) -> None:
    unknown = next(m.name for m in manifest.load_all() if m.config is None)
    with pytest.raises(families.ZooError, match=f"{unknown}: nothing to draw: zoo has no copy of its config"):
        CliRunner().invoke(
            cli,
            ["show", unknown, "--svg", str(tmp_path / "x.svg")],
            standalone_mode=False,
            catch_exceptions=False,
        )
    with pytest.raises(families.ZooError, match="5 names; side by side there is room for 4"):
        CliRunner().invoke(
            cli, ["show", *["gpt2"] * 5, "--svg", str(tmp_path / "x.svg")], catch_exceptions=False
        )
    assert not (tmp_path / "x.svg").exists()
