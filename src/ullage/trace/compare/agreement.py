"""A traced step beside the closed form of the Trainer's rules: the same model, the same job, moment by moment."""

from __future__ import annotations

from typing import Any

from ullage.engines.hf_trainer.defaults import resolve
from ullage.engines.hf_trainer.layers import forward_pass
from ullage.engines.training import TrainingStep, step
from ullage.frozen import Frozen
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.records.overrides import with_overrides
from ullage.spec.model import Model
from ullage.spec.training import Lora, Precision, Recompute, TrainingJob
from ullage.trace.job import LoraOptions, TraceJob
from ullage.trace.models.hf import build_described
from ullage.trace.models.prepare import prepare
from ullage.trace.recorder.events import ACTIVATION, BACKWARD, BLOCK_BYTES, FORWARD, RECOMPUTE, TEMPORARY, Trace
from ullage.trace.stand_ins.losses import use_loss
from ullage.trace.step.model import trace_model
from ullage.units import round_up

#: Moments of a step that has optimizer states, as the closed form names them.
MOMENTS = ("loss", "backward", "embedding backward", "optimizer step")


class Case(Frozen):
    """A job that is traced and worked out.

    ``overrides``: of the catalog's model, the depth first of all; ``loss``: plain, or liger (a stand-in); ``base``: how
    the frozen base is held (nf4, gptq); ``prepared``: as TRL prepares it; ``eager``: attention written out, as it is
    for sinks in any case.
    """

    model: str
    overrides: tuple[tuple[str, int], ...]
    recompute: str = "none"
    lora: tuple[str, ...] = ()
    loss: str = "plain"
    micro_batch: int = 4
    seq_len: int = 1024
    base: str | None = None
    prepared: bool = True
    eager: bool = False


class Agreement(Frozen):
    """Bytes of both roads, (name or layer, traced, worked out): at each moment, and kept by each layer."""

    case: Case
    moments: tuple[tuple[str, int, int], ...]
    layers: tuple[tuple[int, int, int], ...]

    @property
    def peak(self) -> tuple[int, int]:
        """Return the peaks (traced, worked out), each over all moments."""
        return max(one[1] for one in self.moments), max(one[2] for one in self.moments)

    @property
    def peak_error(self) -> float:
        """Return how far the worked-out peak is off, of the traced one."""
        traced, closed = self.peak
        return closed / traced - 1

    @property
    def layer_error(self) -> float:
        """Return the largest difference of a layer's kept bytes, of the traced ones."""
        return max((closed / traced - 1 for _index, traced, closed in self.layers), key=abs, default=0.0)


def compare(case: Case) -> Agreement:
    """Trace a case and work it out."""
    model = with_overrides(load_model(case.model), dict(case.overrides), where=case.model)
    eager = case.eager or model.architecture == "GptOssForCausalLM"
    options = TraceJob(
        micro_batch=case.micro_batch,
        seq_len=case.seq_len,
        recompute=case.recompute,
        lora=LoraOptions(r=16, targets=case.lora) if case.lora else None,
        autocast=None if not case.lora else _compute(case),
        dtype=_compute(case),
        base=case.base,
        prepare="trl" if case.prepared else "none",
        attention="eager" if eager else "auto",
    )
    trace = trace_described(model, options, loss=case.loss)
    worked_out = closed_form(model, case, eager=eager)
    found = {one.moment: one.allocated.bytes for one in worked_out.ranks[0].moments}
    seen = traced_moments(trace)
    moments = tuple((name, seen.get(name, 0), found[name]) for name in MOMENTS if name in found and name in seen)
    # Norms of a prepared base keep the residual stream itself: what one layer makes is what the next one keeps.
    apart = case.recompute == "none" and not (case.base in ("nf4", "fp4") and case.prepared)
    return Agreement(case=case, moments=moments, layers=_layers(trace, worked_out.job) if apart else ())


