"""The flags of Megatron-LM's ``pretrain_*.py``, by what they mean for memory.

Source: Megatron-LM@d98e8a6 and @adc69db: megatron/training/arguments.py.
"""

from __future__ import annotations

#: Read by the model reader or the engine room.
READ = frozenset(
    ["account-for-embedding-in-pipeline-split", "account-for-loss-in-pipeline-split", "accumulate-allreduce-grads-in-fp32", "add-qkv-bias", "attention-backend", "attention-dropout", "attention-softmax-in-fp32", "bert-no-binary-head", "bf16", "context-parallel-size", "cp-comm-type", "cross-entropy-fusion-impl", "cross-entropy-loss-fusion", "cuda-graph-impl", "data-parallel-sharding-strategy", "ddp-bucket-size", "ddp-num-buckets", "ddp-pad-buckets-for-high-nccl-busbw", "decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers", "decoder-num-layers", "decoder-seq-length", "defer-embedding-wgrad-compute", "deterministic-mode", "disable-bias-linear", "encoder-num-layers", "encoder-seq-length", "exp-avg-dtype", "exp-avg-sq-dtype", "expert-model-parallel-size", "expert-tensor-parallel-size", "ffn-hidden-size", "fine-grained-activation-offloading", "first-last-layers-bf16", "flextron", "fp16", "fp32-residual-connection", "fp8", "fp8-format", "fp8-param-gather", "fp8-recipe", "global-batch-size", "grad-reduce-in-bf16", "group-query-attention", "hidden-dropout", "hidden-size", "hybrid-layer-pattern", "hybrid-override-pattern", "is-hybrid-model", "kv-channels", "kv-lora-rank", "main-grads-dtype", "main-params-dtype", "make-vocab-size-divisible-by", "mamba-head-dim", "mamba-num-groups", "mamba-num-heads", "mamba-state-dim", "max-position-embeddings", "micro-batch-size", "microbatch-group-size-per-virtual-pipeline-stage", "moe-enable-deepep", "moe-expert-capacity-factor", "moe-ffn-hidden-size", "moe-grouped-gemm", "moe-layer-freq", "moe-layer-recompute", "moe-pad-expert-input-to-capacity", "moe-permute-fusion", "moe-router-dtype", "moe-router-enable-expert-bias", "moe-router-fusion", "moe-router-topk", "moe-shared-expert-intermediate-size", "moe-token-dispatcher-type", "mtp-num-layers", "mtp-use-repeated-layer", "multi-latent-attention", "no-bias-dropout-fusion", "no-bias-gelu-fusion", "no-bias-swiglu-fusion", "no-create-attention-mask-in-dataloader", "no-gradient-accumulation-fusion", "no-load-optim", "no-masked-softmax-fusion", "no-position-embedding", "no-rope-fusion", "normalization", "num-attention-heads", "num-distributed-optimizer-instances", "num-experts", "num-layers", "num-layers-per-virtual-pipeline-stage", "num-query-groups", "num-virtual-stages-per-pipeline-rank", "offload-modules", "optimizer", "optimizer-cpu-offload", "optimizer-offload-fraction", "overlap-grad-reduce", "overlap-moe-expert-parallel-comm", "overlap-param-gather", "overlap-p2p-communication-warmup-flush", "padded-vocab-size", "pipeline-model-parallel-layout", "pipeline-model-parallel-size", "position-embedding-type", "q-lora-rank", "qk-head-dim", "qk-layernorm", "qk-pos-emb-head-dim", "quick-geglu", "recompute-activations", "recompute-granularity", "recompute-method", "recompute-modules", "recompute-num-layers", "reuse-grad-buf-for-mxfp8-param-ag", "rotary-percent", "seq-length", "sequence-parallel", "spec", "squared-relu", "swiglu", "tensor-model-parallel-size", "tokenizer-type", "tp-comm-overlap", "transformer-impl", "untie-embeddings-and-output-weights", "use-distributed-optimizer", "use-flash-attn", "use-fused-weighted-squared-relu", "use-megatron-fsdp", "use-precision-aware-optimizer", "use-rotary-position-embeddings", "use-te-activation-func", "use-torch-fsdp2", "use-tp-pp-dp-mapping", "use-transformer-engine-op-fuser", "v-head-dim", "vocab-extra-ids", "vocab-file", "vocab-size", "wgrad-deferral-limit"]
)

