"""The flags of Megatron-LM that take no memory of their own on the device, or a few bytes.

Where they do in another job (generation, reinforcement learning, a custom model), another flag says so first.

Source: Megatron-LM@d98e8a6 and @adc69db: megatron/training/arguments.py,
    megatron/core/transformer/transformer_config.py.
"""

from __future__ import annotations

_NAMES = """
    activation-func-clamp-value fp4-recipe adam-beta1 adam-beta2 adam-eps adlr-autoresume adlr-autoresume-interval
    allow-ambiguous-pad-tokens allow-missing-vision-projection-checkpoint app-tag-run-name app-tag-run-version
    apply-layernorm-1p apply-query-key-layer-scaling apply-residual-connection-post-layernorm
    apply-wd-to-qk-layernorm async-ckpt-cpu-priority async-ckpt-io-priority async-ckpt-use-cpu-shm async-mode
    async-save async-strategy attention-ratio attention-softmax-in-fp32 auto-detect-ckpt-format
    batch-invariant-backend bert-embedder-type bert-load biencoder-shared-query-context-model binary-mask
    block-data-path budget-list budget-probs budget-type cache-mla-latents calc-ft-timeouts
    calculate-per-token-loss chat-template check-for-large-grads check-for-spiky-loss
    check-weight-hash-across-dp-replicas-interval classes-fraction clip-grad config-logger-dir
    cpu-offloading-retain-pinned-cpu-buffers create-all-gather-group cuda-graph-modules cuda-graph-scope
    cuda-graph-warmup-steps data-args-path data-cache-path data-parallel-random-init data-path
    data-per-class-fraction data-sharding dataloader-defer-npy-index-mmap dataloader-fast-cache-load
    dataloader-inter-document-masking dataloader-save dataloader-seq-length dataloader-type dataset-provider
    ddp-average-in-collective decode-only-cuda-graphs decoupled-lr decoupled-min-lr
    decrease-batch-size-if-needed delay-offload-until-cuda-graph delta-offload-bytes-across-pp-ranks
    disable-align-grad-reduce disable-bf16-reduced-precision-matmul
    disable-ckpt-load-validate-sharding-integrity disable-dsa-indexer-rotate-activation
    disable-dsa-indexer-scoring-relu disable-flight-recorder-dump-on-timeout
    disable-flight-recorder-extra-dump-on-exec disable-flight-recorder-include-only-active
    disable-gloo-process-groups disable-jit-fuser disable-log-loss-scale-to-tensorboard disable-manual-gc-eval
    disable-msc disable-save-tokenizer-assets disable-straggler-on-startup disable-strict-fsdp-dtensor-load
    disable-symmetric-registration disable-tokenizer-sentencepiece-ignore-extra-whitespaces
    disable-tp-comm-bulk-dgrad disable-tp-comm-bulk-wgrad disable-tp-comm-overlap-ag disable-tp-comm-overlap-rs
    disable-tp-comm-split-ag disable-tp-comm-split-rs disable-use-tokenizer-model-from-checkpoint-args
    disable-vision-class-token distrib-optim-fully-reshardable-mem-efficient distributed-backend
    distributed-timeout-minutes distributed-timeout-seconds-after-init dsa-indexer-k-norm-epsilon
    dsa-indexer-k-norm-fp32 dsa-indexer-loss-coeff dsa-indexer-rope-interleaved dsa-indexer-skip-topk-offset
    dsa-indexer-topk-freq dsa-indexer-use-sparse-loss dsa-kernel-backend dump-param-to-param-group-map
    emb-int-list embedding-init-method-std embedding-path empty-unused-memory-level enable-chunked-prefill
    enable-experimental enable-ft-package enable-gpt-oss enable-msc end-weight-decay eod-mask-loss
    eval-global-batch-size eval-interval eval-iters evidence-data-path exit-duration-in-mins exit-interval
    exit-on-missing-checkpoint exit-signal exit-signal-handler exit-signal-handler-for-dataloader
    exit-signal-handler-for-training finetune flash-attention-version flash-decode force-system-message
    fp8-amax-compute-algo fp8-amax-history-len fp8-interval fp8-margin fsdp-db-use-persist-buf-on-alloc-fail
    fsdp-double-buffer fsdp-manual-registration ft-num-warmup-iters full-validation fused-residual-rmsnorm
    gdp-cutedsl-kernel gdp-num-chunk-states-to-recompute gdp-num-householder glu-linear-offset
    gpu-sniff-test-interval gtp-expert-remat-nccl-ub gtp-remat-nccl-ub
    gtp-remat-reduce-scatter-with-fp32-accumulation hard-sample-th head-lr-mult high-priority-a2a-comm-stream
    high-priority-stream-groups ict-load image-tag-type img-h img-w indexer-batch-size indexer-log-interval
    init-method-std init-method-xavier-uniform init-model-with-meta-device initial-loss-scale is-hybrid-model
    iter-per-epoch iterations-to-skip kitchen-attention-backend langrl-env-config language-model-checkpoint
    lazy-mpu-init linear-scaler-end linear-scaler-start lion-beta1 lion-beta2 load load-main-params-from-ckpt
    local-rank logging-level loss-alpha loss-scale loss-scale-window lr mamba-inference-conv-states-dtype
    mamba-inference-ssm-states-dtype mamba-int-list manual-gc manual-gc-eval manual-gc-interval max-num-tiles
    max-seqlen-per-dp-cp-rank max-tokens-to-oom memory-snapshot-path merge-file mhc-init-gating-factor
    mhc-num-residual-streams mhc-recompute-layer-num mhc-sinkhorn-iterations mid-level-dataset-surplus
    min-loss-scale min-lr mla-down-proj-fusion mlp-chunks-for-prefill mlp-int-list mock-data model-temperature
    moe-aux-loss-coeff moe-deepep-num-sms moe-enable-deepep moe-expert-int-list moe-flex-dispatcher-backend
    moe-flex-dispatcher-num-sms moe-hybridep-num-blocks-permute moe-hybridep-num-blocks-unpermute
    moe-hybridep-num-sms moe-hybridep-num-sms-preprocessing moe-hybridep-pad-uneven-dispatch-inputs
    moe-mlp-glu-interleave-size moe-pad-experts-for-cuda-graph-inference moe-paged-stash-buffer-size-factor-cpu
    moe-paged-stash-buffer-size-factor-cuda moe-paged-stash-page-size moe-per-layer-logging moe-permute-fusion
    moe-permute-fusion-into-hybridep moe-router-bias-update-rate moe-router-force-biased
    moe-router-force-load-balancing moe-router-fusion moe-router-group-topk moe-router-load-balancing-type
    moe-router-num-groups moe-router-padding-for-fp8 moe-router-padding-for-quantization moe-router-pre-softmax
    moe-router-quantile-balancing-ema moe-router-score-function moe-router-topk-scaling-factor
    moe-shared-expert-glu-interleave-size moe-shared-expert-overlap moe-token-drop-policy
    moe-upcycling-granularity moe-z-loss-coeff mrope-section mscale mscale-all-dim mtp-loss-scaling-factor
    mtp-standalone multiple-validation-sets nccl-all-reduce-for-prefill nccl-communicator-config-path nccl-ub
    no-align-grad-reduce no-align-param-gather no-async-tensor-model-parallel-allreduce
    no-barrier-with-level-1-timing no-batch-p2p-communication no-bert-binary-head no-bias-dropout-fusion
    no-check-for-nan-in-loss-and-grad no-ckpt-fully-parallel-save no-ckpt-load-validate-sharding-integrity
    no-contiguous-buffers-in-local-ddp no-data-sharding no-delay-grad-reduce no-delay-param-gather
    no-dsa-indexer-rotate-activation no-dsa-indexer-scoring-relu no-flight-recorder-dump-on-timeout
    no-flight-recorder-extra-dump-on-exec no-flight-recorder-include-only-active no-gradient-reduce-div-fusion
    no-inference-disable-ep-consensus no-inference-dynamic-batching-prefix-caching
    no-inference-text-gen-server-logging no-inference-use-synchronous-zmq-collectives no-inference-wandb-logging
    no-initialization no-load-optim no-load-rng no-log-learnig-rate-to-tensorboard
    no-log-loss-scale-to-tensorboard no-manual-gc-eval no-mmap-bin-files no-one-logger
    no-overlap-p2p-communication no-persist-layer-norm no-pin-cpu-grads no-pin-cpu-params
    no-query-key-layer-scaling no-rl-inference-logprobs-is-correction
    no-rl-offload-inference-model-weights-when-idle no-rl-partial-rollouts no-rl-persist-cuda-graphs
    no-rl-skip-bos-token no-rl-training-cuda-graphs no-rl-use-sequence-packing no-rl-verify-model-weights-swap
    no-rope-freq no-rope-fusion no-save-optim no-save-rng no-save-tokenizer-assets
    no-scatter-gather-tensors-in-pipeline no-strict-fsdp-dtensor-load
    no-tokenizer-sentencepiece-ignore-extra-whitespaces no-tp-comm-bulk-dgrad no-tp-comm-bulk-wgrad
    no-tp-comm-overlap-ag no-tp-comm-overlap-rs no-tp-comm-split-ag no-tp-comm-split-rs
    no-use-tokenizer-model-from-checkpoint-args no-weight-decay-cond-type no-yarn-correction-range-round-to-int
    norm-epsilon num-channels num-classes num-dataset-builder-threads num-frames num-layers-at-end-in-bf16
    num-layers-at-start-in-bf16 num-speculative-tokens num-workers nvtx-ranges object-storage-cache-path
    onnx-safe openai-gelu original-max-position-embeddings original-model-sample-prob output-every-n-results
    output-path overlap-cpu-optimizer-d2h-h2d overlap-p2p-communication overlap-p2p-communication-warmup-flush
    overlap-param-gather override-ckpt-iteration override-opt-param-scheduler override-opt_param-scheduler
    packing-buffer-size packing-seq-length patch-dim per-dataset-sequences-path per-split-data-args-path
    persistent-save-interval phase-transition-iterations pipeline-model-parallel-comm-backend pixel-shuffle
    pretrained-checkpoint profile prompt-path qk-clip qk-clip-alpha qk-clip-threshold query-in-block-prob
    rampup-batch-size recompute-pp-rank recompute-vision record-memory-history record-shapes refit-method
    relative-attention-max-distance relative-attention-num-buckets replication replication-factor
    replication-jump reset-attention-mask reset-position-ids result-rejected-tracker-filename
    retriever-report-topk-accuracies retriever-score-scaling return-log-probs reuse-grad-buf-for-mxfp8-param-ag
    rotary-base rotary-interleaved rotary-percent rotary-scaling-factor rotary-seq-len-interpolation-factor
    router-beta router-gbs router-inter-dim router-std run-workload-inspector-server sample-rate save seed sft
    sft-tokenizer-prompt-format sgd-momentum sharp-enabled-group short-seq-prob slice soft-mask special-tokens
    split start-eval-at-iter start-step start-weight-decay step-batch-size-schedule stop-words
    suggested-communication-unit-size tau-decay tau-init te-rng-tracker temperature termination-id
    test-data-path test-mode tiktoken-num-special-tokens tiktoken-pattern timing-log-level timing-log-option
    titles-data-path top-k top-n-logprobs top-p total-seq-length tp-comm-bootstrap-backend tp-comm-overlap-cfg
    tp-comm-overlap-rs-dgrad train-data-path train-iters train-samples train-sync-interval trust-remote-code
    use-area-weighted-aspect-ratio use-checkpoint-args use-checkpoint-opt-param-scheduler
    use-checkpoint-opt_param-scheduler use-coordinator use-cpu-initialization use-dist-ckpt use-flash-attn
    use-flashinfer-fused-rope use-gigatoken use-gloo-process-groups use-legacy-models use-legacy-static-engine
    use-loss-scaling use-mcore-models use-mp-args-from-checkpoint-args use-mup use-nccl-ub use-one-sent-docs
    use-packed-sequence use-persistent-ckpt-worker use-pytorch-profiler use-ring-exchange-p2p use-rope-scaling
    use-same-sampling-seed-across-dp-ranks use-sharp use-te use-thumbnail use-tile-tags use-tiling
    use-torch-optimizer-for-cpu-offload valid-data-path validation-set-names verbose verify-integrity
    vision-backbone-type vision-pretraining-type vocab-extra-ids weight-decay weight-decay-incr-style
    window-attn-skip-freq window-size
"""
_PREFIXES = """
    log- wandb- tensorboard- lr- muon- dist-ckpt- ckpt- save- profile- inprocess- rerun- error-injection-
    one-logger- straggler- non-persistent- fim- hysteresis inference- rl- grpo- otel- fault-injector-
    logits- dino- rope- yarn- tokenizer- flight-recorder- moe-routing-trace- mup- null-tokenizer-
    pytorch-profiler- swin- mask- export-
"""
HARMLESS = frozenset(_NAMES.split())
HARMLESS_PREFIXES = tuple(_PREFIXES.split())
