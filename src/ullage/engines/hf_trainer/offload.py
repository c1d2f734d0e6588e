"""What a job of the Trainer family keeps on the host instead of the GPU: checkpoints, sharded states, the optimizer."""

from __future__ import annotations

from dataclasses import replace

from ullage.account.activations.layer import layer_table
from ullage.account.activations.recompute import LayerMemory
from ullage.account.activations.saved import table_bytes
from ullage.account.sharding import whole
from ullage.account.weights import weights_term
from ullage.engines.hf_trainer import fsdp
from ullage.engines.hf_trainer.defaults import Recipe
from ullage.engines.hf_trainer.layers import Pass, micro_batch
from ullage.engines.hf_trainer.states import States, base_quantization
from ullage.errors import InputError
from ullage.i18n import _
from ullage.ledger import Term, exact, ranged
from ullage.spec.training import TrainingJob

#: Tensors that still lie on the GPU while their copies to the host are under way.
#: Source: trl@1.16.0:models/activation_offloading.py:OffloadActivations (max_fwd_stash_size).
UNDER_WAY = 5


def check(job: TrainingJob) -> None:
    """Refuse what no framework of this family moves to the host.

    Raises:
        InputError: parameters on the host without FSDP.
    """
    places = dict(job.offload)
    if "params" in places and job.parallel.fsdp is None and not job.parallel.zero_stage:
        raise InputError(
            _("parameters live on the host under FSDP or ZeRO only"),
            remedy=_("give --fsdp or --zero, or leave the parameters on the GPU"),
        )


def on_device(job: TrainingJob, held: States) -> States:
    """Return what stays on the GPU of weights, gradients and states.

    Formula: FSDP with offloaded parameters: shards, their gradients and states are on the host, and the step runs
        there; scales of a 4-bit base are no parameters and stay. An offloaded optimizer alone: states on the host;
        gradients stay until they are copied.
    Source: torch@2.13.0:torch/distributed/fsdp/_fully_shard/_fsdp_api.py:CPUOffloadPolicy (sharded parameters,
        gradients and optimizer states); torchao@0.17:torchao/optim/cpu_offload.py:CPUOffloadOptimizer.
    """
    places = dict(job.offload)
    if "params" in places:
        return replace(
            held,
            weights=_scales(job, held),
            adapters=exact("adapters", 0),
            gradients=exact("gradients", 0),
            optimizer=exact("optimizer", 0),
        )
    return replace(held, optimizer=exact("optimizer", 0)) if "optimizer" in places else held


def _scales(job: TrainingJob, held: States) -> Term:
    """Return what offloaded weights leave on the GPU: the scales of a 4-bit base (see ``fsdp.sharded_weights``)."""
    if job.base_quantization not in ("nf4", "fp4"):
        return exact("weights", 0, formula="on the host")
    share = replace(whole(job.model), mtp=False, towers=False)
    weights = weights_term(job.model, share, quantization=base_quantization(job), dtype=job.precision.compute)
    scales = fsdp.scale_bytes(job, weights.bytes)
    high = max(scales, held.weights.high_bytes - held.weights.bytes + scales)
    return ranged("weights", scales, low=scales, high=high, formula="scales; the values are on the host")


def steps_on_host(job: TrainingJob) -> bool:
    """Return whether the optimizer runs on the host."""
    return "params" in dict(job.offload) or "optimizer" in dict(job.offload)


def on_host(job: TrainingJob, held: States, one_pass: Pass) -> int:
    """Return the host bytes of one rank."""
    places = dict(job.offload)
    found = 0
    if "params" in places:
        found += held.weights.bytes + held.adapters.bytes + held.gradients.bytes + held.optimizer.bytes
    elif "optimizer" in places:
        found += held.optimizer.bytes
    return found + (one_pass.kept_bytes if "activations" in places else 0)


def without_host(job: TrainingJob, recipe: Recipe, one_pass: Pass) -> Pass:
    """Return a pass whose kept tensors are on the host.

    Formula: the last five kept tensors are still on the GPU (with recompute the last five layers' inputs); every other
        layer's come back when its backward begins: its input where it is recomputed, else five tensors at a time.
        Functions after Unsloth's hold none back (flag ``offload_under_way`` 0).
    Source: trl@1.16.0:models/activation_offloading.py:OffloadActivations (pack_tensor, unpack_tensor_with_streams);
        llamafactory@0.9.5:model/model_utils/checkpointing.py:get_unsloth_gradient_checkpointing_func;
        axolotl@0.19.0:axolotl/monkeypatch/gradient_checkpointing/offload_cpu.py:CPU_Offloaded_Gradient_Checkpointer.
    Known error: copies that are freed late stand in a pool of the second stream.
    """
    if "activations" not in dict(job.offload):
        return one_pass
    again = job.recompute.kind == "full"
    stated = dict(job.flags).get("offload_under_way", "")
    under_way = int(stated) if stated.isdigit() else UNDER_WAY
    num_layers, layers = len(one_pass.layers), []
    for index, memory in enumerate(one_pass.layers):
        if again and index >= num_layers - under_way:
            layers.append(memory)
            continue
        back = memory.kept_bytes if again else min(memory.kept_bytes, UNDER_WAY * _largest(job, recipe, index))
        stays = back if not again and index == num_layers - 1 else 0
        floor = 0 if again else -back
        points = tuple((max(floor, extra) + back - stays, grads) for extra, grads in memory.points)
        layers.append(LayerMemory(kept_bytes=stays, points=points))
    return replace(one_pass, layers=tuple(layers))


def _largest(job: TrainingJob, recipe: Recipe, index: int) -> int:
    table = layer_table(job.model.layers[index], job.model.hidden_size, micro_batch(job), recipe.implementation)
    return max((table_bytes((row,)) for row in table), default=0)
