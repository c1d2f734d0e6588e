"""A quantised frozen base under ZeRO: stages 1 and 2 leave it whole on every rank, stage 3 spreads what it packs."""

from __future__ import annotations

from dataclasses import replace

from ullage.account.zero import ZeroSettings
from ullage.engines.hf_trainer import fsdp
from ullage.errors import InputError
from ullage.i18n import _
from ullage.ledger import Term, ranged
from ullage.spec.training import TrainingJob
from ullage.units import dtype_bytes

_STAGE = "zero_stage_of_base"


def as_followed(job: TrainingJob) -> TrainingJob:
    """Return the job for the Trainer's own rules, with the stage as a flag.

    Source: peft@0.19.1:docs/source/accelerate/deepspeed.md (stage 3 spreads a 4-bit base whose storage has the format
        of the other parameters, bnb_4bit_quant_storage); deepspeed@0.17.0:runtime/zero/partition_parameters.py:
        Init._post_init_method (every parameter of a module is spread, whatever it packs).

    Raises:
        InputError: a base that stage 3 cannot spread, or parameters on the host.
    """
    stage, base = job.parallel.zero_stage, job.base_quantization
    if stage == 3 and base not in ("nf4", "fp4"):
        raise InputError(
            _("ZeRO-3 does not spread a base in {name}: its values are no 16-bit format").format(name=str(base)[:20]),
            remedy=_("use nf4 with bnb_4bit_quant_storage bfloat16, or ZeRO-2"),
        )
    if dict(job.offload).get("params"):
        raise InputError(_("a quantised base under ZeRO is not followed where its parameters lie on the host"))
    said = (
        _("the 4-bit base is stored in a 16-bit format (bnb_4bit_quant_storage), so that ZeRO-3 spreads it")
        if stage == 3
        else _("the quantised base lies whole on every rank: ZeRO-{stage} spreads gradients and states").format(
            stage=stage
        )
    )
    parallel = replace(job.parallel, zero_stage=0, fsdp="full_shard" if stage == 3 else None)
    flags = (*job.flags, (_STAGE, str(stage)))
    return replace(job, parallel=parallel, flags=flags, assumed=(*job.assumed, said))


def stage_of(job: TrainingJob) -> int:
    """Return the stage of ZeRO that spreads a quantised base's adapters, 0: none."""
    return int(dict(job.flags).get(_STAGE, "0"))


def live_term(job: TrainingJob) -> Term:
    """Return the parameters that stage 3 has gathered at once.

    Formula: as many as ``stage3_max_live_parameters`` elements of storage (1e9, two bytes each), and no more than there
        are; at least the largest layer, at most a prefetch bucket more. Four packed values make one element.
    Source: deepspeed@0.17.0:runtime/zero/partitioned_param_coordinator.py:PartitionedParameterCoordinator.
        release_sub_module; runtime/zero/config.py.
    """
    settings, width = ZeroSettings(stage=3), int(dtype_bytes(job.precision.compute))
    found = fsdp.unsharded(job)
    whole = found.root_bytes + len(job.model.layers) * found.layer_bytes
    live = min(settings.max_live * width, whole)
    return ranged(
        "unsharded_parameters",
        live,
        low=min(live, found.layer_bytes),
        high=live + settings.prefetch_bucket * width,
        formula="stage3_max_live_parameters",
        source="deepspeed@0.17.0:runtime/zero/config.py:DeepSpeedZeroConfig",
    )


def bucket_term(job: TrainingJob) -> Term:
    """Return the buckets through which stages 1 and 2 reduce: up to two of ``reduce_bucket_size`` elements.

    The Trainer's "auto" makes one of hidden_size squared elements; DeepSpeed's own default has 5e8.
    Source: transformers@5.23.0:integrations/deepspeed.py:HfTrainerDeepSpeedConfig.trainer_config_finalize;
        deepspeed@0.17.0:runtime/zero/stage_1_and_2.py:reset_partition_gradient_structures, ipg_buffer.
    """
    settings, width = ZeroSettings(stage=stage_of(job)), int(dtype_bytes(job.precision.compute))
    auto = job.model.hidden_size**2 * width
    return ranged("reduce_buckets", auto, low=0, high=2 * settings.reduce_bucket * width, formula="hidden_size^2")
