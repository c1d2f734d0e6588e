"""What a framework's version does with a preference or reinforcement job, and the policy's own job."""

from __future__ import annotations

import re
from dataclasses import replace

from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec.mixers import ExtraTensor
from ullage.spec.model import Model
from ullage.spec.rlhf import ON_POLICY, PAIRED, REFERRED, LogProbStyle, Reference, Rlhf, RlhfKind, Rollout
from ullage.spec.training import TrainingJob

HUGGING_FACE = ("hf_trainer", "single", "ddp")
SHARDED = ("deepspeed", "fsdp1", "fsdp2")
#: Megatron-SWIFT's trainers that need no rollout.
#: Source: ms-swift@3602360a:swift/megatron/arguments/megatron_args.py:RLHFMegatronArgumentsMixin (rlhf_type).
MEGATRON_KINDS = ("dpo", "kto", "rm")
#: TRL whose rules stand here. Log-probabilities row by row since 0.15, in tiles without logits since 1.15.
#: Source: trl@0.15.2, @1.14.2 and @1.15.0:trainer/dpo_trainer.py, trainer/grpo_trainer.py, trainer/kto_trainer.py.
NEWEST_TRL, ROWS_SINCE, TILES_SINCE = (1, 16), (0, 15), (1, 15)
#: Trainers that still make logits. Source: trl@1.16.0:experimental/orpo/orpo_trainer.py, experimental/cpo.
ALWAYS_LOGITS = ("orpo", "cpo", "simpo", "ppo")
#: Source: trl@1.16.0:trainer/grpo_config.py:GRPOConfig.
DEFAULT_COMPLETION = 512


def trl_version(text: str) -> tuple[int, int] | None:
    """Return (major, minor) of ``trl 0.19`` in a version string."""
    match = re.search(r"trl\D{0,3}(\d{1,3})\.(\d{1,3})", text.lower())
    return (int(match.group(1)), int(match.group(2))) if match else None


def is_llamafactory(job: TrainingJob) -> bool:
    """Return whether LLaMA-Factory's own trainers run."""
    return re.search(r"llama.?factory", job.engine_version.lower()) is not None


def is_swift(job: TrainingJob) -> bool:
    """Return whether ms-swift's own trainers run."""
    return "swift" in job.engine_version.lower()


def resolve(job: TrainingJob) -> TrainingJob:
    """Return the job with reference, style of log-probabilities and rollout decided, and said.

    Raises:
        InputError: what no rule here follows.
    """
    asked = job.rlhf
    assert asked is not None
    _refuse(job, asked)
    said = list(job.assumed)
    reference = asked.reference or _reference(job, asked.kind)
    if asked.reference is None and asked.kind in (*REFERRED, "grpo"):
        said.append(_("reference model: {kind}").format(kind=_REFERENCES[reference]))
    style = _style(job, asked, said)
    asked = replace(asked, reference=reference, log_probs=style)
    if asked.kind in ON_POLICY:
        asked = _with_rollout(job, asked, said)
    return replace(job, rlhf=asked, assumed=tuple(said))


_REFERENCES: dict[Reference, str] = {
    "copy": "a frozen copy of the model",
    "adapter": "the model without its adapters",
    "precomputed": "log-probabilities made before training",
    "none": "none",
}


def _refuse(job: TrainingJob, asked: Rlhf) -> None:
    known = job.engine in (*HUGGING_FACE, *SHARDED, "megatron")
    sharded = job.engine in SHARDED or bool(job.parallel.zero_stage) or job.parallel.fsdp is not None
    if not known or (job.engine == "megatron" and asked.kind not in MEGATRON_KINDS):
        raise InputError(_("no rules for {kind} under {engine}").format(kind=asked.kind, engine=job.engine))
    if asked.kind == "ppo" and sharded:
        raise InputError(_("no rules for ppo with sharded models"), remedy=_("on one GPU or with DDP"))
    if asked.reference == "adapter" and job.lora is None:
        raise InputError(_("a reference without adapters needs adapters"), remedy=_("give --lora, or reference=copy"))
    if job.engine != "megatron" and job.loss in ("fused", "liger") and not _layers_alone(job, asked):
        raise InputError(_("the fused preference losses of Liger are not followed"))
    if job.loss == "fused" and job.engine != "megatron":
        raise InputError(_("the loss of {kind} is not a cross entropy").format(kind=asked.kind))
    if asked.completion_len is not None and asked.completion_len >= job.seq_len:
        raise InputError(
            _("a completion of {count:,} tokens leaves no prompt in rows of {total:,}").format(
                count=asked.completion_len, total=job.seq_len
            ),
            remedy=_("a row holds prompt and completion"),
        )