#: Known, and no memory of their own on the device (or a few bytes).
HARMLESS = frozenset(
    ["adam-beta1", "adam-beta2", "adam-eps", "apply-layernorm-1p", "apply-query-key-layer-scaling", "async-save", "attention-ratio", "calculate-per-token-loss", "clip-grad", "config-logger-dir", "cuda-graph-warmup-steps", "data-args-path", "data-cache-path", "data-path", "dataloader-type", "ddp-average-in-collective", "decoupled-lr", "decoupled-min-lr", "disable-gloo-process-groups", "dist-ckpt-strictness", "distributed-backend", "distributed-timeout-minutes", "embedding-init-method-std", "end-weight-decay", "eod-mask-loss", "eval-interval", "eval-iters", "exit-duration-in-mins", "exit-interval", "exit-signal-handler", "export-default-te-spec", "export-model-type", "finetune", "high-priority-stream-groups", "init-method-std", "init-method-xavier-uniform", "initial-loss-scale", "lazy-mpu-init", "load", "local-rank", "loss-scale", "loss-scale-window", "lr", "manual-gc", "manual-gc-eval", "manual-gc-interval", "mask-prob", "merge-file", "min-loss-scale", "min-lr", "mock-data", "moe-aux-loss-coeff", "moe-deepep-num-sms", "moe-router-bias-update-rate", "moe-router-force-load-balancing", "moe-router-group-topk", "moe-router-load-balancing-type", "moe-router-num-groups", "moe-router-padding-for-fp8", "moe-router-pre-softmax", "moe-router-score-function", "moe-router-topk-scaling-factor", "moe-shared-expert-overlap", "moe-per-layer-logging", "moe-token-drop-policy", "moe-use-legacy-grouped-gemm", "moe-z-loss-coeff", "mscale", "mscale-all-dim", "mtp-loss-scaling-factor", "nccl-communicator-config-path", "norm-epsilon", "num-workers", "override-opt_param-scheduler", "profile", "rampup-batch-size", "recompute-pp-rank", "rotary-base", "rotary-interleaved", "rotary-scaling-factor", "rotary-seq-len-interpolation-factor", "save", "seed", "sgd-momentum", "short-seq-prob", "skip-train", "split", "start-weight-decay", "suggested-communication-unit-size", "te-rng-tracker", "tensorboard-dir", "test-data-path", "test-mode", "tiktoken-num-special-tokens", "tiktoken-pattern", "timing-log-level", "timing-log-option", "tokenizer-model", "tp-comm-overlap-cfg", "train-data-path", "train-iters", "train-samples", "train-sync-interval", "use-checkpoint-args", "use-checkpoint-opt_param-scheduler", "use-cpu-initialization", "use-dist-ckpt", "use-mcore-models", "use-persistent-ckpt-worker", "use-pytorch-profiler", "use-rope-scaling", "valid-data-path", "wandb-exp-name", "wandb-project", "wandb-save-dir", "weight-decay", "weight-decay-incr-style", "overlap-p2p-communication", "window-attn-skip-freq", "original-max-position-embeddings", "enable-experimental", "trust-remote-code", "exit-on-missing-checkpoint", "original-model-sample-prob", "ckpt-format", "ckpt-fully-parallel-load", "ckpt-fully-parallel-save", "auto-detect-ckpt-format", "dist-ckpt-format", "ckpt-assume-constant-structure", "nccl-ub", "use-nccl-ub", "use-sharp", "num-dataset-builder-threads", "data-parallel-random-init"]
)
HARMLESS_PREFIXES = (
    "log-",
    "no-",
    "wandb-",
    "tensorboard-",
    "lr-",
    "muon-",
    "dist-ckpt-",
    "ckpt-",
    "save-",
    "profile-",
    "inprocess-",
    "rerun-",
    "error-injection-",
    "one-logger-",
    "straggler-",
    "non-persistent-",
    "fim-",
    "hysteresis",
)

#: Flags that take one value always; any other may stand alone.
NEEDS_VALUE = frozenset(
    name
    for name in READ
    if name.endswith(("-size", "-layers", "-heads", "-dim", "-rank", "-length", "-topk", "-dtype", "-freq", "-dropout"))
)


def unknown(names: list[str]) -> list[str]:
    """Return the flags that are neither read nor known to be without memory."""
    return [
        name for name in names if name not in READ and name not in HARMLESS and not name.startswith(HARMLESS_PREFIXES)
    ]
