"""What fine-tuning recipes say of preference and reinforcement training → :class:`~ullage.spec.rlhf.Rlhf`.

Source: trl@1.16.0:trainer/{dpo,kto,reward,grpo,rloo}_config.py and scripts/; llamafactory@0.9.5:hparams/
finetuning_args.py, train/{dpo,kto,rm}/; axolotl@0.19.0:src/axolotl/utils/schemas/{enums,trl,vllm}.py,
core/builders/rl.py (TRL 1.9).
"""

from __future__ import annotations

from dataclasses import replace

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.recipe_fields import Fields
from ullage.read.rlhf_words import kind_of
from ullage.spec.rlhf import ON_POLICY, Reference, Rlhf, RlhfKind, Rollout

#: Settings of the losses, of sampling and of logging, which cost no memory.
HARMLESS = (
    "script", "loss_type", "loss_weights", "beta", "rl_beta", "orpo_alpha", "simpo_gamma", "cpo_alpha", "rpo_alpha",
    "kto_desirable_weight", "kto_undesirable_weight", "desirable_weight", "undesirable_weight", "pref_beta",
    "pref_ftx", "pref_bco_weight", "dpo_label_smoothing", "kto_chosen_weight", "kto_rejected_weight", "ld_alpha",
    "epsilon", "epsilon_high", "delta", "f_divergence_type", "truncation_mode", "temperature", "top_p", "top_k",
    "min_p", "repetition_penalty", "num_generations", "num_generations_eval", "num_iterations", "scale_rewards",
    "reward_weights", "reward_funcs", "reward_model_name_or_path", "importance_sampling_level",
    "mask_truncated_completions", "center_rewards_coefficient", "disable_dropout", "num_completions_to_print",
    "log_completions", "pad_to_multiple_of", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
    "vllm_server_base_url", "vllm_group_port", "vllm_importance_sampling_correction",
    "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max", "shuffle_dataset", "generation_kwargs",
    "chat_template_kwargs", "max_prompt_length", "dpo_use_weighting", "precompute_ref_batch_size", "ref_model",
    "ref_model_adapters", "max_completion_length", "loss_type_weights", "tools", "system_prompt", "label_smoothing",
    "missing_eos_penalty", "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps", "response_length",
    "total_episodes", "num_ppo_epochs", "kl_coef", "cliprange", "vf_coef", "stop_token", "generation_batch_size",
    "cosine_", "overlong_filter", "token_entropy_percentile_threshold", "f_alpha_divergence_coef", "use_weighting",
)  # fmt: skip
#: TRL's scripts by the word that they begin with.
_SCRIPTS: dict[str, RlhfKind | None] = {
    "sft": None, "dpo": "dpo", "kto": "kto", "reward": "rm", "grpo": "grpo", "gspo": "grpo", "rloo": "rloo",
    "orpo": "orpo", "cpo": "cpo", "ppo": "ppo",
}  # fmt: skip
#: Those that hold further models, or make completions, in ways that are not followed.
#: Source: trl@1.16.0:experimental/{gkd,gold,minillm,sdft,sdpo,ssd,nash_md,online_dpo,xpo,prm,bco,tpo,async_grpo}/,
#: trainer/distillation_trainer.py.
_NOT_FOLLOWED = frozenset((
    "gkd", "gold", "distillation", "minillm", "sdft", "sdpo", "ssd", "nash", "online", "xpo", "prm", "bco", "tpo",
    "async", "mpo", "server", "iw", "diffusion", "continuous",
))  # fmt: skip


def trl_kind(fields: Fields) -> RlhfKind | None:
    """Return what TRL's script trains: named on the command line, or seen from settings that only one has.

    Raises:
        InputError: a script of TRL that is not followed.
    """
    script = (fields.word("script") or "").removeprefix("run_")
    if not _NOT_FOLLOWED.isdisjoint(script.split("_")) or fields.raw("teacher_model_name_or_path") is not None:
        raise InputError(
            _("TRL's {script} is not followed").format(script=(script or "teacher_model_name_or_path")[:40]),
            where=fields.where,
            remedy=_("known are {known}").format(known=", ".join(_SCRIPTS)),
        )
    named = script.split("_")[0]
    if named in _SCRIPTS:
        return _SCRIPTS[named]
    if any(fields.values.get(key) is not None for key in ("num_generations", "max_completion_length")):
        return "grpo"
    return "dpo" if fields.values.get("precompute_ref_log_probs") is not None else None


