"""What a version of transformers, PEFT and the Trainer does when nothing else is said."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

from ullage.account.activations.logits import LossRecipe
from ullage.account.activations.saved import Implementation
from ullage.account.adapters.names import rule_of
from ullage.account.adapters.rule import AdapterPrecision
from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec.training import TrainingJob

Version = tuple[int, int]
NEWEST: Version = (5, 23)
#: Logits become fp32 in the model's forward up to here. Source: transformers@4.45.2:models/llama/modeling_llama.py:
#: LlamaForCausalLM.forward (``logits.float()``); @4.46 moved it to loss/loss_utils.py.
UPCAST_IN_LOSS: Version = (4, 46)
#: From here labels are padded instead of shifting the logits. Source: transformers@4.49.0:loss/loss_utils.py:
#: ForCausalLMLoss, against @4.48.1.
NO_SHIFT_COPY: Version = (4, 49)
#: PEFT casts the input of adapters around GPTQ; it did not at 0.13.2. Versions between were not read.
CASTS_FOR_GPTQ: Version = (0, 14)
#: Source: transformers@5.23.0:training_args.py (default_optim with torch 2.8 or newer).
FUSED_BY_DEFAULT: Version = (5, 0)
#: Experts as one grouped product. Source: transformers@5.23.0:integrations/moe.py:grouped_mm_experts_forward.
GROUPED_EXPERTS: Version = (5, 0)
#: Checkpointing stops early and keeps no second output. Source: transformers@5.23.0:modeling_utils.py
#: (use_reentrant False); reentrant before, torch@2.13.0:torch/utils/checkpoint.py:CheckpointFunction.backward.
NOT_REENTRANT: Version = (5, 0)
#: Attention classes that copied keys and values to all heads even for FlashAttention, until attention became one
#: function for all models; llama and granite do not.
#: Source: transformers@4.45.2:models/mistral/modeling_mistral.py:MistralFlashAttention2.forward, mixtral and qwen2
#: likewise; @4.48.1:integrations/flash_attention.py.
REPEATED_BEFORE: Version = (4, 48)
REPEATS_FOR_FLASH = ("MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM")
#: Source: transformers@5.23.0:models/gpt2/modeling_gpt2.py:eager_attention_forward (no fp32 softmax);
#: models/gpt_oss/modeling_gpt_oss.py:eager_attention_forward.
PLAIN_SOFTMAX = ("GPT2LMHeadModel", "GptOssForCausalLM")
#: Source: transformers@5.23.0:models/gemma2/modeling_gemma2.py:Gemma2RMSNorm,
#: models/gpt_oss/modeling_gpt_oss.py:GptOssRMSNorm, models/qwen3_next/modeling_qwen3_next.py:Qwen3NextRMSNorm.
LATE_CAST = (
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3ForConditionalGeneration",
    "GptOssForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5ForConditionalGeneration",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
)
#: Models that have no SDPA: attention is written out where nothing else is asked for.
#: Source: transformers@5.23.0:models/gpt_oss/modeling_gpt_oss.py:GptOssPreTrainedModel (_supports_sdpa False), and
#: gemma2, gemma4, mimo_v2_flash, deepseek_v4 likewise.
NO_SDPA = (
    "GptOssForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma4ForCausalLM",
    "MiMoV2FlashForCausalLM",
    "DeepseekV4ForCausalLM",
)
#: Routers that multiply in fp32, with fp32 copies of input and weight.
#: Source: transformers@5.23.0:models/deepseek_v3/modeling_deepseek_v3.py:DeepseekV3TopkRouter.forward; the others
#: likewise.
WIDE_ROUTER = (
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV32ForCausalLM",
    "Dots1ForCausalLM",
    "ExaoneMoeForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "GlmMoeDsaForCausalLM",
    "KimiLinearForCausalLM",
    "MiMoV2FlashForCausalLM",
    "NemotronHForCausalLM",
    "SolarOpenForCausalLM",
)
#: Those of them that score with a softmax in fp32; the others take a sigmoid of the product.
#: Source: transformers@5.23.0:models/deepseek_v2/modeling_deepseek_v2.py:DeepseekV2TopkRouter.forward.
SOFTMAX_ROUTER = ("DeepseekV2ForCausalLM",)
#: Routers whose weights go back to the compute dtype before the experts' outputs are multiplied.
#: Source: transformers@5.23.0:models/qwen3_moe/modeling_qwen3_moe.py:Qwen3MoeTopKRouter.forward and those likewise;
#: models/gpt_oss/modeling_gpt_oss.py:GptOssTopKRouter.forward (softmax in the compute dtype).
NARROW_ROUTING = (
    "GptOssForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "OlmoeForCausalLM",
    "FlexOlmoForCausalLM",
    "Ernie4_5_MoeForCausalLM",
    "HunYuanMoEV1ForCausalLM",
    "LongcatFlashForCausalLM",
)
#: Source: transformers@5.23.0:models/gpt_oss/modeling_gpt_oss.py:GptOssExperts._apply_gate.
CLAMPED = ("GptOssForCausalLM",)
#: Models that divide the logits by a constant, and that multiply the embeddings by one.
#: Source: transformers@4.45.2:models/granite/modeling_granite.py; models/gemma/modeling_gemma.py (embeddings alone).
SCALED_EMBEDDINGS = ("GraniteForCausalLM", "GraniteMoeForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM")


class Recipe(Frozen):
    """All that a job leaves open, decided.

    Attributes:
        implementation, loss, adapters: which kernels run.
        reentrant: recompute keeps a second output of the layer.
        norms_fp32: k-bit preparation made norms and biases fp32, and with them the residual stream.
        autocast_casts: fp32 weights are cast to the compute dtype, and the casts live as long as the forward pass.
        keeps_gradients: gradients stay until the next step begins (a plain loop); the Trainer frees them.
        length_unknown: ``seq_len`` is the longest that may come (flag ``seq_len_at_most``).
        impl_assumed: the job did not say which implementation of the optimizer step runs.
        scaled_embeddings: the embeddings are multiplied, so that the unscaled ones may stay beside them.
    """

    implementation: Implementation
    loss: LossRecipe
    adapters: AdapterPrecision
    reentrant: bool
    norms_fp32: bool
    autocast_casts: bool
    keeps_gradients: bool
    scaled_embeddings: bool
    length_unknown: bool
    impl_assumed: bool
    version: Version


def transformers_version(text: str) -> Version | None:
    """Return (major, minor) of ``transformers 4.48.1`` in a version string, or of a bare version."""
    match = re.search(r"transformers\D{0,3}(\d{1,3})\.(\d{1,3})", text) or re.fullmatch(
        r"(\d{1,3})\.(\d{1,3})(?:\.\S*)?", text.strip()
    )
    return (int(match.group(1)), int(match.group(2))) if match else None


def resolve(job: TrainingJob) -> tuple[TrainingJob, Recipe]:
    """Return the job with its defaults filled in and said, and the recipe that follows.

    Raises:
        InputError: what this room does not do.
    """
    refuse(job)
    version = transformers_version(job.engine_version)
    assumed = list(job.assumed)
    if version is None:
        version = NEWEST
        assumed.append(_("transformers {version}, the newest whose rules are known").format(version="5.23"))
    attention = job.attention
    if attention is None:
        attention = "eager" if job.model.architecture in NO_SDPA else "sdpa"
        assumed.append(_("attention: {kind}, the default of transformers").format(kind=attention))
    loss = job.loss or "plain"
    if job.loss is None:
        assumed.append(_("loss: cross entropy of PyTorch"))
    impl = job.optimizer_impl
    if impl is None:
        impl = "fused" if version >= FUSED_BY_DEFAULT and job.engine != "single" else "foreach"
        assumed.append(_("optimizer implementation: {impl}").format(impl=impl))
    if any(getattr(mixer, "indexer", None) for layer in job.model.layers for mixer in layer.mixers):
        assumed.append(_("sparse attention is trained densely: the indexer's own tensors are not counted"))
    if job.compile:
        sentence = _("torch.compile: what its partitioner keeps, and the loss in the graph")
        if not compiles(job):
            sentence = _("torch.compile: counted as if eager, because a quantised base breaks its graphs")
        assumed.append(sentence)
    filled = replace(job, attention=attention, loss=loss, optimizer_impl=impl, assumed=tuple(assumed))
    return filled, replace(_recipe(filled, version), impl_assumed=job.optimizer_impl is None)


def refuse(job: TrainingJob) -> None:
    """Refuse what the rules do not cover.

    Raises:
        InputError: sharded states, a split model, or Unsloth.
    """
    parallel = job.parallel
    sharded = parallel.fsdp not in (None, "full_shard")
    sizes = (parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.context_parallel_size)
    if sharded or any(size > 1 for size in sizes):
        raise InputError(
            _("the {engine} rules know one GPU, DDP, ZeRO and FSDP full_shard, no other split yet").format(
                engine=job.engine
            )
        )
    if "unsloth" in job.engine_version.lower():
        raise InputError(_("Unsloth has rules of its own"), remedy=_("write --engine unsloth"))


def _recipe(job: TrainingJob, version: Version) -> Recipe:
    fused = fused_kernels(job)
    prepared = job.base_quantization in ("nf4", "fp4", "int8") and not fused and not _casts_back(job)
    adapted = job.lora is not None
    autocast = job.precision.params == "float32" and job.precision.compute != "float32"
    return Recipe(
        implementation=_implementation(job, version, fused, prepared),
        loss=_loss(job, version),
        adapters=replace(precision_of(job), uncast=_uncast(job, prepared), fused="adapters" in fused),
        reentrant=_reentrant(job, version),
        norms_fp32=prepared,
        autocast_casts=autocast,
        keeps_gradients=job.engine == "single",
        scaled_embeddings=adapted and job.model.architecture in SCALED_EMBEDDINGS,
        length_unknown="seq_len_at_most" in dict(job.flags),
        impl_assumed=False,
        version=version,
    )


def _reentrant(job: TrainingJob, version: Version) -> bool:
    """Return whether checkpoints are reentrant: as the flag ``use_reentrant`` says, else as the version does."""
    stated = dict(job.flags).get("use_reentrant")
    return version < NOT_REENTRANT if stated is None else stated == "true"


def precision_of(job: TrainingJob) -> AdapterPrecision:
    """Return the number formats around adapters.

    The Trainer computes under autocast; a loop of one's own with 16-bit weights does not, nor does a Trainer that was
    not asked for mixed precision (flag ``autocast`` "none"), and adapters cast their input to their own fp32.
    Source: transformers@5.23.0:trainer.py:Trainer.compute_loss_context_manager; peft@0.21.2:tuners/lora/layer.py:
        Linear.forward (_cast_input_dtype).
    """
    lora = job.lora
    dtype = (lora.dtype if lora else None) or "float32"
    if lora is not None and lora.kind != "lora" and rule_of(lora.kind).base_dtype:
        dtype = job.precision.compute
    autocast = job.engine != "single" or job.precision.params == "float32"
    autocast = autocast and dict(job.flags).get("autocast") != "none"
    return AdapterPrecision(dtype=dtype, compute_dtype=job.precision.compute, autocast=autocast)


def _uncast(job: TrainingJob, prepared: bool) -> str | None:
    """Return the dtype of inputs that adapters around a quantised base take as they come, None where they cast.

    Source: peft@0.21.2:tuners/lora/bnb.py:Linear4bit.forward; @0.13.2:tuners/lora/gptq.py:QuantLinear.forward, against
        @0.21.2 (_cast_input_dtype).
    """
    if job.base_quantization in ("nf4", "fp4"):
        return "float32" if prepared else job.precision.compute
    found = re.search(r"peft\D{0,3}(\d{1,3})\.(\d{1,3})", job.engine_version)
    earlier = found is not None and (int(found.group(1)), int(found.group(2))) < CASTS_FOR_GPTQ
    return job.precision.compute if job.base_quantization == "gptq" and earlier else None


def _casts_back(job: TrainingJob) -> bool:
    """Return whether the trainer does without k-bit preparation, or makes its fp32 norms 16-bit again.

    Source: trl@0.11.4:trainer/sft_trainer.py:SFTTrainer.__init__ (is_sharded_qlora: no preparation under FSDP);
        axolotl@067b021c:src/axolotl/loaders/model.py (norms and embeddings back to the compute dtype);
        fms-acceleration@876e2ed6:plugins/accelerated-peft/src/fms_acceleration_peft/framework_plugin_bnb.py:
        _prepare_model_for_kbit_training (flag ``kbit_preparation`` "none").
    """
    if dict(job.flags).get("kbit_preparation") == "none":
        return True
    return job.parallel.fsdp is not None or "axolotl" in job.engine_version.lower()


def unprepared(job: TrainingJob, recipe: Recipe) -> Recipe:
    """Return the recipe without k-bit preparation: some trainers load a quantised base and train it as it is."""
    implementation = _implementation(job, recipe.version, fused_kernels(job), False)
    return replace(recipe, implementation=implementation, norms_fp32=False)


def fused_kernels(job: TrainingJob) -> frozenset[str]:
    """Return which parts run as fused kernels: said by the flag ``fused_kernels``, else those that Liger patches.

    Source: liger-kernel@0.6.3:transformers/monkey_patch.py:apply_liger_kernel_to_llama (rope, rms_norm, swiglu and the
        fused linear cross entropy by default).
    """
    flags = dict(job.flags)
    if "fused_kernels" in flags:
        return frozenset(part.strip() for part in flags["fused_kernels"].split(",") if part.strip())
    return frozenset(("rms_norm", "rope", "swiglu")) if job.loss == "liger" else frozenset()


def _implementation(job: TrainingJob, version: Version, fused: frozenset[str], prepared: bool) -> Implementation:
    architecture = job.model.architecture
    attention = job.attention or ("eager" if architecture in NO_SDPA else "sdpa")
    repeats = attention == "sdpa" and not job.packing
    if attention == "flash":
        repeats = version < REPEATED_BEFORE and architecture in REPEATS_FOR_FLASH
    compute = job.precision.compute
    native: Literal["native", "late_cast"] = "late_cast" if architecture in LATE_CAST else "native"
    written: Literal["native", "clamped"] = "clamped" if architecture in CLAMPED else "native"
    return Implementation(
        attention=attention,
        norm="fused" if "rms_norm" in fused or compiles(job) else native,
        gated_ffn="fused" if "swiglu" in fused or compiles(job) else written,
        rotary="fused" if "rope" in fused or compiles(job) else "native",
        compiled=compiles(job),
        moe="grouped" if version >= GROUPED_EXPERTS else "loop",
        compute_dtype=compute,
        residual_dtype="float32" if prepared or job.precision.params == "float32" else compute,
        autocast=_autocasts(job),
        dropout=float(dict(job.flags).get("dropout", "0")),
        trained=job.method == "full",
        repeat_kv=repeats,
        pads_values=attention == "flash",
        # bitsandbytes@0.43.3:nn/modules.py:Linear4bit.forward: the output is cast to the input's dtype.
        ffn_dtype="float32" if prepared else None,
        router_dtype=compute if _narrow_routing(job) else "float32",
        router_wide=architecture in WIDE_ROUTER and version >= GROUPED_EXPERTS,
        softmax_dtype=compute if architecture in PLAIN_SOFTMAX else "float32",
        recurrent="torch" if dict(job.flags).get("recurrent_kernels") == "torch" else "packages",
    )


def compiles(job: TrainingJob) -> bool:
    """Return whether blocks run as compiled graphs: kernels of a quantised base break them up into pieces.

    Source: bitsandbytes@0.49.0:autograd/_functions.py:MatMul4Bit (an autograd function with attributes of its own).
    """
    return job.compile and job.base_quantization is None


def _autocasts(job: TrainingJob) -> bool:
    """Return whether products run under autocast: fp32 weights or fp32 adapters and a narrower compute dtype.

    Source: transformers@5.23.0:trainer.py:Trainer (bf16 → accelerate's autocast); peft@0.19.1: autocast_adapter_dtype.
    """
    adapted = job.lora is not None and job.engine != "single"
    return adapted or job.precision.params == "float32" != job.precision.compute


def _narrow_routing(job: TrainingJob) -> bool:
    """Return whether experts' outputs are multiplied by weights in the compute dtype.

    Under autocast the product of a router is narrow, and a sigmoid leaves it so; a softmax makes it fp32.
    Source: torch@2.13.0:aten/src/ATen/autocast_mode.h (AT_FORALL_LOWER_PRECISION_FP, AT_FORALL_FP32).
    """
    architecture = job.model.architecture
    if architecture in NARROW_ROUTING:
        return True
    return _autocasts(job) and architecture in WIDE_ROUTER and architecture not in SOFTMAX_ROUTER


def _loss(job: TrainingJob, version: Version) -> LossRecipe:
    return LossRecipe(
        kind=job.loss or "plain",
        upcast="head" if version < UPCAST_IN_LOSS else "loss",
        shift_copies=version < NO_SHIFT_COPY and not compiles(job),
        compiled=compiles(job),
    )
