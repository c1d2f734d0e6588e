"""A training fit as JSON: the keys of ``ullage schema fit``."""

from __future__ import annotations

from typing import Any

from ullage.engines.training import TrainingRank
from ullage.ledger import Ledger
from ullage.report.json import SCHEMA_VERSION, term_json
from ullage.spec.codec import encode
from ullage.training_fit import TrainingFit


def training_json(result: TrainingFit) -> dict[str, Any]:
    """Return a training fit as plain values; sizes are integers in bytes."""
    job, ledger, counts = result.job, result.ledger, result.counts
    used = ledger.device_used
    gpu = job.machine.gpu
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": result.verdict,
        "exit_code": result.exit_code,
        "reason": result.reason,
        "model": {
            "name": job.model.name,
            "architecture": job.model.architecture,
            "num_parameters": counts.total,
            "num_active_parameters": counts.active,
            "num_mtp_parameters": counts.mtp,
            "num_layers": len(job.model.layers),
            "source": job.model.source,
        },
        "job": job_summary(result),
        "device": {
            "gpu": gpu.name,
            "num_gpus": job.machine.num_gpus,
            "num_nodes": job.machine.num_nodes,
            "total_bytes": int(result.total_bytes.value),
            "reserve_bytes": result.reserve_bytes,
            "source": gpu.source,
        },
        "worst": {
            "rank": result.worst.rank,
            "moment": ledger.moment,
            "allocated_peak_bytes": ledger.allocated.bytes,
            "reserved_peak_bytes": ledger.reserved.bytes,
            "device_used_bytes": used.bytes,
            "low_bytes": used.low_bytes,
            "high_bytes": used.high_bytes,
        },
        "terms": [term_json(term) for term in ledger.terms()],
        "moments": [moment_json(moment) for moment in result.worst.moments],
        "ranks": [rank_json(rank) for rank in result.step.ranks],
        "metrics": metrics(result),
        "advice": [
            {
                "change": item.change,
                "gain_bytes": item.gain_bytes,
                "cost": item.cost,
                "flags": item.flags,
                "typed": item.typed,
                "slower": item.slower,
                "verdict": item.verdict,
            }
            for item in result.advice
        ],
        "largest": vars(result.largest) if result.largest else None,
        "routing": encode(result.routing),
        "next_command": result.next_command,
        "warnings": list(dict.fromkeys((*result.step.warnings, *ledger.warnings))),
    }


def job_summary(result: TrainingFit) -> dict[str, Any]:
    """Return the job as understood: what was set or filled in, and what was assumed."""
    job = result.job
    left_out = {"model", "machine", "assumed", "flags"}
    found = {name: encode(value) for name, value in vars(job).items() if name not in left_out and value not in ((), "")}
    machine = {"gpu": job.machine.gpu.name, "num_gpus": job.machine.num_gpus, "engine_version": job.engine_version}
    return {"kind": "train", "model": job.model.name, **machine, **found, "assumed": [*job.model.assumed, *job.assumed]}


def moment_json(ledger: Ledger) -> dict[str, Any]:
    """Return one moment of the step in sizes."""
    return {
        "moment": ledger.moment,
        "allocated_bytes": ledger.allocated.bytes,
        "reserved_bytes": ledger.reserved.bytes,
        "device_used_bytes": ledger.device_used.bytes,
    }


def rank_json(rank: TrainingRank) -> dict[str, Any]:
    """Return a class of equal ranks: each size at its own worst moment."""
    return {
        "rank": rank.rank,
        "pp_rank": rank.pp_rank,
        "num_ranks": rank.num_ranks,
        "moment": rank.peak.moment,
        "allocated_peak_bytes": max(ledger.allocated.bytes for ledger in rank.moments),
        "reserved_peak_bytes": max(ledger.reserved.bytes for ledger in rank.moments),
        "device_used_bytes": rank.peak.device_used.bytes,
        "allocated_after_step_bytes": rank.after_step.allocated.bytes,
        "host_bytes": rank.host_bytes,
    }


def metrics(result: TrainingFit) -> dict[str, float | None]:
    """Return the ratios of a micro-batch and of the optimizer step, and the peak's fragmentation (docs/metrics.md)."""
    from ullage.account.density import count_backward, count_pass, count_step
    from ullage.account.optimizer import rule_of

    job, ledger = result.job, result.ledger
    gpu, precision, tokens = job.machine.gpu, job.precision, job.micro_batch_size * job.seq_len
    counted = count_pass(
        job.model,
        num_tokens=tokens,
        context=job.seq_len,
        kv_dtype=precision.compute,
        num_sequences=job.micro_batch_size,
    )
    back = count_backward(
        job.model,
        counted,
        num_tokens=tokens,
        context=job.seq_len,
        grad_dtype=precision.grads,
        trained=job.lora is None,
        recomputed=job.recompute.kind == "full",
    )
    moments = rule_of(job.optimizer).num_moments
    step = count_step(
        1,
        params=precision.params,
        grads=precision.grads,
        master=precision.master,
        moments=precision.moments,
        num_moments=moments,
    )
    flops, reserved = dict(gpu.flops).get("bfloat16"), ledger.reserved.bytes
    ridge = flops / gpu.bandwidth_bytes_per_s if flops and gpu.bandwidth_bytes_per_s else None
    return {
        "parameter_utilisation": round(counted.parameter_utilisation, 6),
        "compute_density": round(counted.compute_density, 3),
        "compute_density_backward": round(back.compute_density, 3),
        "compute_density_optimizer": round(step.compute_density, 3) if moments == 2 else None,
        "compute_density_ridge": round(ridge, 3) if ridge else None,
        "fragmentation_rate": round(ledger.reserved_overhead.bytes / reserved, 6) if reserved else None,
    }
