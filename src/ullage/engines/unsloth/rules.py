"""What a release of Unsloth does, by its date, and what it refuses or is not followed in.

unsloth and unsloth_zoo are released together; ``unsloth@2025.8`` stands for both as of that month.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal

from ullage.account.adapters.rule import AdapterPrecision
from ullage.engines.hf_trainer import adapted
from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec.model import Attention, DenseFFN, Model
from ullage.spec.training import Recompute, TrainingJob

Version = tuple[int, int]
NEWEST: Version = (2026, 8)
#: Adapters with dropout and biases run beside the fused ones. Source: unsloth@45fa4bf3 (2024-01):models/llama.py.
OLDEST: Version = (2024, 1)
#: Importing Unsloth sets the allocator, where the program has not (not on Windows, nor before torch 2.2).
#: Source: unsloth@c599ae0f (2024-03):unsloth/__init__.py; unsloth-zoo@ce232d6c:unsloth_zoo/__init__.py.
EXPANDABLE: Version = (2024, 3)
ALLOC_CONF = "expandable_segments:True"
#: Checkpoints on the host. Source: unsloth@920f0ae6 (2024-04):models/llama.py:LlamaModel_fast_forward.
OFFLOADED: Version = (2024, 4)
#: Trained embeddings and head beside adapters, the frozen ones on the disk; fp32 copies until 2024-10.
#: Source: unsloth@72b19da6:models/llama.py:FastLlamaModel.get_peft_model; @c58dc701.
TRAINS_EMBEDDINGS: Version = (2024, 5)
NARROW_COPIES: Version = (2024, 10)
#: Rotations of at most 32,768 positions. Source: unsloth@54dd81de (2024-07):models/llama.py:LlamaRotaryEmbedding.
GROWING_ROTARY: Version = (2024, 7)
#: Apple's cut cross entropy. Source: unsloth@fa8e59eb (2024-11):models/llama.py:_CausalLM_fast_forward.
CUT_LOSS: Version = (2024, 11)
#: PEFT's adapters that are not fused take their input as it comes.
#: Source: unsloth-zoo@e5aab212 (2024-11):unsloth_zoo/compiler.py:patch_lora_forwards.
UNCAST: Version = (2024, 11)
#: One table of rotations for all layers. Source: unsloth@63782ea3 (2025-01):models/llama.py:FastLlamaModel.
SHARED_ROTARY: Version = (2025, 1)
#: Forward writes 4-bit weights into one buffer. Source: unsloth@144190bd (2025-02):kernels/utils.py:fast_dequantize.
WEIGHT_BUFFER: Version = (2025, 2)
#: Checkpoints pass through buffers; the last stays on the GPU. Source: unsloth@3e5f0611 (2025-03):models/llama.py;
#: unsloth-zoo@5572cc46 (2025-01):gradient_checkpointing.py:UnslothCheckpointFunction.
BUFFERED: Version = (2025, 3)
#: ``use_gradient_checkpointing`` is "unsloth" where nothing is said; plain checkpoints before.
#: Source: unsloth@3824a6ad (2025-07):models/llama.py:FastLlamaModel.from_pretrained.
OFFLOADS_BY_DEFAULT: Version = (2025, 7)
#: The loss in chunks of 1 GB; from 2025-09 on of half the free memory, from 2026-07 on of no more than 4 GiB.
#: Source: unsloth@806bee24 (2025-08):models/llama.py; unsloth-zoo@fc29e051, @770de251, @d9fe1f43:fused_losses/
#: cross_entropy_loss.py:_get_chunk_multiplier, get_chunk_size.
CHUNKED_LOSS: Version = (2025, 8)
CHUNKS_OF_FREE: Version = (2025, 9)
CHUNKS_CAPPED: Version = (2026, 7)
#: Sequences below 512 keep their checkpoints on the GPU. Source: unsloth@8f0b57ae (2026-02):models/_utils.py:
#: apply_unsloth_gradient_checkpointing.
SHORT_STAY: Version = (2026, 2)
SHORT = 512
#: Elements of a checkpoint that is too small to be moved, 2 MiB of 16-bit values.
SMALL = 1024 * 1024
#: A second buffer, where 512 MiB are free. Source: unsloth-zoo@510d987f (2026-05):gradient_checkpointing.py.
TWO_BUFFERS: Version = (2026, 5)
#: Cut cross entropy runs from this many tokens on. Source: unsloth@fa8e59eb:models/llama.py:_CausalLM_fast_forward.
FEW_TOKENS = 1024
#: Models whose layers Unsloth writes itself; the others run as transformers' own code, compiled.
#: Source: unsloth@015bdef0:models/loader.py:FastLanguageModel.from_pretrained (dispatch_model).
ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "GemmaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
#: Settings of :attr:`TrainingJob.flags` that are followed, or that Unsloth settles itself.
FLAGS = ("seq_len_at_most", "use_reentrant", "offload_under_way")

Loss = Literal["in_place", "cut", "chunked"]


class Rules(Frozen):
    """What runs.

    Attributes:
        version: year and month.
        checkpoints: kept on the GPU, copied to the host and back, passing through buffers, or "none".
        loss: which kernel. length_unknown: ``seq_len`` is the longest that may come.
        repeats: keys and values are copied to all heads: xformers under grouped queries, where a gradient is needed.
            Source: unsloth@015bdef0:utils/attention_dispatch.py:run_attention (FlashAttention and SDPA do not).
        place_unknown: another program's version names Unsloth without a release, so that its checkpoints may as well
            be on the host: LLaMA-Factory asks for that since 2024-04.
            Source: llamafactory@96213f04:src/llmtuner/model/adapter.py (use_gradient_checkpointing "unsloth").
    """

    version: Version
    checkpoints: Literal["none", "gpu", "host", "buffered"]
    loss: Loss
    repeats: bool
    length_unknown: bool
    place_unknown: bool

    @property
    def offloads(self) -> bool:
        """Whether checkpoints go to the host."""
        return self.checkpoints in ("host", "buffered")


def release(text: str) -> Version | None:
    """Return (year, month) of ``unsloth 2025.8.5`` in a version string, or of a bare version."""
    pattern = r"(20\d\d)\.(\d{1,2})(?!\d)"
    match = re.search(rf"unsloth\D{{0,3}}{pattern}", text.lower()) or re.match(pattern, text.strip())
    return (int(match.group(1)), int(match.group(2))) if match else None


def resolve(job: TrainingJob) -> tuple[TrainingJob, Rules]:
    """Return the job with its defaults filled in and said, and the rules that follow.

    Raises:
        InputError: what Unsloth does not do, or these rules do not.
    """
    stated, said = release(job.engine_version), []
    version = min(stated or NEWEST, NEWEST)
    if version != stated:
        said.append(_("Unsloth {version}, the newest whose rules are known").format(version="2026.8"))
    check(job, version)
    job = _with_checkpoints(adapted.as_run(job), version, said)
    if not job.alloc_conf and version >= EXPANDABLE:
        job = replace(job, alloc_conf=ALLOC_CONF)
        said.append(_("{setting}, which Unsloth sets (not on Windows)").format(setting=ALLOC_CONF))
    if job.attention is None:
        said.append(_("attention: xformers, which Unsloth installs; FlashAttention where it is installed takes less"))
    checkpoints = _checkpoints(job, version)
    unplaced = checkpoints == "gpu" and bool(job.engine_version) and stated is None
    if unplaced:
        said.append(_("whether checkpoints are on the GPU or on the host is not said: the range has both"))
    rules = Rules(
        version=version,
        place_unknown=unplaced,
        checkpoints=checkpoints,
        loss=_loss(job, version),
        repeats=job.attention is None,
        length_unknown="seq_len_at_most" in dict(job.flags),
    )
    if job.base_quantization is not None:
        said.append(_("all linear layers of the base in 4 bits; Unsloth's dynamic quants keep some wider"))
    alone = replace(job.parallel, zero_stage=0, fsdp=None)  # one GPU shares with none
    return replace(job, parallel=alone, assumed=(*job.assumed, *said)), rules


def check(job: TrainingJob, version: Version) -> None:
    """Refuse what is not followed.

    Raises:
        InputError: a model, a method, a machine or a setting without rules.
    """
    _check_model(job.model)
    _check_method(job, version)
    if job.parallel.data_parallel_size > 1:
        raise InputError(
            _("Unsloth's rules know one GPU"), remedy=_("write --on 1xGPU, or take --engine hf_trainer without Unsloth")
        )
    if version < OLDEST:
        raise InputError(_("Unsloth's releases before {version} are not known").format(version="2024.1"))
    if job.recompute.kind not in ("none", "full") or job.recompute.every != 1:
        raise InputError(_("Unsloth recomputes every layer or none"), remedy=_("write --recompute full or none"))
    if dict(job.offload).get("activations") and job.recompute.given and job.recompute.kind == "none":
        raise InputError(_("Unsloth moves checkpoints to the host, and this job has none"))
    for name, _value in job.flags:
        if name not in FLAGS:
            raise InputError(_("{key} is not followed").format(key=name[:40]), where="flags")


def _check_model(model: Model) -> None:
    plain = all(
        isinstance(part, (Attention, DenseFFN)) for layer in model.layers for part in (*layer.mixers, *layer.ffns)
    )
    if model.architecture not in ARCHITECTURES or not plain:
        raise InputError(
            _("Unsloth runs {architecture} as transformers' code, compiled, and what that keeps is not known").format(
                architecture=model.architecture[:60]
            ),
            remedy=_("known are {known}").format(known=", ".join(ARCHITECTURES)),
        )


def _check_method(job: TrainingJob, version: Version) -> None:
    if job.rlhf is not None:
        raise InputError(_("preference and reinforcement training under Unsloth, with or without vLLM, is not known"))
    if job.lora is None:
        raise InputError(
            _("full fine-tuning under Unsloth runs transformers' layers, compiled, and is not known"),
            remedy=_("train adapters, such as --lora r=16, or take --engine hf_trainer"),
        )
    wrong = [name for name in job.lora.trained_modules if name not in ("embed_tokens", "lm_head")]
    if wrong:
        raise InputError(_("Unsloth trains embed_tokens and lm_head beside adapters, not {name}").format(name=wrong[0]))
    if job.lora.trained_modules and version < TRAINS_EMBEDDINGS:
        raise InputError(_("Unsloth trains embeddings from {version} on").format(version="2024.5"))
    if job.precision.params == "float32" or job.precision.compute == "float32":
        raise InputError(_("Unsloth loads a frozen base in 16 bits"), remedy=_("write --precision bf16"))


def _with_checkpoints(job: TrainingJob, version: Version, said: list[str]) -> TrainingJob:
    """Return the job with its checkpoints as they run: where nothing is said, as Unsloth's release has them.

    Recompute alone is ``use_gradient_checkpointing=True``, with activations on the host it is ``"unsloth"``.
    """
    if job.recompute.given:
        return job
    offload = job.offload
    if version >= OFFLOADS_BY_DEFAULT and "activations" not in dict(offload):
        offload = (*offload, ("activations", "cpu"))
    where = _("on the host") if offload else _("on the GPU")
    said.append(_("use_gradient_checkpointing as Unsloth's default has it: checkpoints {where}").format(where=where))
    return replace(job, recompute=Recompute(kind="full"), offload=offload)


def _checkpoints(job: TrainingJob, version: Version) -> Literal["none", "gpu", "host", "buffered"]:
    """Return where the inputs of layers wait; from 2025-03 on those of no more than 2 MiB stay on the GPU.

    Source: unsloth-zoo@ce232d6c:gradient_checkpointing.py:UnslothCheckpointFunction.forward (MINIMUM_SIZE).
    """
    if job.recompute.kind == "none":
        return "none"
    if "activations" not in dict(job.offload) or (version >= SHORT_STAY and job.seq_len < SHORT):
        return "gpu"
    if version < OFFLOADED:
        raise InputError(_("Unsloth keeps checkpoints on the host from {version} on").format(version="2024.4"))
    if version < BUFFERED:
        return "host"
    return "buffered" if job.micro_batch_size * job.seq_len * job.model.hidden_size > SMALL else "gpu"


def _loss(job: TrainingJob, version: Version) -> Loss:
    """Return the kernel of the loss.

    Source: unsloth@015bdef0:models/llama.py:_CausalLM_fast_forward; at 63782ea3 (2025-01) cut cross entropy, which
        needs compute capability 8.0 and more than 1,024 tokens, else kernels/cross_entropy_loss.py.
    """
    if version >= CHUNKED_LOSS:
        return "chunked"
    few = job.micro_batch_size * job.seq_len <= FEW_TOKENS
    old_gpu = (job.machine.gpu.compute_capability or (8, 0)) < (8, 0)
    return "in_place" if version < CUT_LOSS or few or old_gpu else "cut"


def precision_of(job: TrainingJob, rules: Rules, *, fused: bool) -> AdapterPrecision:
    """Return the number formats around adapters: fp32 factors, cast where they are used.

    Source: unsloth-zoo@ce232d6c:training_utils.py:prepare_model_for_training (float32 for lora_A and lora_B);
        unsloth@015bdef0:kernels/utils.py:matmul_lora; peft@0.21.2:tuners/lora/bnb.py:Linear4bit.forward.
    """
    uncast = job.base_quantization is not None or rules.version >= UNCAST
    compute = job.precision.compute
    return AdapterPrecision(compute_dtype=compute, uncast=compute if uncast else None, fused=fused)
