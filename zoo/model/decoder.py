"""The decoder: one for all specs. Embedding, layers, norm, head; a layer is two residual branches.

Parameters are named as `zoo.layout` names the tensors. A model is built without storage (on torch's "meta"
device) and filled by `zoo.model.load`. A layer can be run alone: `start` gives its input and the context
that all layers share, `finish` turns the last layer's output into logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.errors import ZooError
from zoo.kernels.attention import preferring_cudnn
from zoo.model import altup, generate, hyper, per_layer
from zoo.model.across import Across
from zoo.model.attention import Attention
from zoo.model.cache import Cache, Context, checked
from zoo.model.compressed import CompressedAttention
from zoo.model.delta import DeltaNet
from zoo.model.ffn import FeedForward
from zoo.model.graph import Pass, capturable
from zoo.model.linear import Linear, Table, Weights, scaled
from zoo.model.mamba import Mamba
from zoo.model.mamba1 import Mamba1
from zoo.model.mla import LatentAttention
from zoo.model.moe import MoE
from zoo.model.norm import Norm, Unnormed
from zoo.model.short_conv import ShortConv
from zoo.spec import MLP, Spec
from zoo.spec import Attention as AttentionSpec
from zoo.spec import CompressedAttention as CompressedSpec
from zoo.spec import DeltaNet as DeltaSpec
from zoo.spec import LatentAttention as LatentSpec
from zoo.spec import Mamba as MambaSpec
from zoo.spec import Mamba1 as Mamba1Spec
from zoo.spec import MoE as MoESpec
from zoo.spec import Norm as NormSpec
from zoo.spec import ShortConv as ShortConvSpec


class Layer(nn.Module):
    """x += post(mixer(pre(x))); x += post(ffn(pre(x))); or both branches of the same x, side by side."""

    scalar: Tensor | None
    across: Across | None = (
        None  # ranks that share it: their sum comes without the residual, but in a pass by rows
    )

    def __init__(self, spec: Spec, i: int) -> None:
        super().__init__()
        layer, d = spec.layers[i], spec.d_model
        self.spec, self.index = layer, i
        self.attn_norm = _norm(layer.attn_norm, d)
        for mixer in layer.mixers:
            match mixer:
                case AttentionSpec():
                    shares = any(
                        isinstance(x.mixer, AttentionSpec) and x.mixer.kv_from == i for x in spec.layers
                    )
                    self.attn: nn.Module = Attention(mixer, d, i, shares)
                case LatentSpec():
                    shares = any(
                        isinstance(x.mixer, LatentSpec) and x.mixer.indexer_from == i for x in spec.layers
                    )
                    self.attn = LatentAttention(mixer, d, i, shares)
                case CompressedSpec():
                    self.attn = CompressedAttention(mixer, d, i)
                case DeltaSpec():
                    self.delta = DeltaNet(mixer, d, i)
                case MambaSpec():
                    self.mamba = Mamba(mixer, d, i)
                case Mamba1Spec():
                    self.mamba1 = Mamba1(mixer, d, i)
                case ShortConvSpec():
                    self.short_conv = ShortConv(mixer, d, i)
        self.attn_post_norm = _norm(layer.attn_post_norm, d)
        self.ffn_norm = _norm(layer.ffn_norm, d)
        match layer.ffn:
            case MLP():
                self.mlp = FeedForward(layer.ffn, d)
            case MoESpec():
                self.moe = MoE(layer.ffn, d)
        self.ffn_post_norm = _norm(layer.ffn_post_norm, d)
        if spec.per_layer_embedding is not None:
            self.per_layer = per_layer.PerLayer(spec.per_layer_embedding, d)
        self.register_parameter("scalar", nn.Parameter(torch.empty(1)) if layer.scalar else None)

    @property
    def mixer(self) -> nn.Module:
        match self.spec.mixer:
            case DeltaSpec():
                return self.delta
            case MambaSpec():
                return self.mamba
            case Mamba1Spec():
                return self.mamba1
            case ShortConvSpec():
                return self.short_conv
        return self.attn

    @property
    def ffn(self) -> nn.Module:
        return self.moe if isinstance(self.spec.ffn, MoESpec) else self.mlp

    def mix(self, normed: Tensor | Unnormed, ctx: Context, onto: Tensor | None) -> Tensor:
        """`onto` + the mixer's branch of normed x."""
        if self.spec.beside is not None:
            assert isinstance(normed, Tensor)
            return self._add(partial(self._both, normed, ctx), self.attn_post_norm, onto)
        return self._add(partial(self.mixer, normed, ctx), self.attn_post_norm, onto)

    def _both(self, normed: Tensor, ctx: Context, onto: Tensor | None = None) -> Tensor:
        """`onto` + what the mixer and the state space beside it make of normed x."""
        y: Tensor = self.mixer(normed, ctx, self.mamba(normed, ctx))
        return y if onto is None else onto + y

    def feed(
        self, normed: Tensor | Unnormed, x: Tensor, onto: Tensor | None, ids: Tensor | None = None
    ) -> Tensor:
        """`onto` + the feed-forward branch of normed x, of tokens `ids`."""
        ffn = partial(self.moe, raw=x, ids=ids) if isinstance(self.spec.ffn, MoESpec) else self.mlp
        return self._add(partial(ffn, normed), self.ffn_post_norm, onto)

    def _add(self, branch: Callable[..., Tensor], post: nn.Module, onto: Tensor | None) -> Tensor:
        """`onto` + residual_scale * post(branch())."""
        last: Callable[..., Tensor] = (
            (lambda onto: post(branch(), onto)) if isinstance(post, Norm) else branch
        )
        return scaled(last, self.spec.residual_scale, onto)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:  # [B, T, D] -> [B, T, D]
        s = self.spec
        x = self._side_by_side(x, ctx) if s.parallel else self._one_by_one(x, ctx)
        if ctx.per_layer is not None:
            x = x + self.per_layer(x, ctx.per_layer[:, :, self.index])
        return x if self.scalar is None else x * self.scalar.to(x.dtype)

    def _side_by_side(self, x: Tensor, ctx: Context) -> Tensor:
        """x + mixer and feed-forward of x, in the order of `Layer.adds`."""
        normed = self.attn_norm(x)
        in_turn = self.spec.adds == "in_turn"
        mixed = self.mix(normed, ctx, x if in_turn else None)
        out = self.feed(self.ffn_norm(x) if isinstance(self.ffn_norm, Norm) else normed, x, mixed, ctx.ids)
        return out if in_turn else x + out

    def _one_by_one(self, x: Tensor, ctx: Context) -> Tensor:
        s, normed = self.spec, None
        by_norm = self.across.rows is None if self.across is not None else x.numel() > x.shape[-1]
        in_norm = isinstance(self.ffn_norm, Norm) and s.attn_post_norm is None and by_norm
        if s.mixer is not None and s.ffn is not None and in_norm:
            # The norm adds the residual of several tokens; of a single one the mixer's last product does.
            normed, x = self.ffn_norm(self.mix(self.attn_norm(x), ctx, None), None, x)
        elif s.mixer is not None:
            x = self.mix(self._normed(self.attn_norm, x, None if s.beside else self.mixer), ctx, x)
        if s.ffn is not None:
            normed = self._normed(self.ffn_norm, x, self.ffn) if normed is None else normed
            x = self.feed(normed, x, x, ctx.ids)
        return x

    def _normed(self, norm: nn.Module, x: Tensor, reader: nn.Module | None) -> Tensor | Unnormed:
        """The norm of x, or of a token that which its reader makes (not where somebody looks at it)."""
        if isinstance(norm, Norm) and isinstance(reader, Attention | FeedForward) and not norm._forward_hooks:
            later = Unnormed(x, (norm.weight, norm.spec))
            if norm.spread is None and x.numel() == x.shape[-1] and reader.reads(later):
                return later
        normed: Tensor = norm(x)
        return normed