def trace_described(model: Model, job: TraceJob, *, loss: str = "plain") -> Trace:
    """Trace a model of the catalog whose layers were cut; all layers are run."""
    built = build_described(model, job)
    if loss != "plain":
        use_loss(built.model, loss)
    return trace_model(prepare(built.model, job), built.config, job).trace


def closed_form(model: Model, case: Case, *, eager: bool) -> TrainingStep:
    """Work the same step out: one Hopper GPU, the fused AdamW of the Trainer, packed sequences."""
    small = "float32" if case.lora else "bfloat16"
    return step(
        TrainingJob(
            model=model,
            machine=parse_machine("1xH200"),
            engine="hf_trainer",
            engine_version="transformers 5.23.0",
            precision=Precision(compute=_compute(case), params=_compute(case), grads=small, moments=small),
            optimizer_impl="fused",
            micro_batch_size=case.micro_batch,
            seq_len=case.seq_len,
            packing=True,
            recompute=Recompute(kind="full" if case.recompute == "full" else "none"),
            attention="eager" if eager else "sdpa",
            loss="liger" if case.loss == "liger" else "plain",
            method="lora" if case.lora else "full",
            lora=Lora(rank=16, targets=case.lora) if case.lora else None,
            base_quantization=case.base,
            flags=_flags(case),
        )
    )


def _compute(case: Case) -> str:
    """Return the compute dtype: GPTQ's layers answer in fp16."""
    return "float16" if case.base == "gptq" else "bfloat16"


def _flags(case: Case) -> tuple[tuple[str, str], ...]:
    fused = (("fused_kernels", ""),) if case.loss == "liger" else ()
    return fused if case.prepared else (*fused, ("kbit_preparation", "none"))


def traced_moments(trace: Trace) -> dict[str, int]:
    """Return the most bytes of each moment of the last traced step.

    Backward passes are cut where the first layer's begins and the last one's ends.
    """
    places = trace.places
    in_layer = [".layers." in place.module for place in places]
    last_step = max(place.step for place in places)
    inside = [
        index
        for index, where in enumerate(trace.where)
        if in_layer[where] and places[where].phase in (BACKWARD, RECOMPUTE) and places[where].step == last_step
    ]
    found: dict[str, int] = {}
    for index, (event, where, running_bytes) in enumerate(
        zip(trace.events, trace.where, trace.running_bytes(), strict=True)
    ):
        place = places[where]
        if event < 0 or place.step != last_step:
            continue
        if place.phase in (BACKWARD, RECOMPUTE):
            before = "loss" if index < inside[0] else "backward"
            name = before if index <= inside[-1] else "embedding backward"
        else:
            name = {FORWARD: "forward" if in_layer[where] else "loss"}.get(place.phase, "optimizer step")
        found[name] = max(found.get(name, 0), running_bytes)
    return found


def _layers(trace: Trace, job: TrainingJob) -> tuple[tuple[int, int, int], ...]:
    """Return (layer, traced, worked out) of what each layer keeps when the first backward begins."""
    begin = next(index for index, where in enumerate(trace.where) if trace.places[where].phase == BACKWARD)
    kept: dict[int, int] = {}
    for number in trace.alive_at(begin - 1):
        one = trace.allocations[number]
        _before, inside, rest = trace.places[one.place].module.partition(".layers.")
        if inside and one.category in (ACTIVATION, TEMPORARY) and not _is_cast(one, trace):
            index = int(rest.partition(".")[0])
            kept[index] = kept.get(index, 0) + round_up(one.size_bytes, BLOCK_BYTES)
    one_pass = forward_pass(*resolve(job))
    return tuple((index, size, one_pass.layers[index].kept_bytes) for index, size in sorted(kept.items()))


def _is_cast(one: Any, trace: Trace) -> bool:
    """Say whether an allocation is the cached cast of an adapter's weight, which the closed form counts apart."""
    module = trace.places[one.place].module
    return ".lora_" in module and one.op == "_to_copy" and len(one.shape) == 2
