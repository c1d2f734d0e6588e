"""The tensors of residual streams.

Legend: H hidden_size, m num_streams.
"""

from __future__ import annotations

from ullage.account.parameters.parameter import Parameter, Role
from ullage.spec import model as spec


def hyper_connections(part: spec.HyperConnections, hidden_size: int) -> list[Parameter]:
    """Tensors of manifold-constrained hyper-connections, one map around each block of a layer, kept in float32.

    Formula: fn ((2 + m)*m, m*H): m weights to read, m to write and m x m to mix; base ((2 + m)*m); scale (3).
    Source: transformers@5.23.0:models/deepseek_v4/modeling_deepseek_v4.py:DeepseekV4HyperConnection;
        replicated over tensor-parallel ranks: vllm@0.33.0:models/deepseek_v4/nvidia/model.py:DeepseekV4DecoderLayer.
    """
    maps = (2 + part.num_streams) * part.num_streams
    shapes = {"fn": (maps, part.num_streams * hidden_size), "base": (maps,), "scale": (3,)}
    return [
        Parameter(name=f"{prefix}_{name}", shape=shape, role=Role.OTHER, dtype="float32")
        for prefix in part.prefixes
        for name, shape in shapes.items()
    ]
