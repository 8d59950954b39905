"""Head layouts and rotary embeddings are read by what they compute, however they are spelled."""

import pytest
import torch
from torch import nn

from dscompile.passes import vocabulary
from dscompile.passes.normalize.attentions import canonical_attentions
from dscompile.passes.normalize.cleanup import drop_noops
from dscompile.passes.normalize.linears import canonical_linears
from dscompile.passes.normalize.norms import canonical_norms
from dscompile.passes.rule import Log
from dscompile.runtime.errors import UserError
from dscompile.runtime.plan import Norm
from tests.helpers import rms_ratio
from tests.passes.graphs import nodes, run, trace

HEADS, KV_HEADS, DIM, WIDTH, VOCAB = 4, 2, 16, 64, 32


def half(x, cos, sin):
    x1, x2 = x.chunk(2, -1)
    return x * torch.cat([cos, cos], -1) + torch.cat([-x2, x1], -1) * torch.cat([sin, sin], -1)


def interleaved(x, cos, sin):
    cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return x * cos + turned * sin


def complex_pairs(x, cos, sin):
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def sums_of_halves(x, cos, sin):
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


class Attention(nn.Module):
    """Packed or separate projections, a rotation of the first `rotary` columns of each head, dsc::attention."""

    def __init__(self, rotate, rotary=DIM, packed=False, factor=1.0, break_pair=False, before=1.0, first=0, after=None):
        super().__init__()
        torch.manual_seed(0)
        self.rotate, self.rotary, self.packed, self.factor, self.break_pair = rotate, rotary, packed, factor, break_pair
        self.before, self.first, self.after = before, first, after
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, h * DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * DIM)
        frequencies = 100.0 ** -(torch.arange(0, rotary, 2) / rotary)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, tokens, positions):
        x = self.table(tokens)
        if self.packed:
            q, k, v = self.qkv(x).unflatten(-1, (HEADS, 3, DIM)).unbind(-2)
        else:
            q, k, v = (p(x).unflatten(-1, (-1, DIM)) for p in (self.q, self.k, self.v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q = q * self.before if self.before != 1 else q
        if self.rotate is not None:
            angles = (positions[:, None, :, None] + self.first) * self.frequencies
            cos, sin = angles.cos() * self.factor, angles.sin() * self.factor
            if self.break_pair:
                sin = torch.cat([sin[..., :1] * 2, sin[..., 1:]], -1)
            q, k = (
                torch.cat([self.rotate(t[..., : self.rotary], cos, sin), t[..., self.rotary :]], -1) for t in (q, k)
            )
        if self.after is not None:
            q, k = self.after(q), self.after(k)
        y = torch.ops.dsc.attention(q, k, v, positions, 0, 0.25)
        return y.flatten(2)


@pytest.mark.parametrize("rotate", [half, interleaved, complex_pairs, sums_of_halves, None])
@pytest.mark.parametrize("rotary", [DIM, 8])
@pytest.mark.parametrize("packed", [False, True])
def test_every_spelling_becomes_one_form(rotate, rotary, packed):
    module = Attention(rotate, rotary, packed)
    graph = trace(module)
    tokens = torch.randint(VOCAB, (1, 19))
    expected = module(tokens, torch.arange(19)[None])
    drop_noops(graph, Log())
    canonical_linears(graph, Log())
    canonical_attentions(graph, Log())
    (attention,) = nodes(graph, vocabulary.attention)
    spec = attention.args[5]
    assert spec.rotary_dim == (rotary if rotate else 0)
    assert (spec.num_heads, spec.num_kv_heads) == (HEADS, HEADS if packed else KV_HEADS)
    assert all(n.target is vocabulary.linear for n in attention.args[:3])
    assert rms_ratio(run(graph, module, tokens), expected) < 1e-6


def test_a_factor_on_the_rotation_goes_into_the_tables():
    module = Attention(half, 8, factor=1.25)
    graph = trace(module)
    tokens = torch.randint(VOCAB, (1, 7))
    drop_noops(graph, Log())
    canonical_linears(graph, Log())
    canonical_attentions(graph, Log())
    assert graph.constants["rope_cos.0"][0].tolist() == [1.25] * 4
    assert rms_ratio(run(graph, module, tokens), module(tokens, torch.arange(7)[None])) < 1e-6


@pytest.mark.parametrize("rotary", [DIM, 8])
@pytest.mark.parametrize("first", [0, 2])
def test_queries_scaled_before_they_are_rotated(rotary, first):
    """The factor is not the tables', which keys share; nor does it matter from where positions are counted."""
    module = Attention(half, rotary, before=0.5, first=first)
    graph = trace(module)
    tokens = torch.randint(VOCAB, (1, 7))
    drop_noops(graph, Log())
    canonical_linears(graph, Log())
    canonical_attentions(graph, Log())
    assert nodes(graph, vocabulary.attention)[0].args[5].scale == 0.125
    assert rms_ratio(run(graph, module, tokens), module(tokens, torch.arange(7)[None])) < 1e-6


@pytest.mark.parametrize("rotate", [half, interleaved])
@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("rotary", [DIM, 8])
def test_a_norm_of_rotated_heads_leaves_its_weights_behind(rotate, weighed, rotary):
    module = Attention(rotate, rotary, after=nn.RMSNorm(DIM, eps=1e-3, elementwise_affine=weighed))
    if weighed:
        nn.init.normal_(module.after.weight)
    graph = trace(module)
    tokens = torch.randint(VOCAB, (1, 19))
    for normalise in (drop_noops, canonical_linears, canonical_norms, canonical_attentions):
        normalise(graph, Log())
    spec = nodes(graph, vocabulary.attention)[0].args[5]
    assert (spec.q_norm, spec.weigh_rotated) == (Norm("rms", 1e-3, weighed), weighed)
    assert rms_ratio(run(graph, module, tokens), module(tokens, torch.arange(19)[None])) < 1e-6


def test_a_norm_after_a_rotation_that_stretches_is_refused():
    graph = trace(Attention(half, factor=1.25, after=nn.RMSNorm(DIM, eps=1e-3)))
    for normalise in (drop_noops, canonical_linears, canonical_norms):
        normalise(graph, Log())
    with pytest.raises(UserError, match="depends on positions"):
        canonical_attentions(graph, Log())


def test_half_pairs_that_turn_by_different_angles_are_refused():
    def uneven(x, cos, sin):
        x1, x2 = x.chunk(2, -1)
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * (2 * sin)], -1)

    graph = trace(Attention(uneven))
    drop_noops(graph, Log())
    canonical_linears(graph, Log())
    with pytest.raises(UserError, match="turn by different angles"):
        canonical_attentions(graph, Log())


