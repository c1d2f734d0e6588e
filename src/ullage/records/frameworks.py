"""Which plug-ins a published run of fms-acceleration went through: its records quote the row of the benchmark.

The row's settings come first; its measurements are not looked at.
"""

from __future__ import annotations

import re

from ullage.frozen import Frozen
from ullage.records.schema import Record

_SOURCE = "foundation-model-stack/fms-acceleration/"
#: The first columns: bf16, epoch, fp16, framework_config.
#: Source: fms-acceleration@876e2ed6:scripts/benchmarks/refs/a100_80gb.csv (its header).
_ROW = re.compile(r"(?P<bf16>true|),[\d.]*,(?P<fp16>true|),(?P<name>[a-z0-9-]+),", re.IGNORECASE)


class Framework(Frozen):
    """What a configuration of the framework changes.

    Attributes:
        autocast: dtype of ``--bf16`` or ``--fp16``, None without: then nothing runs under autocast.
        prepared: the trainer prepares a quantised base (norms become fp32); the plug-ins do not.
        fused: of "rms_norm", "rope", "adapters", which run as fused kernels.
    """

    autocast: str | None = None
    prepared: bool = False
    fused: frozenset[str] = frozenset()


_ALL = frozenset(("rms_norm", "rope"))
#: Adapters are fused around a quantised base alone.
#: Source: fms-acceleration@876e2ed6:sample-configurations/*.yaml; plugins/fused-ops-and-kernels/src/
#:     fms_acceleration_foak/framework_plugin_fast_kernels.py:FastKernelsAccelerationPlugin.augmentation;
#:     plugins/accelerated-peft/src/fms_acceleration_peft/framework_plugin_bnb.py:_prepare_model_for_kbit_training.
#: Known error: as published, the configurations of a quantised base with Liger's loss misspell the key of the norms
#:     (fast_rsm_layernorm), which would leave them as they are. The commit that was measured (d58960c) is not at hand;
#:     its rows are those of fused norms, by 96 MiB per sequence, and the records say so.
_FUSED = {
    "none": frozenset[str](),
    "foak-fast-kernels": _ALL,
    "foak-fast-kernels-liger": _ALL,
    "baseline-peft-bnb": frozenset[str](),
    "accelerated-peft-bnb": frozenset[str](),
    "accelerated-peft-bnb-foak": _ALL | {"adapters"},
    "accelerated-peft-bnb-foak-liger": _ALL | {"adapters"},
    "accelerated-peft-autogptq": frozenset[str](),
    "accelerated-peft-autogptq-foak": _ALL | {"adapters"},
    "accelerated-peft-autogptq-foak-liger": _ALL | {"adapters"},
}
#: Group sizes of published GPTQ checkpoints, 0: none. Source: the model cards' tables of files, branch main, column GS.
_GROUP_SIZES = {"TheBloke/Mixtral-8x7B-Instruct-v0.1-GPTQ": 0}


def gptq_group_size(record: Record) -> int | None:
    """Return the group size of the GPTQ checkpoint that a record names, None where it is not known."""
    model = record.job.get("model")
    return _GROUP_SIZES.get(model) if isinstance(model, str) else None


def framework(record: Record) -> Framework | None:
    """Return the framework's configuration of a record, None where it names none."""
    row = _ROW.match(record.quote.strip()) if _SOURCE in record.source_url else None
    if row is None or row["name"].lower() not in _FUSED:
        return None
    name = row["name"].lower()
    return Framework(
        autocast="bfloat16" if row["bf16"] else "float16" if row["fp16"] else None,
        prepared=name == "baseline-peft-bnb",
        fused=_FUSED[name],
    )


def framework_flags(record: Record) -> tuple[tuple[str, str], ...]:
    """Return what a record's framework and checkpoint decide, as flags of a job."""
    found, flags = framework(record), []
    if found is not None and found.fused:
        flags.append(("fused_kernels", ",".join(sorted(found.fused))))
    if found is not None and not found.prepared and record.job.get("base_quantization") == "nf4":
        flags.append(("kbit_preparation", "none"))
    if found is not None and found.autocast is None and record.job.get("lora"):
        flags.append(("autocast", "none"))
    group_size = gptq_group_size(record)
    if group_size is not None:
        flags.append(("gptq_group_size", str(group_size)))
    return tuple(flags)
