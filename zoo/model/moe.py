"""Mixture of experts: a router that chooses experts per token, and the experts as one stacked matrix.

Unusual: each expert runs once, over the tokens that chose it, and so few experts are taken together that what they
compute stays in a core's cache (grouped products over all sorted tokens at once write and read them thrice more, and take
1.5x as long on a CPU); experts that no token chose are never touched, their pages never read from a mapped checkpoint. The
weighted sum over a token's experts is kept in fp32. Where ranks share the experts, each has the whole router, runs those
that it has, and one sum adds up what all have made, the MLP of every token included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from zoo.kernels import experts as fused
from zoo.kernels.cpu import MANY, kernels
from zoo.kernels.launch import has_triton, is_recorded
from zoo.kernels.product import wide_fits, wide_product
from zoo.kernels.route import route
from zoo.model.across import APIECE, Across
from zoo.model.ffn import FeedForward, activate
from zoo.model.linear import Linear, Stacked, Weights
from zoo.model.norm import Norm
from zoo.spec import MoE as MoESpec
from zoo.spec import Rounding
from zoo.spec import Router as RouterSpec

TOGETHER = 768  # rows of several experts' tokens
SOME = 1 << 14  # numbers of a router's weight, from which kernels of a CPU are asked for a token's experts


class Router(Weights):
    """`weight` [E, d], `bias`, `selection_bias` and `expert_scale` [E], `norm`, and `table` [ids, top_k], the experts of each
    token where it is they that say."""

    selection_bias: Tensor | None
    table: Tensor | None
    expert_scale: Tensor | None
    KEPT = ("selection_bias",)  # near-ties between experts hang on it

    def __init__(self, spec: RouterSpec, n_experts: int, d: int) -> None:
        super().__init__(n_experts, d, parts=(n_experts,), bias=spec.bias)
        self.spec = spec
        has_bias = spec.selection_bias
        self.register_parameter("selection_bias", nn.Parameter(torch.empty(n_experts)) if has_bias else None)
        scales = spec.expert_scale
        self.register_parameter("expert_scale", nn.Parameter(torch.empty(n_experts)) if scales else None)
        if spec.norm is not None:
            self.norm = Norm(spec.norm, d)
        table = None
        if spec.by_token is not None:
            empty = torch.empty(spec.by_token, spec.top_k, dtype=torch.int64)
            table = nn.Parameter(empty, requires_grad=False)
        self.register_parameter("table", table)

    def forward(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x [N, d], of tokens `ids` [N] -> the chosen experts [N, top_k] (int64 or int32) and their weights [N, top_k]."""
        dtype = self.weights_dtype(x)
        if (found := self._of_token(x, dtype)) is not None:
            return found
        first = dtype if self.expert_scale is None else _rounded("last", x)
        given = None
        if self.table is not None:
            assert ids is not None
            given = self.table[ids].long()
        chosen, weights = route(self.logits(x), self.selection_bias, self.spec, first, given)
        return chosen, self.scaled(weights, chosen).to(dtype)

    def _of_token(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """`forward` of one token by kernels of a CPU; None where they do not serve it."""
        if x.device.type != "cpu" or len(x) != 1 or self.weight.numel() < SOME or is_recorded(x):
            return None
        if self.scheme is not None or self.table is not None or (cpu := kernels("mixture")) is None:
            return None
        x = self.read(x)
        if not cpu.fits(x, self.weight, self.bias, self.selection_bias, self.spec):
            return None
        return cpu.choose(x, self.weight, self.bias, self.selection_bias, self.spec, dtype)

    def scaled(self, weights: Tensor, chosen: Tensor) -> Tensor:
        """Weights of the chosen experts, times the scales that these have."""
        return weights if self.expert_scale is None else weights * self.expert_scale[chosen.long()]

    def weights_dtype(self, x: Tensor) -> torch.dtype:
        """What the weights of x's experts are rounded to."""
        return _rounded(self.spec.weights_rounding, x)

    def read(self, x: Tensor) -> Tensor:
        """What the weight multiplies, of x."""
        if self.spec.norm is not None:
            x = self.norm(x)
        return x if self.spec.input_scale == 1.0 else x * self.spec.input_scale

    def logits(self, x: Tensor) -> Tensor:
        """x [N, d] -> [N, E]."""
        x = self.read(x)
        dtype = _rounded(self.spec.rounding, x)
        if dtype != x.dtype and self.bias is None and self.scheme is None and wide_fits(x, self.weight):
            return wide_product(x, self.weight)
        return self.times(x.to(dtype))


def _rounded(rounding: Rounding, x: Tensor) -> torch.dtype:
    if rounding == "first" or x.dtype == torch.float64:
        return x.dtype
    return torch.float32  # by torch.promote_types it would be a call of torch's, which a tape does not keep


def experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Stacked,
    down: Stacked,
    spec: MoESpec,
    shared: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Sum over a token's experts of weight * expert(x). x [N, d], chosen and weights [N, k] -> [N, d], added to
    `shared`, and that to `residual`. An expert that is not here is less than 0."""
    k = chosen.shape[1]
    triton = has_triton(x) and not spec.expert.sparsity
    if triton and (a := up.packed()) and (b := down.packed()) and fused.fits(x, a, b):
        return fused.experts(x, chosen, weights, a, b, spec.expert, spec.weight_input, shared, residual)
    if (y := _of_token(x, chosen, weights, up, down, spec, shared, residual)) is not None:
        return y
    sum_dtype = torch.promote_types(x.dtype, torch.float32)
    flat = chosen.flatten()
    order = flat.argsort(stable=True)  # the N k pairs (token, expert), sorted by expert
    if (absent := int((flat < 0).sum())) > 0:
        order = order[absent:]
    used, counts = torch.unique_consecutive(flat[order], return_counts=True)
    tokens, shares = order // k, weights.flatten()[order, None]
    out = torch.zeros(x.shape, dtype=sum_dtype, device=x.device)
    many = (
        x.device.type == "cpu"
        and not is_recorded(x)
        and sum_dtype == torch.float32
        and len(flat) * x.shape[1] >= MANY
    )
    scatter = kernels("scatter") if many else None
    start = 0
    for part, rows_of in _parts(counts.tolist(), lambda most: up.fits(x, most) and down.fits(x, most)):
        at, share = tokens[start : start + rows_of], shares[start : start + rows_of]
        start += rows_of
        of = used[part], counts[part]
        if spec.weight_input:
            h = up(x.index_select(0, at) * share.to(x.dtype), *of)
        else:
            h = up(x, *of, at)
        y = down(activate(h, spec.expert), *of)
        if scatter is not None:
            scatter.add_rows(out, y, at, None if spec.weight_input else share)
        else:
            out.index_add_(0, at, (y if spec.weight_input else y * share).to(sum_dtype))
    y = out.to(x.dtype)
    y = y if shared is None else shared + y
    return y if residual is None else residual + y


def _of_token(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    up: Stacked,
    down: Stacked,
    spec: MoESpec,
    *onto: Tensor | None,
) -> Tensor | None:
    """`experts` of one token, whose codes kernels of a CPU multiply; None where they do not. Nothing here waits for what was chosen, so
    that calls can be made again for the next token."""
    if (
        x.device.type != "cpu"
        or len(x) != 1
        or spec.weight_input
        or chosen.dtype != torch.int64
        or is_recorded(x)
    ):
        return None
    if any(y is not None and y.dtype != x.dtype for y in onto) or not chosen.is_contiguous():
        return None
    if (cpu := kernels("mixture")) is None or bool((chosen.numpy() < 0).any()):
        return None
    h = up.of_token(x, chosen[0])
    y = None if h is None else down.of_token(activate(h, spec.expert), chosen[0])
    return None if y is None else cpu.summed(y, weights, *onto)


def _parts(sizes: list[int], fits: Callable[[int], bool]) -> Iterator[tuple[slice, int]]:
    """Experts, sorted, to be taken together, and how many rows they have: as many as stay in a core's cache, where the
    products are for a grouped kernel; else one."""
    start = total = 0
    for i, n in enumerate(sizes):
        if i > start and (total + n > TOGETHER or not fits(n) or not fits(sizes[start])):
            yield slice(start, i), total
            start, total = i, 0
        total += n
    if sizes:
        yield slice(start, len(sizes)), total


def held_elsewhere(chosen: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For kernels, which need an expert for each pair: experts that are not here (less than 0) give way to the first that
    the token has here, which is read anyhow, with no weight; of a token that has none here to expert 0, and what that gives
    is to be dropped. chosen and weights [N, k] -> the same, and whether a token has one here [N, 1]."""
    here = chosen >= 0
    first = chosen.gather(-1, here.to(torch.int8).argmax(-1, keepdim=True))
    chosen = torch.where(here, chosen, first).clamp(min=0)
    return chosen, torch.where(here, weights, 0), here.any(-1, keepdim=True)


def by_pair(x: Tensor, chosen: Tensor, weights: Tensor, up: Stacked, down: Stacked, spec: MoESpec) -> Tensor:
    """`experts`, each pair of a token and an expert that is here as a token of its own: no work for those that are not, and
    the host waits for their number. What a pair gives is rounded before the sum."""
    k = chosen.shape[1]
    pairs = (chosen.flatten() >= 0).nonzero().squeeze(-1)
    each = x.new_zeros(chosen.numel(), x.shape[1])
    if len(pairs):
        one, share = (t.flatten()[pairs, None] for t in (chosen, weights))
        each[pairs] = experts(x[pairs // k], one, share, up, down, spec)
    return each.view(-1, k, x.shape[1]).sum(1, dtype=torch.promote_types(x.dtype, torch.float32)).to(x.dtype)


class MoE(nn.Module):
    across: Across | None = None  # the ranks that share the experts
    first = 0  # of these, the first that is here

    def __init__(self, spec: MoESpec, d: int) -> None:
        super().__init__()
        self.spec = spec
        width, e = spec.latent or d, spec.expert
        self.router = Router(spec.router, spec.n_experts, d)
        if spec.latent is not None:
            self.latent_down = Linear(d, spec.latent)
            self.latent_up = Linear(spec.latent, d)
        if e.gated:
            self.gate_up = Stacked(spec.n_experts, width, e.d_ff, e.d_ff, bias=e.bias)
        else:
            self.up = Stacked(spec.n_experts, width, e.d_ff, bias=e.bias)
        self.down = Stacked(spec.n_experts, e.d_ff, width, bias=e.bias)
        if spec.shared is not None:
            self.shared = FeedForward(spec.shared, d)
            if spec.shared_gate:
                self.shared_gate = Linear(d, 1)
            if spec.shared_post_norm is not None:
                self.shared_post_norm = Norm(spec.shared_post_norm, d)
        if spec.norm is not None:
            self.norm = Norm(spec.norm, d)
        if spec.post_norm is not None:
            self.post_norm = Norm(spec.post_norm, d)

    def forward(
        self, x: Tensor, onto: Tensor | None = None, raw: Tensor | None = None, ids: Tensor | None = None
    ) -> Tensor:
        """x [..., d] -> [..., d], added to `onto`. `raw`: what the layer's norm made x of, for norms of their own. `ids` [...]: the
        tokens, where experts are theirs."""
        s = self.spec
        flat = x.flatten(0, -2)  # [N, d]
        before = flat if raw is None else raw.flatten(0, -2)
        chosen, weights = self.router(
            flat if s.router.norm is None else before, None if ids is None else ids.flatten()
        )
        own = flat if s.norm is None else self.norm(before)
        inner = own if s.latent is None else self.latent_down(own)
        up = self.gate_up if s.expert.gated else self.up
        shared = self._shared(flat)
        if self.across is not None:
            return self._across(inner, chosen, weights, shared, onto, self.across).view_as(x)
        if s.latent is None and s.post_norm is None and s.scale == s.routed_scale == 1.0:
            # the experts' kernel adds the others
            residual = None if onto is None else onto.flatten(0, -2)
            return experts(inner, chosen, weights, up, self.down, s, shared, residual).view_as(x)
        y = self._routed(experts(inner, chosen, weights, up, self.down, s))
        if shared is not None:
            y = y + shared
        y = (y * s.scale if s.scale != 1.0 else y).view_as(x)
        return y if onto is None else onto + y

    def _routed(self, y: Tensor) -> Tensor:
        """The routed sum, as the layer adds it."""
        s = self.spec
        if s.latent is not None:
            y = self.latent_up(y)
        if s.post_norm is not None:
            y = self.post_norm(y)
        return y if s.routed_scale == 1.0 else y * s.routed_scale

    def _shared(self, x: Tensor) -> Tensor | None:
        """What every token's MLP makes of x [N, d], if there is one."""
        s = self.spec
        if s.shared is None:
            return None
        y: Tensor = self.shared(x)
        if s.shared_gate:
            y = torch.sigmoid(self.shared_gate(x)) * y
        return y if s.shared_post_norm is None else self.shared_post_norm(y)

    def _across(
        self,
        inner: Tensor,
        chosen: Tensor,
        weights: Tensor,
        shared: Tensor | None,
        onto: Tensor | None,
        across: Across,
    ) -> Tensor:
        """`forward` of a rank: its experts' part of the routed sum, and its part of the shared MLP."""
        s = self.spec
        up = self.gate_up if s.expert.gated else self.up
        own = chosen - self.first
        own = torch.where((own >= 0) & (own < len(self.down.weight)), own, -1)
        if has_triton(inner) and len(inner) > APIECE:
            y = by_pair(inner, own, weights, up, self.down, s)
        elif has_triton(inner):
            near, shares, any_here = held_elsewhere(own, weights)
            y = torch.where(any_here, experts(inner, near, shares, up, self.down, s), 0)
        else:
            y = experts(inner, own, weights, up, self.down, s)
        if s.post_norm is None and s.shared_post_norm is None:
            y = self._routed(y)  # linear, so of a part as of the whole
            y = across.sum(y if shared is None else y + shared)
        else:  # a norm is of the whole
            y = self._routed(across.sum(y))
            y = y if shared is None else y + shared  # whole already, see `parallel`
        y = (y * s.scale if s.scale != 1.0 else y).view(inner.shape[0], -1)
        return y if onto is None else onto.flatten(0, -2) + y
