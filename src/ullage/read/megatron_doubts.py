"""Flags of Megatron-LM that can change the memory and are not followed, and those that make it another job.

The first are named in ``job.assumed``; with the second no ledger would be an answer, and they are refused.

Source: Megatron-LM@d98e8a6: megatron/training/arguments.py, megatron/core/transformer/transformer_config.py,
examples/inference/gpt/gpt_dynamic_inference.py, pretrain_vlm.py.
"""

from __future__ import annotations

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.megatron_flags import READ
from ullage.read.megatron_harmless import HARMLESS, HARMLESS_PREFIXES
from ullage.read.megatron_words import Arguments

#: Flag -> values that change nothing (beside none at all).
DOUBTS: dict[str, tuple[str, ...]] = {
    # precision of parts
    "disable-fp8-wgrad": (),
    "first-last-layers-bf16": (),
    "fp16-lm-cross-entropy": (),
    "fp4-format": (),
    "fp4-param-gather": (),
    "fp4-quantizer-factory": (),
    "fp8-output-proj": (),
    "fp8-quantizer-factory": (),
    "keep-fp8-transpose-cache": (),
    "mamba-training-ssm-states-dtype": ("bf16",),
    "no-fp8-wgrad": (),
    "output-logit-dtype": ("bf16",),
    "te-precision-config-file": (),
    # kernels and modules
    "batch-invariant-mode": (),
    "disable-mamba-mem-eff-path": (),
    "mlp-chunks-for-training": ("1",),
    "softmax-type": ("vanilla",),
    "symmetric-ar-type": (),
    "use-grouped-gemm-for-dense-mlp": (),
    "use-grouped-gemm-for-shared-expert": (),
    "use-kitchen": (),
    "use-kitchen-attention": (),
    "use-te-activation-func": (),
    "use-transformer-engine-op-fuser": (),
    # what is kept, and for how long
    "activation-offload-fraction": ("1", "1.0"),
    "cpu-offloading-num-layers": ("0",),
    "delay-wgrad-compute": (),
    "ep-overlap-early-attn-memory-release": (),
    "fine-grained-offloading-max-inflight-offloads": (),
    "min-offloaded-tensor-size": ("1048576",),
    "overlap-dispatch-backward-with-experts-wgrad": (),
    # context parallelism
    "cp-comm-type": ("p2p",),
    "hierarchical-context-parallel-sizes": (),
    "hybrid-context-parallel": (),
    # experts
    "moe-apply-probs-on-input": (),
    "moe-combine-bwd-dtype": ("bf16",),
    "moe-dispatch-fwd-dtype": ("bf16",),
    "moe-enable-routing-replay": (),
    "moe-expert-rank-capacity-factor": (),
    "moe-input-jitter-eps": (),
    "moe-ncclep-zero-copy": (),
    "moe-paged-stash": (),
    "moe-single-grouped-bias": (),
    "moe-single-grouped-weight": (),
    "moe-use-grouped-tensor": (),
    "moe-use-legacy-grouped-gemm": (),
    "moe-use-upcycling": (),
    # multi-token prediction, elastic models, distillation from stored logits
    "enable-router": (),
    "flextron": (),
    "logits-load-dir": (),
    "logits-save-top-k": (),
    "mtp-detach-heads": (),
    "mtp-hsm": (),
    # buffers, sharding, the optimizer
    "ddp-num-buckets": (),
    "ddp-param-name-patterns-for-fp32-local-accumulation": (),
    "ddp-reduce-scatter-with-fp32-accumulation": (),
    "disable-clone-scatter-output-in-embedding": (),
    "enable-full-sharding-in-hsdp": (),
    "fake-process-group": (),
    "gtp-remat-opt-in-modules": (),
    "megatron-fsdp-enable-fine-grained-param-gather": (),
    "megatron-fsdp-grad-comm-dtype": ("auto",),
    "megatron-fsdp-max-pool-double-buffer": (),
    "megatron-fsdp-version": ("1",),
    "muon-scalar-optimizer": ("adam", "adamw"),
    "no-clone-scatter-output-in-embedding": (),
    "no-use-layer-wise-param-layout": (),
    "optimizer-cuda-graph": (),
    "outer-dp-sharding-strategy": ("no_shard",),
    "overlap-param-gather-with-optimizer-step": (),
    "torch-fsdp2-no-reshard-after-forward": (),
    # parts of other models, and what of them is trained
    "biencoder-projection-dim": ("0",),
    "eval-micro-batch-size": (),
    "freeze-LM": (),
    "freeze-ViT": (),
    "ict-head-size": (),
    "lora-rank": (),
    "output-bert-embeddings": (),
}