def _layers_alone(job: TrainingJob, asked: Rlhf) -> bool:
    """Return whether ``use_liger_kernel`` changes the layers and leaves the loss.

    Source: llamafactory@0.9.5:model/model_utils/liger_kernel.py:apply_liger_kernel (require_logits);
        trl@1.16.0:trainer/dpo_trainer.py:DPOTrainer.__init__ (fused_linear_cross_entropy False).
    """
    own = is_llamafactory(job) or asked.log_probs == "full"
    return asked.kind == "rm" or own or (trl_version(job.engine_version) or NEWEST_TRL) >= TILES_SINCE


def _reference(job: TrainingJob, kind: RlhfKind) -> Reference:
    """Return the framework's own reference: with adapters the model itself, they switched off.

    GRPO's has none in TRL, whose beta is 0 by default, and one in ms-swift (0.04).
    Source: trl@1.16.0:trainer/dpo_trainer.py:DPOTrainer.__init__, trainer/grpo_config.py:GRPOConfig;
        ms-swift@3602360a:swift/megatron/arguments/megatron_args.py:RLHFMegatronArgumentsMixin.__post_init__.
    """
    if kind not in REFERRED and not (kind == "grpo" and is_swift(job)):
        return "none"
    return "adapter" if job.lora is not None else "copy"


def _style(job: TrainingJob, asked: Rlhf, said: list[str]) -> LogProbStyle:
    if asked.kind == "rm":
        return "unused" if asked.log_probs == "unused" or is_llamafactory(job) else "none"
    if job.engine == "megatron":
        return "rows"  # its cross entropy gives one loss a token, which is the negative log-probability
    if asked.log_probs or job.loss == "chunked":
        return asked.log_probs or "tiled"
    if is_llamafactory(job):
        return "full"
    if is_swift(job):
        return "rows"
    if "verl" in job.engine_version.lower() and job.engine in SHARDED:
        return "inplace"
    version = trl_version(job.engine_version)
    if version is None:
        version = NEWEST_TRL
        said.append(_("TRL {version}, the newest whose rules are known").format(version="1.16"))
    if version < ROWS_SINCE:
        return "full"
    return "rows" if version < TILES_SINCE or asked.kind in ALWAYS_LOGITS else "tiled"


def _with_rollout(job: TrainingJob, asked: Rlhf, said: list[str]) -> Rlhf:
    length = asked.completion_len
    if length is None:
        length = max(1, min(DEFAULT_COMPLETION, job.seq_len - 1))
        said.append(_("completions of {count:,} tokens").format(count=length))
    if asked.rollout is None:
        said.append(_("completions generated by transformers on the same card"))
    return replace(
        asked,
        completion_len=length,
        rollout=asked.rollout or Rollout(),
        steps_per_generation=asked.steps_per_generation or job.grad_accum,
    )


def policy_job(job: TrainingJob) -> TrainingJob:
    """Return the policy's own job: pairs as two rows, a scalar head where there is one, its loss by style.

    A packed row holds both answers of its pairs.
    Source: ms-swift@3602360a:swift/dataset/packing.py:PackingDataset.create_packed_idx (lengths summed).
    """
    asked = job.rlhf
    assert asked is not None
    rows = job.micro_batch_size * (2 if asked.kind in PAIRED and not job.packing else 1)
    model = scalar_head(job.model, alone=asked.headless) if asked.kind == "rm" else job.model
    found = replace(job, model=model, micro_batch_size=rows, rlhf=replace(asked, alone=True))
    if job.engine == "megatron":
        return found
    if asked.log_probs in ("tiled", "none", "unused"):
        # no logits of all tokens: as Liger's loss stands to the rest of the step, its kernels left out
        kernels = () if job.loss == "liger" or "fused_kernels" in dict(job.flags) else (("fused_kernels", ""),)
        return replace(found, loss="liger", flags=(*job.flags, *kernels))
    kernels = (("fused_kernels", "rms_norm,rope,swiglu"),) if job.loss == "liger" else ()
    return replace(found, loss="plain", flags=(*job.flags, *kernels))


def scalar_head(model: Model, *, alone: bool = True) -> Model:
    """Return the model with one score a token in the place of the vocabulary's head, or beside it.

    Source: transformers@5.23.0:modeling_layers.py:GenericForSequenceClassification.__init__ (``score``, no bias).
    """
    score = ExtraTensor(name="score.weight", shape=(1, model.hidden_size), linear=False)
    extras = (*model.extras, score)
    return (
        replace(model, tied_embeddings=True, lm_head_bias=False, extras=extras)
        if alone
        else replace(model, extras=extras)
    )
