"""One recurrent mixer as rows per token: what it keeps between its input and its output projection."""

from __future__ import annotations

from ullage.frozen import Frozen
from ullage.spec import mixers as spec

#: Source: fla-core@0.6.0:ops/gated_delta_rule/chunk.py:chunk_gated_delta_rule, ops/kda/chunk.py:chunk_kda
#: (chunk_size 64); transformers@5.23.0:models/qwen3_next/modeling_qwen3_next.py:torch_chunk_gated_delta_rule.
DELTA_CHUNK = 64
#: Source: transformers@5.23.0:models/granitemoehybrid/configuration_granitemoehybrid.py (mamba_chunk_size);
#: nemotron_h's is 128 or 256.
STATE_CHUNK = 256
#: Positions per stored state. Source: mamba@2.3.2:csrc/selective_scan/selective_scan.cpp (chunks of 2048).
SCAN_CHUNK = 2048


class Row(Frozen):
    """One kept tensor: elements per token, None: in the compute dtype.

    ``trained``: only where the base is trained. ``behind``: read after the recurrence, so that it has gone when the
    recurrence is differentiated.
    """

    name: str
    per_token: int
    dtype: str | None = None
    trained: bool = False
    behind: bool = False


class Core(Frozen):
    """A mixer between its input and its output projection, per token.

    Attributes:
        projections: width of each linear that reads the mixer's input, by name.
        rows: what is kept; the mixer's input and that of the output projection are apart.
        out_name, out_width: the output projection and what it reads.
        keeps_out_input: a trained output projection keeps its input (a fused function makes it again).
        work, work_fp32: elements in the compute dtype and in fp32 that the backward of the recurrence makes.
        source: where the tensors are saved.
    """

    projections: tuple[tuple[str, int], ...]
    rows: tuple[Row, ...]
    out_name: str
    out_width: int
    work: int
    work_fp32: int = 0
    keeps_out_input: bool = True
    source: str = ""

    def row_bytes(self, element_bytes: int, *, trained: bool, behind_only: bool = False) -> int:
        """Bytes per token of the rows."""
        widths = {None: element_bytes, "float32": 4, "bool": 1}
        return sum(
            row.per_token * widths[row.dtype]
            for row in self.rows
            if (trained or not row.trained) and (row.behind or not behind_only)
        )

    def work_bytes(self, element_bytes: int) -> int:
        """Bytes per token that the backward of the recurrence makes."""
        return self.work * element_bytes + 4 * self.work_fp32


def gated_norm(values: int, heads: int) -> tuple[Row, ...]:
    """The norm of the output, gated: written out in fp32, the cast before the weight.

    Formula: fp32 copy 4, normalised e (trained), weighted e, gate as fp32 4, its SiLU 4, per value.
    Source: transformers@5.23.0:models/qwen3_next/modeling_qwen3_next.py:Qwen3NextRMSNormGated.forward (a kernel of the
        hub only where ``use_kernels`` asks for it).
    """
    return (
        Row(name="norm.input as fp32", per_token=values, dtype="float32", behind=True),
        Row(name="norm.rstd", per_token=heads, dtype="float32", behind=True),
        Row(name="norm.normalised", per_token=values, trained=True, behind=True),
        Row(name="norm.weighted", per_token=values, behind=True),
        Row(name="gate as fp32", per_token=values, dtype="float32", behind=True),
        Row(name="gate activated", per_token=values, dtype="float32", behind=True),
    )


def delta_sizes(part: spec.GatedDeltaNet, split: int) -> tuple[int, int, int, int]:
    """Return (key heads, value heads, width of all keys, width of all values) on this rank."""
    k_heads, v_heads = part.num_k_heads // split, part.num_v_heads // split
    return k_heads, v_heads, k_heads * part.k_head_dim, v_heads * part.v_head_dim


def delta_projections(part: spec.GatedDeltaNet, keys: int, values: int, heads: int) -> tuple[tuple[str, int], ...]:
    """Return the linears that read the mixer's input: two in Qwen3-Next, four in Qwen3.5."""
    if part.fused:
        return (("in_proj_qkvz", 2 * keys + 2 * values), ("in_proj_ba", 2 * heads))
    return (
        ("in_proj_qkv", 2 * keys + values),
        ("in_proj_z", values),
        ("in_proj_b", heads),
        ("in_proj_a", heads),
    )


def delta_gates(heads: int) -> tuple[Row, ...]:
    """Decay and learning rate: softplus in fp32 (input, and for A_log its result), and a sigmoid."""
    return (
        Row(name="decay before softplus", per_token=heads, dtype="float32"),
        Row(name="decay after softplus", per_token=heads, dtype="float32", trained=True),
        Row(name="beta", per_token=heads),
    )


def mamba2_sizes(part: spec.Mamba2, split: int) -> tuple[int, int, int, int]:
    """Return (heads, groups, inner size, width of the convolution: x, B and C) on this rank."""
    heads, groups = part.num_heads // split, max(1, part.num_groups // split)
    inner = heads * part.head_dim
    return heads, groups, inner, inner + 2 * groups * part.state_size