#: Flag -> what kind of job it asks for. Of ``prompts`` and its kin only the inference scripts know.
REFUSED = {
    "batch-size": "old",
    "checkpoint-activations": "old",
    "enable-mhc-connections": "streams",
    "expert-tensor-parallel-num-weight-shards": "shards",
    "export-kd-teacher-load": "teacher",
    "freeze-all-layers": "untrained",
    "hybrid-attention-ratio": "old",
    "hybrid-mlp-ratio": "old",
    "heterogeneous-layers-config-encoded-json": "layers",
    "heterogeneous-layers-config-path": "layers",
    "incoming-requests-per-sec": "generation",
    "incoming-requests-per-step": "generation",
    "model-parallel-size": "old",
    "num-tokens-to-generate": "generation",
    "prompt-file": "generation",
    "prompts": "generation",
    "skip-train": "untrained",
    "tensor-parallel-num-weight-shards": "shards",
    "vision-pretraining": "vision",
    "warmup": "old",
    "yaml-cfg": "elsewhere",
}
_INSTEAD = {
    "batch-size": "--micro-batch-size",
    "checkpoint-activations": "--recompute-activations",
    "hybrid-attention-ratio": "--hybrid-layer-pattern",
    "hybrid-mlp-ratio": "--hybrid-layer-pattern",
    "model-parallel-size": "--tensor-model-parallel-size",
    "warmup": "--lr-warmup-fraction",
}
#: Flags that only a model with a vision encoder has.
_VISION = ("vision-model-type", "language-model-type", "img-h", "patch-dim")


def refuse_other_jobs(args: Arguments) -> None:
    """Refuse flags that ask for something that is not counted here.

    Raises:
        InputError: naming the flag and what it asks for.
    """
    kinds = {
        "elsewhere": _("flags in another file, which is not read"),
        "generation": _("text generation, which trains nothing"),
        "layers": _("layers that differ in size, which are not followed"),
        "old": _("something that newer versions of Megatron-LM call otherwise"),
        "shards": _("weights in more shards than tensor-parallel ranks, which is not followed"),
        "streams": _("several residual streams, which are not followed"),
        "teacher": _("a teacher beside the model, which the flags do not describe"),
        "untrained": _("a job that trains nothing"),
        "vision": _("a vision model, which is not followed"),
    }
    for name, kind in REFUSED.items():
        if args.stated(name) and not _as_many_shards_as_ranks(name, args):
            instead = _INSTEAD.get(name)
            raise InputError(
                _("--{name} asks for {what}").format(name=name, what=kinds[kind]),
                remedy=_("write {flag}").format(flag=instead) if instead else _("leave it out to see the rest"),
            )


def _as_many_shards_as_ranks(name: str, args: Arguments) -> bool:
    """Weights in as many shards as tensor-parallel ranks are the usual case."""
    if not name.endswith("-num-weight-shards"):
        return False
    return args.get(name) == args.get(name.removesuffix("-num-weight-shards") + "-size", "1") or (
        name.startswith("tensor") and args.get(name) == args.get("tensor-model-parallel-size", "1")
    )


def doubts(args: Arguments) -> tuple[str, ...]:
    """Say which flags can change the memory and are not followed."""
    found = [_written(name, args) for name in sorted(args) if _in_doubt(name, args)]
    said = []
    if found:
        said.append(_("flags that can change the memory and are not followed: {flags}").format(flags=", ".join(found)))
    if any(args.stated(name) for name in _VISION) or "vlm" in args.get("model-provider"):
        said.append(_("a vision encoder beside the text model is not counted"))
    if args.get("moe-token-dispatcher-type") == "flex":
        backend = args.get("moe-flex-dispatcher-backend") or "deepep"
        said.append(
            _("what the dispatcher {backend} holds outside PyTorch is not counted").format(backend=backend[:40])
        )
    if args.on("perform-rl-step"):
        said.append(
            _("reinforcement learning: what generation holds (KV cache, graphs, a second model) is not counted")
        )
    return tuple(said)


def unknown(args: Arguments) -> tuple[str, ...]:
    """Return the flags that neither version of Megatron-LM has: nothing is known of them."""
    known = READ | HARMLESS | DOUBTS.keys() | REFUSED.keys()
    return tuple(name for name in sorted(args) if name not in known and not name.startswith(HARMLESS_PREFIXES))


def _in_doubt(name: str, args: Arguments) -> bool:
    if name == "first-last-layers-bf16" and not (args.stated("fp8-format") or args.stated("fp8")):
        return False
    return name in DOUBTS and args.stated(name) and args.get(name) not in DOUBTS[name]


def _written(name: str, args: Arguments) -> str:
    """Return a flag as it was written, shortened."""
    value = args.get(name)
    return name if value == "true" else f"{name} {value[:40]}"
