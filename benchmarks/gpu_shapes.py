"""Kernels on a GPU at random shapes, strides and dtypes, each against its plain twin in fp64.

    python benchmarks/gpu_shapes.py [--seconds 120] [--jobs 12] [--seed 0] [--json FILE]

The tests hold kernels to fixed shapes; this looks for those that nobody thought of: one head, rows at any distance, an
expert of three channels, blocks that end in the middle. A case is drawn from the seed and its number, so that one that
fails can be run again alone: --case KIND SEED. Exit code 1 if any differs.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpu import versions
from random_codes import components

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
# Of the result's norm: a sum's rounding in fp32, a result's and an activation's in its dtype.
TOLERANCE = {"float32": 3e-5, "float16": 4e-3, "bfloat16": 3e-2}
Pair = tuple[str, "torch.Tensor", "torch.Tensor"]  # what was computed, by the kernel, and by the twin


def norms(r: random.Random, dtype: torch.dtype) -> Iterator[Pair]:
    import torch

    from zoo.kernels import norm
    from zoo.spec import Norm

    b, t, h, d = (
        r.choice([1, 2]),
        r.choice([1, 3, 33]),
        r.choice([1, 2, 5]),
        r.choice([1, 7, 64, 100, 128, 520]),
    )
    spec = Norm(1e-6, weight=r.choice(["plain", "plus_one", "none"]), rounding=r.choice(["first", "last"]))
    weight = None if spec.weight == "none" else torch.randn(d).to(dtype)
    way = r.choice(["plain", "slice", "heads first", "padded", "channels first"])
    x = torch.randn(b, h, t + 3, d).to(dtype)
    if way == "slice":
        x = torch.randn(b, t, h, d + 5).to(dtype)[..., 2 : d + 2]
    elif way in ("heads first", "padded"):
        x = x[:, :, : t if way == "padded" else None].transpose(1, 2)
    elif way == "channels first":
        x = torch.randn(b, t, d, h).to(dtype).transpose(2, 3)
    what = f"norm {list(x.shape)} {x.stride()} {spec}"
    wide = None if weight is None else weight.double()
    yield what, norm.rms_norm(x, weight, spec), norm.rms_norm_reference(x.double(), wide, spec)


def attentions(r: random.Random, dtype: torch.dtype) -> Iterator[Pair]:
    import torch

    from zoo.kernels import attention

    sizes = [4, 8, 12, 16, 24, 32, 40, 64, 72, 80, 96, 112, 128, 192, 256]
    d, kv, groups = r.choice(sizes), r.choice([1, 2, 3, 4, 5]), r.choice([1, 2, 3, 7, 8])
    dv, h = r.choice([d, d, d, *sizes]), kv * groups
    b, t, pad = r.choice([1, 2]), r.choice([2, 5, 16, 17, 33, 64, 65, 200]), r.choice([0, 0, 1, 4, 8])
    extra: dict[str, Any] = {}
    if r.random() < 0.6:
        key = r.choice(["window", "chunk"])
        extra[key] = r.choice([1, 3, 16, 50, 129])
    if r.random() < 0.4:
        extra["softcap"] = 20.0
    wide = dict(extra)
    if r.random() < 0.3:
        extra["sinks"] = torch.randn(h).to(dtype)
        wide["sinks"] = extra["sinks"].double()
    widths = (h * d, kv * d, kv * dv, pad)
    parts = torch.randn(b, t, sum(widths)).to(dtype).split(widths, -1)
    q, k, v = (x.unflatten(-1, (n, -1)) for x, n in zip(parts, (h, kv, kv), strict=False))
    if r.random() < 0.3:
        k, v = k.contiguous(), v.contiguous()
    what = f"b {b} t {t} h {h} kv {kv} d {d} dv {dv} pad {pad} {extra}"
    exact = attention.attention_reference(q.double(), k.double(), v.double(), scale=d**-0.5, **wide)
    yield f"flash {what}", attention.flash(q, k, v, scale=d**-0.5, **extra), exact

    slots = t if "chunk" in extra else r.choice([t, t + 3, max(1, t - 5)])
    for one in (extra, wide):
        for key in {"window", "chunk"} & set(one):
            one[key] = min(one[key], slots)
    k, v = torch.randn(b, slots, kv, d).to(dtype), torch.randn(b, slots, kv, dv).to(dtype)
    at = torch.tensor(r.randint(0, t - 1))
    exact = attention.decode_reference(q[:, 0].double(), k.double(), v.double(), at, scale=d**-0.5, **wide)
    found = attention.decode(q[:, 0], k, v, at, scale=d**-0.5, **extra)
    yield f"decode {what} at {int(at)} of {slots}", found, exact


def latents(r: random.Random, dtype: torch.dtype) -> Iterator[Pair]:
    """What stands around latent attention: many queries' keys and values, a single one's projection."""
    import torch

    from zoo.kernels import latent

    b, t, h = r.choice([1, 2, 5]), r.choice([1, 2, 17, 64, 130]), r.choice([1, 2, 3, 16, 20, 128])
    own, v, rope, rank = (r.choice([4, 8, 12, 16, 20, 64, 128]) for _ in range(4))
    stored = torch.randn(b, t + 3, rank + rope + r.choice([0, 0, 4])).to(dtype)[:, : t + r.choice([0, 3])]
    up = torch.randn(h, own + v, rank).to(dtype)
    x, shared = stored[..., :rank], stored[..., rank : rank + rope]
    what = f"b {b} t {t} h {h} own {own} v {v} rope {rope} rank {rank} {stored.stride()}"
    found = latent.keys_and_values(x, shared, up, own)
    exact = latent.keys_and_values_reference(x.double(), shared.double(), up.double(), own)
    for part, y, z in zip(("keys", "values"), found, exact, strict=True):
        yield f"{part} {what}", y, z
    y = torch.randn(b, h, rank).to(dtype)
    exact_y = latent.out_of_latent_reference(y.double(), up[:, own:].double())
    yield f"out of {what}", latent.out_of_latent(y, up[:, own:]), exact_y


def mixers(r: random.Random, dtype: torch.dtype) -> Iterator[Pair]:
    """What linear mixers are made of."""
    import torch

    from zoo.kernels import conv, delta, norm
    from zoo.spec import Norm

    b, t = r.choice([1, 1, 2]), r.choice([1, 2, 7, 16, 17, 63, 64, 65, 130, 200, 257])
    groups, repeat = r.choice([1, 2, 3, 16]), r.choice([1, 2, 4])
    h, keys, v = groups * repeat, r.choice([8, 16, 20, 64, 100, 128]), r.choice([8, 16, 24, 40, 64, 128])
    kind = r.choice(["by head", "by channel", "uncorrected"])
    widths = (groups * keys, groups * keys, h * v)
    x, pad = torch.randn(b, t, sum(widths) + 8).to(dtype), r.choice([0, 3, 8])
    width, kept = r.choice([2, 3, 4]), r.random() < 0.5
    weight = torch.randn(sum(widths), width).to(dtype)
    bias = torch.randn(sum(widths)).to(dtype) if r.random() < 0.5 else None
    tail = torch.randn(b, width - 1, sum(widths)).to(dtype) if kept else None
    wide = [None if a is None else a.double() for a in (bias, tail)]
    x = x[..., pad : sum(widths) + pad]
    what = f"b {b} t {t} groups {groups} h {h} keys {keys} v {v} {kind}"
    mixed = conv.conv(x, weight, bias, tail)
    yield f"conv {what} width {width}", mixed, conv.conv_reference(x.double(), weight.double(), *wide)
    if tail is not None and wide[1] is not None:
        yield f"tail {what} width {width}", tail, wide[1]

    each = keys if kind == "by channel" else 1
    dt, beta = (torch.randn(b, t, h * each + h).to(dtype) * 3).split([h * each, h], -1)
    args = (
        dt.unflatten(-1, (h, each)), None if kind == "uncorrected" else beta, torch.randn(h), torch.randn(h * each), 1e-3
    )  # fmt: skip
    gates = delta.gates(*args)
    for name, g, exact in zip(("decay", "second"), gates, delta.gates_reference(*args), strict=True):
        # without beta they are of dt in its dtype
        yield f"{name} {what}", g.to(dtype) if kind == "uncorrected" else g, exact.double()

    q, k, u = mixed.split(widths, -1)
    q, k, u = q.unflatten(-1, (-1, keys)), k.unflatten(-1, (-1, keys)), u.unflatten(-1, (-1, v))
    if kind == "uncorrected":
        gates = (gates[0], gates[1] / keys)
    states = [torch.randn(b, h, keys, v)]
    states.append(states[0].clone())
    y = delta.mix(q, k, u, *gates, states[0], kind != "uncorrected")
    exact = delta.mix_reference(q.float(), k.float(), u.float(), *gates, states[1], kind != "uncorrected")
    yield f"mix {what}", y, exact.double()
    yield f"state {what}", states[0], states[1].double()

    spec = Norm(1e-6, weight=r.choice(["plain", "plus_one"]), rounding=r.choice(["first", "last"]))
    z, first = (
        torch.randn(b, t, h * v + 8).to(dtype)[..., pad : h * v + pad].view(b, t, h, v),
        r.random() < 0.5,
    )
    y, w, act = (
        y.float() if first else y.to(dtype),
        torch.randn(h, v) if first else torch.randn(v),
        r.choice(["silu", "sigmoid"]),
    )
    w = w.to(dtype)
    exact = norm.gated_norm_reference(y.double(), z.double(), w.double(), spec, act, first)
    yield f"gated norm {what} {spec} {act} {first}", norm.gated_norm(y, z, w, spec, act, first), exact


SCHEMES = [
    "plain",
    "fp8-block",
    "fp8-channel",
    "fp8-block-64x128",
    "fp8-block-1x128",
    "fp8-block-32x256",
    "fp8-tensor",
    "mxfp4",
    "int4-group32",
    "int4-group128",
]


def stored(
    r: random.Random, scheme: str, dtype: torch.dtype, parts: tuple[int, ...], k: int, *lead: int
) -> Any:
    """A random weight, expanded in fp64, and as kernels read it."""
    import torch

    from zoo.kernels import weights
    from zoo.quant import dequantise

    if scheme == "plain":
        w = (torch.randn(*lead, sum(parts), k) * 0.2).to(dtype)
        return w.double(), weights.plain(w)
    made = components(scheme, parts, k, *lead)
    if made["scale"].is_floating_point() and r.random() < 0.3:
        made["scale"] = made["scale"].to(r.choice([torch.bfloat16, torch.float32]))
    exact = dequantise(scheme, made, parts, torch.float32).double()
    return exact, weights.quantised(scheme, made, parts)


def weighted(r: random.Random, dtype: torch.dtype) -> Iterator[Pair]:
    """Linear maps of one row, and experts, with weights of any scheme."""
    from dataclasses import replace

    import torch

    from zoo.kernels import experts, linear, weights
    from zoo.spec import MLP

    scheme = r.choice(SCHEMES)
    if scheme == "mxfp4" and dtype == torch.float16:
        dtype = torch.float32  # as its activations overflow
    if scheme.startswith(("mxfp4", "int4")):
        k, f = r.choice([32, 64, 96, 224, 512, 1056, 2880]), r.choice([32, 64, 96, 160])
    else:
        k = r.choice([1, 7, 24, 33, 64, 96, 100, 128, 130, 256, 300, 520, 1000])
        f = r.choice([3, 8, 23, 24, 64, 100, 128, 136, 200])
    gated = r.random() < 0.7
    act = r.choice(["silu", "silu_clamped", "gelu_tanh", "gelu"] if gated else ["relu2", "silu", "gelu"])
    spec = MLP(f, act=act, gated=gated, limit=3.0 if act == "silu_clamped" else None)
    parts = (f, f) if gated else (f,)
    what = f"{scheme} k {k} f {f} {act} gated {gated}"
    biased = r.random() < 0.5

    def bias(*shape: int) -> torch.Tensor | None:
        return torch.randn(*shape).to(dtype) if biased else None

    def wide(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.double()

    exact, w = stored(r, scheme, dtype, parts, k)
    x, onto, b = torch.randn(1, k).to(dtype), torch.randn(1, sum(parts)).to(dtype), bias(sum(parts))
    w = replace(w, bias=b)
    assert linear.one_row(x, w)
    found = linear.linear(x, w, onto)
    yield f"linear {what}", found, linear.linear_reference(x.double(), exact, wide(b), onto.double())
    rows = r.choice([2, 5, 8, 16, 33, 64])
    xs, onto = torch.randn(rows, k).to(dtype), torch.randn(rows, sum(parts)).to(dtype)
    if linear.few_rows(xs, w):
        several = linear.linear_reference(xs.double(), exact, wide(b), onto.double())
        yield f"linear of {rows} rows {what}", linear.linear(xs, w, onto), several
    if gated:
        found = linear.gated_linear(x, w, spec)
        yield f"gated linear {what}", found, linear.gated_linear_reference(x.double(), exact, wide(b), spec)
    if scheme != "plain":
        yield f"expanded {what}", weights.expanded(w, dtype), exact

    n, tokens = r.choice([1, 2, 5, 16, 33]), r.choice([1, 2, 3, 9, 40, 130, 300])
    top_k, weight_input = r.randint(1, min(n, 9)), r.random() < 0.3
    (up, a), (down, b) = stored(r, scheme, dtype, parts, k, n), stored(r, scheme, dtype, (k,), f, n)
    a, b = replace(a, bias=bias(n, sum(parts))), replace(b, bias=bias(n, k))
    x, shares = torch.randn(tokens, k).to(dtype), torch.rand(tokens, top_k).to(dtype)
    chosen = torch.stack([torch.randperm(n)[:top_k] for _ in range(tokens)])
    shared, residual = (torch.randn(tokens, k).to(dtype) if r.random() < 0.5 else None for _ in range(2))
    assert experts.fits(x, a, b)
    found = experts.experts(x, chosen, shares, a, b, spec, weight_input, shared, residual)
    exact = torch.zeros(tokens, k, dtype=torch.float64)
    for j, share in enumerate(shares.double().T[..., None]):  # a token's experts, one at a time
        of = chosen[:, j]
        h = torch.einsum("nk,nfk->nf", x.double() * share if weight_input else x.double(), up[of])
        h = linear.gated_reference(h if a.bias is None else h + a.bias.double()[of], spec)
        y = torch.einsum("nf,nkf->nk", h, down[of])
        y = y if b.bias is None else y + b.bias.double()[of]
        exact += y if weight_input else y * share
    for more in (shared, residual):
        exact += 0 if more is None else more.double()
    what = f"experts {what} n {n} top_k {top_k} tokens {tokens} weight_input {weight_input} biased {biased}"
    yield what, found, exact


KINDS: dict[str, Callable[[random.Random, Any], Iterator[Pair]]] = {
    "norms": norms,
    "attentions": attentions,
    "latents": latents,
    "mixers": mixers,
    "weighted": weighted,
}


def case(kind: str, seed: int) -> tuple[int, list[str]]:
    """How many results of a case were compared, and what differs."""
    import torch

    torch.set_default_device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(seed)
    r = random.Random(f"{kind} {seed}")
    dtype = r.choice([torch.bfloat16, torch.float16, torch.float32])
    name, n, bad = str(dtype).removeprefix("torch."), 0, []
    try:
        for what, found, exact in KINDS[kind](r, dtype):
            n += 1
            error = float((found.double() - exact).norm() / exact.norm().clamp(min=1e-9))
            if not error <= TOLERANCE[str(found.dtype).removeprefix("torch.")]:
                bad.append(f"{kind} {seed} {name}: {what}: {error:.1e}")
        torch.cuda.synchronize()
    except Exception as e:
        bad.append(f"{kind} {seed} {name}: {type(e).__name__}: {str(e)[:300]}")
    return n, bad


def work(first: int, step: int, end: float) -> tuple[int, list[str]]:
    n, bad = 0, []
    for seed in itertools.count(first, step):
        for kind in KINDS:
            if time.time() > end:
                return n, bad
            more, differs = case(kind, seed)
            n, bad = n + more, bad + differs
            if any("CUDA" in d for d in differs):  # nothing works after that
                return n, bad
    raise AssertionError


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", nargs=2, metavar=("KIND", "SEED"), help="only this one")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("benchmarks/gpu_shapes.py needs a CUDA GPU; torch sees none here.", file=sys.stderr)
        return 2
    if args.case:
        n, bad = case(args.case[0], int(args.case[1]))
    else:
        os.environ["OMP_NUM_THREADS"] = "1"
        end, n, bad = time.time() + args.seconds, 0, []
        spawn = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(args.jobs, mp_context=spawn) as pool:
            jobs = [pool.submit(work, args.seed + i, args.jobs, end) for i in range(args.jobs)]
            for job in jobs:
                more, differs = job.result()
                n, bad = n + more, bad + differs
    print(*bad, f"{n} results compared, {len(bad)} cases differ", sep="\n")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        result = {**versions("gpu_shapes.py"), "results compared": n, "differ": bad}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
