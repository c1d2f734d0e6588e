"""What parameter-efficient methods and a loop of one's own change of a step: lengths, rows, buffers, last outputs."""

from __future__ import annotations

import re
from dataclasses import replace

from ullage.account.activations.saved import SavedTensor, Shape, table_bytes
from ullage.account.adapters.names import rule_of
from ullage.account.adapters.rule import AdapterPrecision, key_value_width
from ullage.account.adapters.whole import (
    frame_bytes,
    held_bytes,
    hosted_bytes,
    layer_rows,
    least_held_bytes,
    prefix_rows,
    unsaid_variants,
    work_bytes,
)
from ullage.account.lora import adapter_table, frozen_elements
from ullage.account.optimizer import Trained, rule_name
from ullage.engines.hf_trainer.defaults import Recipe, precision_of, transformers_version
from ullage.errors import InputError
from ullage.i18n import _
from ullage.ledger import Certainty, Term, exact, ranged
from ullage.spec import model as spec
from ullage.spec.training import Lora, TrainingJob
from ullage.units import dtype_bytes, round_up

#: Of a length that is only known not to be exceeded: the middle of half and all of it is expected.
EXPECTED_LENGTH = (3, 4)
#: The expected length's range, of itself: half and all of the bound.
LENGTH_RANGE = (2 / 3, 4 / 3)
#: Batches of mixed lengths: the mean one, of the longest, where nothing else is said.
MEAN_LENGTH = 2
#: Masks of truth values, which every layer turns into numbers for itself; one mask of numbers for all before.
#: Source: transformers@4.53.0:masking_utils.py:sdpa_mask_recent_torch; @4.52.4:models/llama/modeling_llama.py.
BOOL_MASKS = (4, 53)
#: From here the update of singular vectors is a product of its own; the weight was written out before.
#: Source: peft@0.20.1:tuners/osf/layer.py:Linear.forward against @0.21.2.
FACTORED_OSF = (0, 21)