def trl_rlhf(fields: Fields) -> tuple[Rlhf | None, int | None]:
    """Return what TRL's arguments say, and the length of a row where prompt and completion are given apart.

    Raises:
        InputError: a value that its argument cannot have.
    """
    kind = trl_kind(fields)
    if kind is None:
        return None, None
    found = Rlhf(kind=kind, reference=_trl_reference(fields, kind))
    if kind not in ON_POLICY:
        return found, None
    completion = fields.count("max_completion_length") or fields.count("response_length") or 512
    judged = fields.raw("reward_model_name_or_path") or fields.raw("reward_model_path")
    found = replace(found, reward_model=judged is not None)
    found = replace(found, completion_len=completion, steps_per_generation=fields.count("steps_per_generation"))
    prompt, whole = fields.count("max_prompt_length"), fields.count("vllm_max_model_length")
    return replace(found, rollout=_trl_rollout(fields)), prompt + completion if prompt else whole


def _trl_reference(fields: Fields, kind: RlhfKind) -> Reference | None:
    """Return the reference where the arguments decide about it; GRPO's stands where beta is above 0."""
    if fields.flag("precompute_ref_log_probs"):
        return "precomputed"
    beta = fields.raw("beta")
    given = isinstance(beta, (int, float)) or (isinstance(beta, str) and beta.replace(".", "", 1).isdigit())
    if kind in ("grpo", "rloo") and given:
        peft = fields.flag("use_peft")
        return "none" if not float(beta) else "adapter" if peft else "copy"
    return None


def _trl_rollout(fields: Fields) -> Rollout:
    """Return where TRL generates: with the policy unless vLLM is asked for, and then beside it."""
    server = fields.word("vllm_mode") == "server"
    fraction = fields.fraction("vllm_gpu_memory_utilization", 0.3)
    sleeps = fields.flag("vllm_enable_sleep_mode")
    fields.count("vllm_tensor_parallel_size")
    if not fields.flag("use_vllm"):
        return Rollout()
    return Rollout(engine="server") if server else Rollout(engine="vllm", memory_fraction=fraction, sleeps=sleeps)


def llamafactory_rlhf(fields: Fields, *, adapted: bool) -> Rlhf | None:
    """Return what LLaMA-Factory's ``stage`` says; log-probabilities are made of all logits in fp32 at once.

    Raises:
        InputError: a stage that is not followed.
    """
    stage, loss = fields.word("stage") or "sft", fields.word("pref_loss") or "sigmoid"
    if stage in ("sft", "pt"):
        return None
    if stage == "rm":
        return Rlhf(kind="rm", reference="none", log_probs="unused")
    if stage not in ("dpo", "kto"):
        raise InputError(
            _("stage {stage!r} is not followed: further models share its card").format(stage=stage[:20]),
            where=fields.where,
            remedy=_("known are {known}").format(known="sft, pt, dpo, kto, rm"),
        )
    if stage == "dpo" and loss in ("orpo", "simpo"):
        return Rlhf(kind=kind_of(loss, fields.where), reference="none", log_probs="full")
    own = fields.raw("ref_model") is not None
    reference: Reference = "adapter" if adapted and not own else "copy"
    return Rlhf(kind=kind_of(stage, fields.where), reference=reference, log_probs="full")


def axolotl_rlhf(fields: Fields, *, adapted: bool) -> Rlhf | None:
    """Return what axolotl's ``rl`` or ``reward_model`` says.

    Raises:
        InputError: a kind or a value that is not followed.
    """
    rl = fields.word("rl")
    if fields.flag("reward_model"):
        return Rlhf(kind="rm", reference="none")
    if rl is None:
        return None
    kind = kind_of(rl, fields.where)
    section = fields.section("trl") or Fields({}, fields.where)
    beta = section.raw("beta") if section.raw("beta") is not None else fields.raw("rl_beta")
    reference: Reference | None = None
    if kind == "dpo" and fields.flag("precompute_ref_log_probs"):
        reference = "precomputed"
    elif kind == "dpo" and fields.flag("rl_adapter_ref_model"):
        reference = "copy"
    elif kind == "grpo":
        reference = "none" if not beta else "adapter" if adapted else "copy"
    found = Rlhf(kind=kind, reference=reference, log_probs="rows")
    return _axolotl_rollout(fields, section, found) if kind in ON_POLICY else found


def _axolotl_rollout(fields: Fields, section: Fields, found: Rlhf) -> Rlhf:
    vllm = fields.section("vllm") or Fields({}, fields.where)
    fraction = vllm.fraction("gpu_memory_utilization", 0.3)
    rollout = Rollout()
    if section.flag("use_vllm"):
        beside = Rollout(engine="vllm", memory_fraction=fraction, sleeps=section.flag("vllm_enable_sleep_mode"))
        rollout = beside if section.word("vllm_mode") == "colocate" else Rollout(engine="server")
    return replace(found, rollout=rollout, completion_len=section.count("max_completion_length"))
