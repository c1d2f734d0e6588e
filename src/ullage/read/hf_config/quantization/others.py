"""AMD Quark and torchao checkpoints."""

from __future__ import annotations

from typing import Any

from ullage.read.hf_config.keys import Keys
from ullage.read.hf_config.quantization import formats
from ullage.read.hf_config.quantization.methods import Context, Rules, all_linear, check_pattern, names, table, unknown
from ullage.read.hf_config.quantization.patterns import fold_modules, module_pattern
from ullage.spec.model import QuantRule
from ullage.units import WeightFormat


def quark(part: Keys, context: Context) -> Rules:
    """Read AMD Quark: a global scheme, schemes by glob, and ``exclude``.

    Source: vllm@0.33.0:vllm/model_executor/layers/quantization/quark/quark.py.
    """
    excluded = fold_modules(names(part, "exclude"), num_layers=context.num_layers)
    special = []
    for name, config in table(part, "layer_quant_config").items():
        check_pattern(name, part.at("layer_quant_config"))
        special.append(QuantRule(pattern=module_pattern(name), format=_quark_format(config, part.at(name))))
    everywhere = _quark_format(part.raw("global_quant_config"), part.at("global_quant_config"))
    rules = all_linear(everywhere, excluded)
    return (*rules[: len(excluded)], *special, *rules[len(excluded) :])


def _quark_format(config: Any, where: str) -> WeightFormat | None:
    weight = config.get("weight") if isinstance(config, dict) else None
    if isinstance(weight, list):
        weight = weight[0] if weight else None
    if not isinstance(weight, dict):
        return None
    keys = Keys(weight, where)
    dtype, scheme = keys.text("dtype", ""), keys.text("qscheme", "per_tensor")
    group = keys.integer("group_size", 0, low=0, high=2**20)
    if dtype in ("fp4", "mxfp4"):
        return formats.mxfp4(group or 32)
    if dtype in ("fp8_e4m3", "fp8_e4m3fn"):
        return formats.fp8_per_row() if scheme == "per_channel" else formats.fp8_per_tensor(static=True)
    if dtype in ("int8", "int4", "uint4"):
        bits = 8 if dtype == "int8" else 4
        if scheme == "per_group":
            return formats.int_packed(bits, group or 128, symmetric=dtype != "uint4")
        return formats.int8_per_row() if bits == 8 else formats.int_packed(4, 0)
    raise unknown(f"quark {dtype} {scheme}", where)


#: torchao configurations by name -> the format, given a group size.
_TORCHAO = {
    "int8weightonly": lambda group: formats.int8_per_row(),
    "int8dynamicactivationint8weight": lambda group: formats.int8_per_row(),
    "int4weightonly": lambda group: formats.awq(4, group or 128),
    "float8weightonly": lambda group: formats.fp8_per_row(),
    "float8dynamicactivationfloat8weight": lambda group: formats.fp8_per_tensor(),
}


def torchao(part: Keys, context: Context) -> Rules:
    """Read torchao: one configuration for all linear layers. Configurations by module are not understood.

    Source: transformers@5.23.0:utils/quantization_config.py:TorchAoConfig; pytorch/ao:torchao/quantization/quant_api.py
    (Float8WeightOnlyConfig scales each row, Float8DynamicActivationFloat8WeightConfig by its ``granularity``).
    """
    skipped = fold_modules(names(part, "modules_to_not_convert"), num_layers=context.num_layers)
    if part.flag("include_input_output_embeddings", False):
        raise unknown("torchao include_input_output_embeddings", part.where)
    kind: Any = part.raw("quant_type")
    settings: Any = part.raw("quant_type_kwargs")
    if isinstance(kind, dict):
        if "default" in kind and len(kind) > 1:
            raise unknown("torchao " + ", ".join(sorted(map(str, kind)))[:60], part.at("quant_type"))
        kind = kind.get("default", kind)
        settings = kind.get("_data") if isinstance(kind, dict) else None
        kind = kind.get("_type") if isinstance(kind, dict) else kind
    own = Keys(settings if isinstance(settings, dict) else {}, part.at("quant_type"))
    key = str(kind or "").lower().replace("_", "").removesuffix("config")
    if key not in _TORCHAO:
        raise unknown(f"torchao {str(kind)[:60]}", part.where)
    if "PerRow" in str(own.raw("granularity")):
        return all_linear(formats.fp8_per_row(), skipped)
    return all_linear(_TORCHAO[key](own.integer("group_size", None, high=2**20)), skipped)
