"""The passes, in order."""

from dscompile.passes.fuse.attention_gate import fuse_attention_gate
from dscompile.passes.fuse.embedding import fuse_embedding
from dscompile.passes.fuse.epilogue import fuse_epilogue
from dscompile.passes.fuse.experts import fuse_experts
from dscompile.passes.fuse.gate import fuse_gate
from dscompile.passes.fuse.head import gather_head_rows
from dscompile.passes.fuse.linears import anchor_linears
from dscompile.passes.fuse.name_regions import name_regions
from dscompile.passes.fuse.pack import pack_siblings
from dscompile.passes.fuse.prologue import fuse_prologue
from dscompile.passes.fuse.residual import fuse_residual
from dscompile.passes.fuse.residual_norm import fuse_residual_norm
from dscompile.passes.fuse.spell_out import spell_out
from dscompile.passes.normalize.attentions import canonical_attentions
from dscompile.passes.normalize.cleanup import (
    drop_noops,
    fold_weight_arithmetic,
    inline_scalars,
    keep_batch_dimension,
    merge_repeated,
)
from dscompile.passes.normalize.constant_rows import fold_constant_rows
from dscompile.passes.normalize.elementwise import canonical_arithmetic, name_functions
from dscompile.passes.normalize.embeddings import canonical_embeddings
from dscompile.passes.normalize.experts import canonical_experts
from dscompile.passes.normalize.groups import flatten_groups
from dscompile.passes.normalize.heads import flatten_heads
from dscompile.passes.normalize.layers import assign_layers
from dscompile.passes.normalize.linears import canonical_linears, split_packed_linears
from dscompile.passes.normalize.norms import canonical_norms
from dscompile.passes.normalize.vectors import canonical_vectors
from dscompile.passes.reassociate.fold_norm import fold_norm
from dscompile.passes.reassociate.move_factor import move_factor
from dscompile.passes.reassociate.share_factor import share_factor
from dscompile.passes.runner import Pass, Phase

PIPELINE = (
    Phase(
        "normalize",
        (
            assign_layers,
            drop_noops,
            merge_repeated,
            inline_scalars,
            keep_batch_dimension,
            fold_weight_arithmetic,
            canonical_linears,
            canonical_vectors,
            canonical_experts,
            drop_noops,
            canonical_norms,
            flatten_heads,
            canonical_attentions,
            split_packed_linears,
            flatten_groups,
            canonical_embeddings,
            fold_constant_rows,
            name_functions,
            canonical_arithmetic,
        ),
    ),
    Phase("reassociate", (move_factor, share_factor, fold_norm)),
    Phase(
        "fuse",
        (
            anchor_linears,
            fuse_gate,
            fuse_attention_gate,
            fuse_epilogue,
            fuse_residual,
            fuse_experts,
            pack_siblings,
            fuse_prologue,
            fuse_embedding,
            gather_head_rows,
            fuse_residual_norm,
            spell_out,
            name_regions,
        ),
    ),
)


def quantizing(passes: tuple[Pass, ...], packed: tuple[Pass, ...] = ()) -> tuple[Phase, ...]:
    """The pipeline with a phase `quantize`, the only one that changes what is computed; without passes, none.

    packed: passes that belong to it and run as soon as linears are packed
    """
    if not passes:
        return PIPELINE
    *exact, fuse = PIPELINE
    at = fuse.passes.index(pack_siblings) + 1
    begin, end = Phase("fuse", fuse.passes[:at]), Phase("fuse", fuse.passes[at:])
    phases = (begin, Phase("quantize", packed), end) if packed else (fuse,)
    return (*exact, Phase("quantize", passes), *phases)