def test_an_operand_that_mixes_activations_is_refused():
    class Mixed(Attention):
        def forward(self, tokens, positions):
            x = self.table(tokens)
            q, k, v = (p(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
            q = q + self.q(x * 2).unflatten(-1, (-1, DIM)).transpose(1, 2)
            return torch.ops.dsc.attention(q, k, v, positions, 0, 1.0)

    graph = trace(Mixed(None))
    drop_noops(graph, Log())
    canonical_linears(graph, Log())
    with pytest.raises(UserError, match="combines 2 activations"):
        canonical_attentions(graph, Log())


class Latent(nn.Module):
    """Keys of two parts: one of each head from a normalised latent row, and a rotated one that all heads share."""

    RANK, ROTARY = 24, 8

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(VOCAB, WIDTH)
        self.q = nn.Linear(WIDTH, HEADS * (DIM + self.ROTARY))
        self.down = nn.Linear(WIDTH, self.RANK + self.ROTARY)
        self.norm = nn.LayerNorm(self.RANK)
        self.up = nn.Linear(self.RANK, HEADS * (DIM + 5))
        frequencies = 100.0 ** -(torch.arange(0, self.ROTARY, 2) / self.ROTARY)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, tokens, positions):
        x = self.table(tokens)
        angles = positions[:, None, :, None] * self.frequencies
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        latent, shared = self.down(x).split([self.RANK, self.ROTARY], -1)
        up = self.up(self.norm(latent)).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        shared = interleaved(shared[:, None], angles.cos(), angles.sin()).expand(-1, HEADS, -1, -1)
        k = torch.cat([up[..., :DIM], shared], -1)
        q = torch.cat([q[..., :DIM], interleaved(q[..., DIM:], angles.cos(), angles.sin())], -1)
        return torch.ops.dsc.attention(q, k, up[..., DIM:], positions, 0, 0.2).flatten(2)


def test_an_operand_of_several_linears_is_their_sum():
    module = Latent()
    graph = trace(module)
    tokens = torch.randint(VOCAB, (1, 19))
    expected = module(tokens, torch.arange(19)[None])
    drop_noops(graph, Log())
    canonical_linears(graph, Log())
    canonical_attentions(graph, Log())
    (attention,) = nodes(graph, vocabulary.attention)
    spec = attention.args[5]
    assert (spec.num_kv_heads, spec.head_dim, spec.v_head_dim, spec.rotary_dim) == (HEADS, DIM + 8, 5, 8)
    key = attention.args[1]
    assert key.target is vocabulary.add
    assert all(term.target is vocabulary.linear for term in key.args)
    assert rms_ratio(run(graph, module, tokens), expected) < 1e-6


def test_a_sum_within_one_activation_is_refused():
    class Folded(Attention):
        def forward(self, tokens, positions):
            x = self.table(tokens)
            q, k, v = (p(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for p in (self.q, self.k, self.v))
            q = q[:, ::2] + q[:, 1::2]
            return torch.ops.dsc.attention(q, k, v, positions, 0, 1.0)

    graph = trace(Folded(None))
    drop_noops(graph, Log())
    canonical_linears(graph, Log())
    with pytest.raises(UserError, match=r"combines 1 activations|not a selection"):
        canonical_attentions(graph, Log())