class StreamLayer(Layer):
    """A layer on several residual streams (see `altup`)."""

    def __init__(self, spec: Spec, i: int) -> None:
        super().__init__(spec, i)
        assert spec.altup is not None
        self.altup = altup.AltUp(spec.altup, spec.d_model)
        self.laurel = altup.Laurel(spec.altup, spec.d_model)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:  # [S, B, T, D] -> [S, B, T, D]
        predicted = self.altup.predicted(x)
        active = predicted[self.altup.spec.active]
        normed = self.attn_norm(active)
        y = (self.mix(normed, ctx, active) + self.laurel(normed)) / math.sqrt(2)
        y = self.feed(self.ffn_norm(y), y, y, ctx.ids)
        x = self.altup.corrected(predicted, y)
        if ctx.per_layer is None:
            return x
        first = x[self.altup.spec.active]
        if self.altup.correct_scale is not None:
            first = first * self.altup.correct_scale.to(first.dtype)
        added = self.per_layer(first, ctx.per_layer[:, :, self.index])
        return torch.cat((x[:1], x[1:] + added))


class HyperLayer(Layer):
    """A layer on streams that hyper-connections mix (see `hyper`)."""

    def __init__(self, spec: Spec, i: int) -> None:
        super().__init__(spec, i)
        assert spec.hyper is not None
        if self.spec.mixer is not None:
            self.attn_hyper = hyper.HyperConnection(spec.hyper, spec.d_model)
        if self.spec.ffn is not None:
            self.ffn_hyper = hyper.HyperConnection(spec.hyper, spec.d_model)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:  # [S, B, T, D] -> [S, B, T, D]
        if self.spec.mixer is not None:
            read, *streams = self.attn_hyper(x)
            x = hyper.HyperConnection.put(self.mix(self.attn_norm(read), ctx, None), *streams)
        if self.spec.ffn is not None:
            read, *streams = self.ffn_hyper(x)
            x = hyper.HyperConnection.put(self.feed(self.ffn_norm(read), read, None, ctx.ids), *streams)
        return x


