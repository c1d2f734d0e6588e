"""A small engine whose arithmetic can be done by hand: an elastic pool of a fraction of the device."""

from dataclasses import replace

from ullage.account.parameters import count
from ullage.engines.serving import Amount, EngineStart, KvCost, RankClass
from ullage.ledger import Ledger, exact, ranged, total
from ullage.units import GiB, MiB

BYTES_PER_TOKEN = 64 * 1024
VERSIONS = ("0.1.0", "0.2.0")


def start(job):
    parallel = job.parallel
    ranks = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    job = replace(
        job,
        max_model_len=job.max_model_len or job.model.max_position_embeddings or 4096,
        max_num_seqs=job.max_num_seqs or 256,
        max_num_batched_tokens=job.max_num_batched_tokens or 8192,
        memory_fraction=job.memory_fraction or 0.9,
        kv_cache_dtype=job.kv_cache_dtype or "auto",
        assumed=(*job.assumed, "defaults of the small engine"),
    )
    per_token = BYTES_PER_TOKEN // (2 if "fp8" in job.kv_cache_dtype else 1)
    device = job.device_total_bytes or job.machine.gpu.total_bytes
    width = 1 if (job.quantization or (job.model.quantization and "fp8")) else 2
    weights = exact("weights", count(job.model).total * width // ranks, source="test@1:weights")
    peak = job.max_num_batched_tokens * 128 * 1024
    activation = ranged("activation_peak", peak, low=peak * 9 // 10, high=peak * 12 // 10, source="test@1:a/b.py:peak")
    context = ranged("cuda_context", 500 * MiB, low=400 * MiB, high=700 * MiB, source="test@1:context")
    pool = int(device * job.memory_fraction) - weights.bytes - activation.bytes - context.bytes
    low = pool - (activation.high_bytes - activation.bytes) - (context.high_bytes - context.bytes)
    high = pool + (activation.bytes - activation.low_bytes) + (context.bytes - context.low_bytes)
    starts = pool > 0
    cache = exact("kv_cache", max(pool, 0), formula="what is left", source="test@1:pool")
    ledger = Ledger(
        rank=0,
        allocated=total("allocated", (weights, activation, cache)),
        reserved_overhead=exact("reserved_overhead", 64 * MiB),
        outside=total("outside", (context,)),
    )
    tokens = max(pool, 0) // per_token
    return EngineStart(
        job=job,
        ranks=(RankClass(pp_rank=0, num_ranks=ranks, ledger=ledger),),
        starts=starts,
        reason="" if starts else "no memory is left for the KV cache",
        figures={},
        log_lines=(f"GPU KV cache size: {tokens:,} tokens",),
        kv=KvCost(
            bytes_per_token=per_token,
            fixed_bytes_per_request=MiB,
            bytes_of_request=lambda length: MiB + per_token * -(-length // 16) * 16,
        ),
        kv_cache_bytes=Amount(value=max(pool, 0), low=max(low, 0), high=max(high, 0)),
        kv_cache_tokens=Amount(value=tokens, low=max(low, 0) // per_token, high=max(high, 0) // per_token),
        max_concurrency=Amount(value=tokens / job.max_model_len, low=0, high=1e9),
        max_context=Amount(value=tokens, low=0, high=tokens),
        load_peak_bytes=weights.bytes + GiB,
    )
