"""A fit as JSON: the keys of ``ullage schema fit``."""

from __future__ import annotations

from typing import Any

from ullage.fitting import FitResult, as_int, job_summary
from ullage.ledger import Ledger, Term

SCHEMA_VERSION = 1


def fit_json(result: FitResult) -> dict[str, Any]:
    """Return a fit as plain values; sizes are integers in bytes."""
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": result.verdict,
        "exit_code": result.exit_code,
        "reason": result.reason,
        "model": _model(result),
        "job": job_summary(result),
        "device": _device(result),
        "worst": _worst(result),
        "terms": [term_json(term) for term in result.ledger.terms()],
        "ranks": [
            {"rank": ranks.ledger.rank, "pp_rank": ranks.pp_rank, "num_ranks": ranks.num_ranks, **_sizes(ranks.ledger)}
            for ranks in result.engine.ranks
        ],
        "serving": _serving(result),
        "engine": {
            "starts": result.engine.starts,
            "reason": result.engine.reason,
            "log_lines": list(result.engine.log_lines),
            "load_peak_bytes": result.engine.load_peak_bytes,
            "host_load_peak_bytes": result.engine.host_load_peak_bytes,
        },
        "metrics": metrics(result),
        "advice": [
            {
                "change": item.change,
                "gain_bytes": item.gain_bytes,
                "cost": item.cost,
                "flags": item.flags,
                "typed": item.typed,
                "verdict": item.verdict,
                "max_concurrency": item.max_concurrency,
                "max_context": item.max_context,
            }
            for item in result.advice
        ],
        "next_command": result.next_command,
        "warnings": list(result.warnings),
    }


def term_json(term: Term) -> dict[str, Any]:
    """Return a term with its children."""
    return {
        "name": term.name,
        "bytes": term.bytes,
        "low_bytes": term.low_bytes,
        "high_bytes": term.high_bytes,
        "certainty": term.certainty.value,
        "formula": term.formula,
        "source": term.source,
        "children": [term_json(child) for child in term.children],
    }


def _model(result: FitResult) -> dict[str, Any]:
    model, counts = result.job.model, result.counts
    return {
        "name": model.name,
        "architecture": model.architecture,
        "num_parameters": counts.total,
        "num_active_parameters": counts.active,
        "num_mtp_parameters": counts.mtp,
        "num_layers": len(model.layers),
        "max_position_embeddings": model.max_position_embeddings,
        "source": model.source,
    }


def _device(result: FitResult) -> dict[str, Any]:
    gpu = result.job.machine.gpu
    return {
        "gpu": gpu.name,
        "num_gpus": result.job.machine.num_gpus,
        "num_nodes": result.job.machine.num_nodes,
        "total_bytes": int(result.total_bytes.value),
        "total_low_bytes": int(result.total_bytes.low),
        "total_high_bytes": int(result.total_bytes.high),
        "reserve_bytes": result.reserve_bytes,
        "source": gpu.source,
    }


def _sizes(ledger: Ledger) -> dict[str, int]:
    return {
        "allocated_peak_bytes": ledger.allocated.bytes,
        "reserved_peak_bytes": ledger.reserved.bytes,
        "device_used_bytes": ledger.device_used.bytes,
        "allocated_after_step_bytes": ledger.allocated.bytes,
    }


def _worst(result: FitResult) -> dict[str, Any]:
    ledger = result.ledger
    used = ledger.device_used
    sizes = _sizes(ledger)
    del sizes["allocated_after_step_bytes"]
    return {
        "rank": ledger.rank,
        "moment": ledger.moment,
        **sizes,
        "low_bytes": used.low_bytes,
        "high_bytes": used.high_bytes,
        "needed_bytes": int(result.need.value),
        "needed_high_bytes": int(result.need.high),
    }


def _serving(result: FitResult) -> dict[str, Any]:
    engine = result.engine
    weights = result.ledger.find("weights")
    return {
        "weights_bytes": weights.bytes if weights else 0,
        "kv_cache_bytes": int(engine.kv_cache_bytes.value),
        "kv_cache_low_bytes": int(engine.kv_cache_bytes.low),
        "kv_cache_high_bytes": int(engine.kv_cache_bytes.high),
        "kv_bytes_per_token": engine.kv.bytes_per_token,
        "kv_fixed_bytes_per_request": engine.kv.fixed_bytes_per_request,
        "kv_cache_tokens": as_int(engine.kv_cache_tokens.value),
        "max_concurrency": as_int(result.max_concurrency.value),
        "max_concurrency_low": as_int(result.max_concurrency.low),
        "max_concurrency_high": as_int(result.max_concurrency.high),
        "max_context": result.max_context,
        "curve": [{"context": point.context, "concurrency": point.concurrency} for point in result.curve],
    }


def metrics(result: FitResult) -> dict[str, float | None]:
    """Return the ratios of decoding and prefill, the GPU's ridge, and the fragmentation (docs/metrics.md)."""
    from ullage.account.density import count_pass

    job, gpu = result.job, result.job.machine.gpu
    kv_dtype = job.kv_cache_dtype or job.model.dtype
    kv_dtype = job.model.dtype if kv_dtype == "auto" else kv_dtype
    prompt = min(result.context, job.max_num_batched_tokens or result.context)
    decode, prefill = (
        count_pass(job.model, num_tokens=tokens, context=result.context, kv_dtype=kv_dtype, num_sequences=sequences)
        for tokens, sequences in ((result.concurrency, result.concurrency), (prompt, 1))
    )
    flops, reserved = dict(gpu.flops).get("bfloat16"), result.ledger.reserved.bytes
    ridge = flops / gpu.bandwidth_bytes_per_s if flops and gpu.bandwidth_bytes_per_s else None
    return {
        "parameter_utilisation": round(decode.parameter_utilisation, 6),
        "parameter_utilisation_prefill": round(prefill.parameter_utilisation, 6),
        "compute_density": round(decode.compute_density, 3),
        "compute_density_prefill": round(prefill.compute_density, 3),
        "compute_density_ridge": round(ridge, 3) if ridge else None,
        "fragmentation_rate": round(result.ledger.reserved_overhead.bytes / reserved, 6) if reserved else None,
    }