def as_run(job: TrainingJob) -> TrainingJob:
    """Return the job with the sequences that the model sees.

    A bound on the length (flag ``seq_len_at_most``) is replaced by what is expected of the longest batch; prompts make
    every sequence longer.
    """
    said = list(job.assumed)
    most = dict(job.flags).get("seq_len_at_most", "")
    length = job.seq_len
    if most.isdigit() and length == int(most):
        length = max(1, length * EXPECTED_LENGTH[0] // EXPECTED_LENGTH[1])
        said.append(
            _("the longest batch has {length} tokens: three quarters of the bound").format(length=f"{length:,}")
        )
    lora = job.lora
    _check(job)
    if lora is not None and lora.kind == "osf":
        lora = replace(lora, options=(*lora.options, ("factored", int(_peft_version(job) >= FACTORED_OSF))))
    if lora is not None and lora.kind == "lora" and rule_name(job.optimizer) == "lora_fa":
        lora = replace(lora, options=(*lora.options, ("frozen", "a")))
    if lora is not None and lora.kind != "lora" and not lora.targets and rule_of(lora.kind).targets:
        lora = replace(lora, targets=rule_of(lora.kind).targets)
        said.append(_("adapted modules: {names}, PEFT's choice").format(names=", ".join(lora.targets)))
    prompt = prompt_tokens(job)
    if prompt:
        said.append(_("{count} virtual tokens before every sequence").format(count=prompt))
    return replace(job, seq_len=length + prompt, lora=lora, assumed=tuple(said))


def _check(job: TrainingJob) -> None:
    """Refuse what PEFT cannot do.

    Raises:
        InputError: a quantised base under a method that reads its weights, or LoRA-FA without LoRA.
    """
    lora = job.lora
    if lora is not None and lora.kind != "lora" and rule_of(lora.kind).reads_weight and job.base_quantization:
        raise InputError(
            _("{method} reads the base's weights, and those of a base in {name} are packed").format(
                method=lora.kind, name=job.base_quantization[:20]
            ),
            remedy=_("leave out --base-quantization, or take a method such as lora, vera, ia3 or oft"),
        )
    if rule_name(job.optimizer) == "lora_fa" and (lora is None or lora.kind != "lora"):
        raise InputError(_("LoRA-FA is an optimizer of LoRA's factors alone"), remedy=_("write --lora r=16"))


def _peft_version(job: TrainingJob) -> tuple[int, int]:
    match = re.search(r"peft\D{0,3}(\d{1,3})\.(\d{1,3})", job.engine_version)
    return (int(match.group(1)), int(match.group(2))) if match else FACTORED_OSF


def shortened(term: Term) -> Term:
    """Return a term that grows with a length of which only a bound is known."""
    return replace(
        term,
        low_bytes=int(term.low_bytes * LENGTH_RANGE[0]),
        high_bytes=int(term.high_bytes * LENGTH_RANGE[1]),
        certainty=Certainty.ASSUMED,
    )


def rows_of(job: TrainingJob, layer: spec.Layer, precision: AdapterPrecision, shape: Shape) -> tuple[SavedTensor, ...]:
    """Return what the adapters of one layer keep."""
    lora = job.lora
    if lora is None:
        return ()
    top_k = max((ffn.top_k for ffn in layer.ffns if isinstance(ffn, spec.MoEFFN)), default=1)
    routed, hidden = shape.num_routed_tokens(top_k), job.model.hidden_size
    if lora.kind == "lora":
        return adapter_table(
            layer, hidden, _with_gradients(job, lora), precision, num_tokens=shape.num_tokens, num_routed_tokens=routed
        )
    return layer_rows(layer, hidden, lora, precision, shape, num_routed_tokens=routed)


def _with_gradients(job: TrainingJob, lora: Lora) -> Lora:
    """Return LoRA with both factors differentiated where adapters were switched off and on again since one was frozen.

    Source: peft@0.21.2:tuners/tuners_utils.py:BaseTunerLayer.enable_adapters, set_adapter (all factors require a
        gradient again).
    """
    if rule_name(job.optimizer) == "lora_fa" and "adapters_switched" in dict(job.flags):
        return replace(lora, options=tuple(pair for pair in lora.options if pair != ("frozen", "a")))
    return lora


def mask_rows(job: TrainingJob, recipe: Recipe, layer: spec.Layer, shape: Shape) -> tuple[SavedTensor, ...]:
    """Return the masks and prefixes of a layer's attention.

    Formula: SDPA with a mask: the layer's own mask as numbers, b s (s + t) in the compute dtype, columns in multiples
        of 16; t prefix tokens: their keys and values.
    Source: torch@2.13.0:aten/src/ATen/native/transformers/attention.cpp:convert_boolean_attn_mask, preprocess_mask.
    """
    implementation, prefix = recipe.implementation, prefix_tokens(job)
    compute = implementation.compute_dtype
    rows = prefix_rows(layer, prefix, shape, compute_dtype=compute, repeats=implementation.repeat_kv)
    masked = implementation.attention == "sdpa" and implementation.repeat_kv and recipe.version >= BOOL_MASKS
    if not masked or (job.engine == "single" and not keeps_cache(job)):
        return rows
    elements = shape.num_tokens * round_up(shape.seq_len + prefix, 16)
    mixers = [mixer for mixer in layer.mixers if isinstance(mixer, spec.Attention)]
    masks = (
        SavedTensor(name=f"{one.prefix}.mask", module=one.prefix, num_elements=elements, dtype=compute, formula="bss")
        for one in mixers
    )
    return (*rows, *masks)


def prompt_tokens(job: TrainingJob) -> int:
    """Return the tokens that every sequence becomes longer by."""
    lora = job.lora
    return rule_of(lora.kind).prompt_tokens(lora) if lora is not None and lora.kind != "lora" else 0


def prefix_tokens(job: TrainingJob) -> int:
    """Return the keys and values that stand before every sequence's own."""
    lora = job.lora
    return rule_of(lora.kind).prefix_tokens(lora) if lora is not None and lora.kind != "lora" else 0


def variants_term(job: TrainingJob, precision: AdapterPrecision, shape: Shape) -> Term:
    """Return what other forms of a method would keep more, where a record states no more than its name and a count."""
    lora = job.lora
    if lora is None or lora.kind == "lora" or lora.num_parameters is None:
        return exact("other_variants", 0)
    kept = [_kept_bytes(job, one, precision, shape) for one in unsaid_variants(job.model, lora)]
    return ranged("other_variants", 0, low=0, high=max(kept) - kept[0], formula="settings that are not said")


def _kept_bytes(job: TrainingJob, lora: Lora, precision: AdapterPrecision, shape: Shape) -> int:
    """Return what a method keeps of all layers."""
    one = replace(job, lora=lora)
    found = {layer: table_bytes(rows_of(one, layer, precision, shape)) for layer in dict.fromkeys(job.model.layers)}
    return sum(found[layer] for layer in job.model.layers)


def reaches_input(job: TrainingJob) -> bool:
    """Return whether a gradient reaches the first layer's input: prompts and rows of the embedding are trained."""
    lora = job.lora
    return lora is not None and lora.kind != "lora" and rule_of(lora.kind).reaches_input


def work_of(job: TrainingJob, layer: spec.Layer, precision: AdapterPrecision) -> int:
    """Return what a method's weights written out take for a moment of the layer's backward."""
    lora = job.lora
    if lora is None or lora.kind == "lora":
        return 0
    return work_bytes(layer, job.model.hidden_size, lora, precision)


def frame_of(job: TrainingJob, shape: Shape) -> int:
    """Return what a method keeps outside the layers."""
    lora = job.lora
    if lora is None or lora.kind == "lora":
        return 0
    return frame_bytes(job.model, lora, shape, job.precision.compute)


def beside_weights(job: TrainingJob, trained: Trained) -> Term:
    """Return what lies frozen beside a method's trained tensors, and the scores it keeps of them.

    AdaLoRA's scores are there only where the loop calls ``update_and_allocate``. The Trainer moves a model as a whole,
    and with it what a method makes on the host; a loop of one's own that wraps a model on the GPU does not.
    Source: transformers@5.23.0:trainer.py:Trainer._move_model_to_device.
    """
    lora = job.lora
    if lora is None:
        return exact("adapter_buffers", 0)
    if lora.kind == "lora":
        frozen = 4 * frozen_elements(job.model, lora)
        return exact("adapter_buffers", frozen, source="peft@0.21.2:tuners/lora/layer.py:LoraLayer.update_layer")
    rule, width, precision = rule_of(lora.kind), float(dtype_bytes(job.precision.params)), precision_of(job)
    held = held_bytes(job.model, lora, precision, base_width=width)
    least = least_held_bytes(job.model, lora, precision, base_width=width)
    scores = 4 * trained.num_elements * rule.num_scores()
    hosted = hosted_bytes(job.model, lora, precision)
    expected = held + scores + (0 if job.engine == "single" else hosted)
    return ranged("adapter_buffers", expected, low=least, high=held + scores + hosted, source=rule.source)


def idle_gradients(job: TrainingJob) -> int:
    """Return the gradients of LoRA-FA's first factors, which nothing uses but are made; see :func:`_with_gradients`."""
    lora = job.lora
    if lora is None or lora.kind != "lora" or _with_gradients(job, lora) == lora:
        return 0
    return 4 * frozen_elements(job.model, lora)


def keeps_cache(job: TrainingJob) -> bool:
    """Return whether a loop over transformers' models makes and holds keys and values: ``use_cache`` is on by default.

    Source: transformers@5.13.0:models/llama/modeling_llama.py:LlamaModel.forward (DynamicCache unless layers are
        recomputed); the Trainer switches it off (trainer.py).
    """
    from_hub = transformers_version(job.engine_version) is not None or job.lora is not None
    return job.engine == "single" and from_hub and job.recompute.kind == "none"


def cache_bytes(job: TrainingJob, num_tokens: int | None = None) -> int:
    """Return the keys and values of a batch whose sequences have so many tokens: b (s + t) k 2d in every layer."""
    if not keeps_cache(job):
        return 0
    tokens = (job.seq_len if num_tokens is None else num_tokens) + prefix_tokens(job)
    return int(job.micro_batch_size * tokens * key_value_width(job.model) * dtype_bytes(job.precision.compute))


def mean_tokens(job: TrainingJob) -> int:
    """Return the mean length of a batch of mixed lengths: as said (flag ``mean_tokens``), or half of the longest."""
    prompt = prompt_tokens(job)
    said = dict(job.flags).get("mean_tokens", "")
    return prompt + (int(said) if said.isdigit() else (job.seq_len - prompt) // MEAN_LENGTH)
