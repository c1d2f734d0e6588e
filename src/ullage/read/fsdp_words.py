"""How FSDP is asked for in fine-tuning recipes, and how it is laid over a job."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.read.recipe_fields import Fields
from ullage.spec.training import FsdpSharding, Precision, Recompute, TrainingJob

_STRATEGIES: dict[str, FsdpSharding] = {
    "full_shard": "full_shard",
    "shard_grad_op": "shard_grad_op",
    "hybrid_shard": "hybrid",
}


class FsdpWords(Frozen):
    """How FSDP shards.

    Attributes:
        version: 1 or 2.
        offload: parameters, gradients and states are on the host.
        checkpoint: every wrapped layer is recomputed.
        mixed: under mixed precision, for which Accelerate makes what is trained fp32.
        group: ranks of one shard group, None: all (hybrid: those of a node).
    """

    sharding: FsdpSharding = "full_shard"
    version: int = 2
    offload: bool = False
    checkpoint: bool = False
    mixed: bool = True
    group: int | None = None


def trainer_fsdp(fields: Fields, *, version: int, mixed: bool) -> FsdpWords | None:
    """Return what the Trainer's ``fsdp`` and ``fsdp_config`` say; ``version``: of FSDP where they do not.

    Source: transformers@5.23.0:training_args.py:TrainingArguments._process_fsdp_args, _apply_legacy_fsdp_to_config.

    Raises:
        InputError: a value that the arguments cannot have.
    """
    value, config = fields.raw("fsdp"), _config(fields)
    if value in (None, "", False, []) or str(value).lower() == "false":
        return None
    text = " ".join(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else str(value)
    named = [sharding for name, sharding in _STRATEGIES.items() if name in text.split()]
    alone = "no_shard" in text.split() or "size_based" in text
    if alone or (not named and text.lower() != "true" and "offload" not in text and "auto_wrap" not in text):
        raise fields.wrong("fsdp", ", ".join(_STRATEGIES))
    if str(config.get("auto_wrap_policy") or "TRANSFORMER_BASED_WRAP").upper() != "TRANSFORMER_BASED_WRAP":
        raise InputError(
            _("{key} is not followed").format(key="fsdp_config: auto_wrap_policy"),
            where=fields.where,
            remedy=_("write {right}").format(right="TRANSFORMER_BASED_WRAP"),
        )
    again = str(config.get("reshard_after_forward", "true")).lower()
    kept: FsdpSharding = "shard_grad_op" if again in ("false", "shard_grad_op") else "full_shard"
    return FsdpWords(
        sharding=named[0] if named else kept,
        version=_version(config.get("version"), version),
        offload="offload" in text or _true(config.get("cpu_offload")) or _true(config.get("offload_params")),
        checkpoint=_true(config.get("activation_checkpointing")),
        mixed=mixed,
    )


def axolotl_fsdp(fields: Fields, *, mixed: bool) -> FsdpWords | None:
    """Return what axolotl's ``fsdp_config`` says; only its own keys are handed on to Accelerate.

    Whether a layer's parameters stay gathered is not among what reaches Accelerate: ``reshard_after_forward: false``
    leaves its default.
    Source: axolotl@0.19.0:axolotl/utils/trainer.py:setup_fsdp_envs, utils/distributed.py:build_parallelism_config,
        utils/schemas/fsdp.py.

    Raises:
        InputError: a value that the settings cannot have.
    """
    config, legacy = _config(fields), fields.raw("fsdp")
    stated, replicas, shards = (
        fields.raw("fsdp_version"), fields.count("dp_replicate_size") or 1, fields.count("dp_shard_size"),
    )  # fmt: skip
    if not config and not legacy:
        return None
    words = legacy if isinstance(legacy, list) else [legacy]
    if "shard_grad_op" in words:
        raise InputError(_("{key} is not followed").format(key="fsdp: shard_grad_op"), where=fields.where)
    if str(config.get("auto_wrap_policy") or "TRANSFORMER_BASED_WRAP").upper() == "SIZE_BASED_WRAP":
        raise InputError(_("{key} is not followed").format(key="fsdp_config: SIZE_BASED_WRAP"), where=fields.where)
    return FsdpWords(
        sharding="hybrid" if replicas > 1 else "full_shard",
        version=_version(stated if stated is not None else config.get("version"), 1),
        offload=_true(config.get("offload_params")),
        checkpoint=_true(config.get("activation_checkpointing")),
        mixed=mixed,
        group=shards if replicas > 1 else None,
    )


def _config(fields: Fields) -> dict[str, Any]:
    """Return ``fsdp_config`` with its keys as they are without their old prefix."""
    value = fields.raw("fsdp_config")
    if value in (None, "", {}):
        return {}
    if not isinstance(value, dict):
        raise fields.wrong("fsdp_config", _("its settings out"))
    return {str(key).removeprefix("fsdp_"): item for key, item in value.items()}


def _version(value: Any, default: int) -> int:
    return default if value is None else 1 if str(value) == "1" else 2


def _true(value: Any) -> bool:
    return str(value).lower() == "true"


def lay_fsdp(job: TrainingJob, words: FsdpWords) -> TrainingJob:
    """Lay FSDP over a job of the Trainer family, under the rules that know most of it.

    What is trained is made fp32 under mixed precision and computed in the narrow format (accelerate@1.15.0:
    accelerator.py:Accelerator.prepare_model, utils/fsdp_utils.py:fsdp2_prepare_model). Units, shards and their timing
    are those of FSDP itself, except around adapters and for optimizers that only the Trainer's rules know.
    """
    from ullage.engines.follows import BY_ELEMENT

    precision, full = job.precision, job.lora is None
    if full and words.mixed and precision.compute != "float32":
        precision = Precision(compute=precision.compute, params="float32", grads="float32")
    group = words.group or (job.machine.gpus_per_node if words.sharding == "hybrid" else None)
    offload = tuple(pair for pair in job.offload if pair[0] == "activations")
    activations = bool(offload)
    if words.offload:
        offload += (("params", "cpu"), ("optimizer", "cpu"))
    whole = words.sharding == "full_shard"
    own = full and job.optimizer in BY_ELEMENT and not activations
    known = job.optimizer in BY_ELEMENT
    tag = " fsdp2" if words.version == 2 and known else ""
    said = (_("FSDP 2 as FSDP 1 counts it, for {optimizer}").format(optimizer=job.optimizer),)
    return replace(
        job,
        engine=f"fsdp{words.version}" if own or not whole else "hf_trainer",
        engine_version=(job.engine_version + tag).strip(),
        parallel=replace(job.parallel, zero_stage=0, fsdp=words.sharding, shard_group_size=group),
        precision=precision,
        recompute=Recompute(kind="full") if words.checkpoint else job.recompute,
        offload=offload,
        assumed=(*job.assumed, *(said if words.version == 2 and not known else ())),
    )