def _norm(spec: NormSpec | None, d: int) -> nn.Module:
    return nn.Identity() if spec is None else Norm(spec, d)


class Decoder(nn.Module):
    """The model of a Spec, as `zoo.load` gives it: token ids [B, T] (int64) -> logits [B, T, V]. Its parameters have the names of
    the canonical layout. Made of a Spec alone its weights are on the meta device."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.held: tuple[int, ...] | None = None  # the layers that are here, where some are not
        self.local = spec  # of what this rank has
        self.across: Across | None = None  # the ranks that share the model, see `parallel`
        self.by_rows = False  # whether they can share the tokens of a prompt, too
        self.trainable = False
        with torch.device("meta"):
            d = spec.d_model
            self.embed = Table(spec.vocab_size, d)
            if spec.embed_norm is not None:
                self.embed_norm = Norm(spec.embed_norm, d)
            if spec.positions is not None:
                self.positions = Table(spec.positions + spec.positions_offset, d)
            if spec.per_layer_embedding is not None:
                self.per_layer = per_layer.PerLayerEnds(spec.per_layer_embedding, d, spec.n_layers)
            if spec.altup is not None:
                self.altup = altup.Streams(spec.altup, d)
            if spec.hyper is not None:
                self.hyper = hyper.HyperHead(spec.hyper, d)
            kind = HyperLayer if spec.hyper is not None else Layer if spec.altup is None else StreamLayer
            self.layers = nn.ModuleList(kind(spec, i) for i in range(spec.n_layers))
            self.norm = Norm(spec.norm, d)
            if not spec.tied:
                self.head = Linear(d, spec.vocab_size, bias=spec.head_bias)
        self.requires_grad_(False)
        self.eval()

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in: the embedding's dtype."""
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

    def cache(self, batch: int, max_len: int) -> Cache:
        """An empty cache for this model, on its device and in its dtype. Raises ZooError where there is no memory for it."""
        ranks = 1 if self.across is None else self.across.size
        try:
            return Cache(self.local, batch, max_len, self.dtype, self.device, ranks)
        except (RuntimeError, OverflowError) as e:  # no memory, or more bytes than torch can count
            raise ZooError(
                f"there is no memory on {self.device} for a cache of {batch} x {max_len:,} tokens ({e!s:.200}): allow fewer new ones (-n), or "
                "give a shorter prompt"
            ) from e

    def forward(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Token ids [B, T] (int64) -> logits [B, T, V] in the model's dtype.

        With a cache, the tokens follow those already in it, and are added to it. The logits are a tensor of inference
        mode: `.clone()` them to change them in place, or to train something on them. Not so those of a model that is
        `trainable`, where gradients are recorded: they can be followed back to its parameters.
        Raises ZooError if the cache has no room for them, or the ids are none; or for a cache while gradients are recorded.
        """
        recorded = self.trainable and torch.is_grad_enabled()
        if recorded and cache is not None:
            raise ZooError(
                "a cache is written over at each step, so no gradient leads through it: call the model without one, or "
                "within torch.no_grad()"
            )
        with torch.inference_mode(not recorded):
            return self.finish(self.run(ids, cache))

    def captured(self, batch: int, tokens: int) -> Callable[[Tensor], Tensor]:
        """`self` for ids [batch, tokens] only, without the host's time for launching kernels: for many pieces of one
        length, as when a corpus is evaluated. On a GPU a CUDA graph, which holds the memory of a pass, and whose result
        the next call overwrites; elsewhere the model itself. Made anew if weights are replaced."""
        return Pass(self, batch, tokens) if capturable(self, batch * tokens) else self

    def run(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """Token ids [B, T] -> the last layer's output. Raises ZooError if only some layers are here."""
        if self.held is not None:
            raise ZooError(
                f"only {len(self.held)} of {self.spec.n_layers} layers are here: a part of a model can't be run as a whole"
            )
        checked(ids, cache)
        length = 0 if cache is None else cache.length
        try:
            x, ctx = self.start(ids, cache)
            with preferring_cudnn(x.device):
                through = partial(self.through, ctx=ctx)
                x = (
                    self.across.by_rows(through, x)
                    if self.across is not None and self.by_rows
                    else through(x)
                )
        except BaseException:
            if cache is not None:  # what was to follow is not there
                cache.advance(length - cache.length)
            raise
        return x

    def through(self, x: Tensor, ctx: Context) -> Tensor:
        """The first layer's input -> the last one's output, shaped as it is."""
        for layer in self.layers:
            x = layer(x, ctx)
        return x

    def start(self, ids: Tensor, cache: Cache | None = None) -> tuple[Tensor, Context]:
        """Token ids [B, T] -> the first layer's input [B, T, D] ([S, B, T, D] with streams), and what all
        layers share. The cache counts the tokens as stored from here on."""
        spec = self.spec
        ctx = Context.begin(ids.shape[1], cache, self.dtype, ids.device)
        x = self.embed.rows(ids)
        if (
            self.trainable and torch.is_grad_enabled()
        ):  # under a frozen embedding, too: it is by x that kernels know
            x.requires_grad_()
        if spec.embed_scale != 1.0:  # a product with a number is one in fp32, rounded
            factor = torch.tensor(
                spec.embed_scale, dtype=x.dtype if spec.embed_rounding == "first" else torch.float32
            )
            x = x * factor.item()
        if spec.embed_norm is not None:
            x = self.embed_norm(x)
        if spec.positions is not None:
            if ctx.start + ids.shape[1] > spec.positions:
                raise ZooError(
                    f"the model has {spec.positions} positions; {ctx.start} are taken and {ids.shape[1]} tokens more came"
                )
            x = x + F.embedding(ctx.positions + spec.positions_offset, self.positions.weight)
        if spec.per_layer_embedding is not None:
            ctx.per_layer = self.per_layer(ids, x)
        if spec.reads_ids:
            ctx.ids = ids
        if spec.altup is not None:
            x = self.altup.split(x)
        if spec.hyper is not None:
            x = x.expand(spec.hyper.n_streams, *x.shape)
        return x, ctx

    def finish(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        """The last layer's output -> logits [B, T, V]."""
        spec = self.spec
        if spec.altup is not None:
            x = self.altup.join(x)
        if spec.hyper is not None:
            x = self.hyper(x)
        x = self.norm(x)
        head: Callable[[Tensor], Tensor] = self.embed.times if spec.tied else self.head
        across, n = self.embed.across, len(self.embed.weight)  # the head's rows are where the embedding's are
        logits = head(x) if across is None else across.beside(head, x, n)
        if spec.logit_scale != 1.0:
            logits = logits * spec.logit_scale
        if spec.logit_softcap is not None:
            logits = torch.tanh(logits / spec.logit_softcap) * spec.logit_softcap
        return logits

    def generate(
        self,
        ids: Tensor,
        max_new_tokens: int,
        eos: int | tuple[int, ...] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Tensor:
        """Continue ids [B, T] by up to `max_new_tokens`, with a KV cache: [B, T + n], n the steps until all rows have met `eos`.

        Greedy where `temperature` is 0; else drawn at this temperature from all tokens, from the `top_k` likeliest, or from the
        likeliest whose probabilities sum up to `top_p`. It ends where learned positions do. Raises ZooError as `forward`.
        """
        new = list(self.stream(ids, max_new_tokens, eos, temperature, top_k, top_p))
        return torch.cat((ids, *(t[:, None] for t in new)), 1)

    def stream(
        self,
        ids: Tensor,
        max_new_tokens: int,
        eos: int | tuple[int, ...] | None = None,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        cache: Cache | None = None,
    ) -> Iterator[Tensor]:
        """The new tokens [B] as they come. See `generate.stream`."""
        return generate.stream(self, ids, max_new_tokens, eos, temperature, top_k, top_p, cache)

    def matrices(self) -> Iterator[tuple[str, Weights]]:
        """All linear maps by name."""
        return (
            (n, m) for n, m in self.named_modules() if isinstance(m, Weights) and not isinstance(m, Table)
        )
