"""One optimizer step of the Trainer, moment by moment: loss, backward, optimizer step, and what stays after it."""

from __future__ import annotations

from dataclasses import replace

from ullage.account.activations.embedding import embedding_gradient_tables
from ullage.account.activations.logits import LossPeak
from ullage.account.gradients import accumulation_bytes, clipping_bytes
from ullage.account.optimizer import temporaries
from ullage.engines import training
from ullage.engines.hf_trainer import adapted, experts, fsdp, offload, zero
from ullage.engines.hf_trainer.defaults import Recipe, resolve, unprepared
from ullage.engines.hf_trainer.layers import Pass, forward_pass, micro_batch, worst_backward
from ullage.engines.hf_trainer.outside import outside, reserved_overhead
from ullage.engines.hf_trainer.policy import loss_of, outside_graph
from ullage.engines.hf_trainer.states import States, states
from ullage.engines.training import TrainingRank, TrainingStep
from ullage.frozen import Frozen
from ullage.ledger import Ledger, Term, exact, ranged, total
from ullage.spec.training import TrainingJob, is_headless
from ullage.units import MiB, dtype_bytes

#: How far sums of activations were off against published peaks (docs/training.md).
ACTIVATION_ERROR = 0.05
#: What is said of tensors that no other sentence makes up.
SAVED_WORDS = "tensors that autograd saves of these modules"


class Walk(Frozen):
    """What every moment of a step draws on; ``low_pass``: the same pass where a base was not prepared for training."""

    job: TrainingJob
    recipe: Recipe
    states: States
    one_pass: Pass
    low_pass: Pass
    loss: LossPeak


def step(job: TrainingJob) -> TrainingStep:
    """Walk one step of a job of the Trainer family.

    Raises:
        InputError: what the rules do not cover.
    """
    if job.parallel.zero_stage and job.parallel.data_parallel_size > 1:
        return _under_deepspeed(job)
    if fsdp.is_fsdp2(job):
        return training.step(fsdp.as_fsdp2(job))
    filled, recipe = resolve(adapted.as_run(job))
    filled = replace(filled, assumed=(*filled.assumed, *experts.said(filled)))
    offload.check(filled)
    whole, on_gpu, loss = _held(filled, recipe), forward_pass(filled, recipe), loss_of(filled, recipe)
    held, one_pass = offload.on_device(filled, whole), offload.without_host(filled, recipe, on_gpu)
    less = unprepared(filled, recipe)
    low_pass = offload.without_host(filled, less, forward_pass(filled, less)) if recipe.norms_fp32 else one_pass
    walk = Walk(job=filled, recipe=recipe, states=held, one_pass=one_pass, low_pass=low_pass, loss=loss)
    moments = tuple(
        _ledger(walk, name, first + terms)
        for first_step, first in ((True, (exact("optimizer", 0),)), (False, (held.optimizer,)))
        for name, terms in _moments(walk, first_step=first_step)
    )
    rank = TrainingRank(
        rank=0,
        num_ranks=max(1, filled.parallel.data_parallel_size),
        pp_rank=0,
        moments=moments,
        after_step=_ledger(walk, "after step", (held.optimizer, *_after(walk))),
        host_bytes=offload.on_host(filled, whole, on_gpu),
    )
    return TrainingStep(job=filled, ranks=(rank,), warnings=filled.assumed)


def _under_deepspeed(job: TrainingJob) -> TrainingStep:
    """Return the step under ZeRO: DeepSpeed's engine owns weights, gradients and states.

    Raises:
        InputError: a quantised base that stage 3 cannot spread.
    """
    if job.base_quantization is not None:
        return step(zero.as_followed(job))
    return training.step(replace(job, engine="deepspeed"))


def _held(job: TrainingJob, recipe: Recipe) -> States:
    """Return what stays on one rank."""
    found = states(job, recipe)
    if zero.stage_of(job) in (1, 2):
        shared = fsdp.shard(found.optimizer, job.parallel.data_parallel_size)
        return replace(found, optimizer=shared, buckets=zero.bucket_term(job))
    if not fsdp.is_sharded(job):
        return found
    ranks = fsdp.num_shards(job)
    return replace(
        found,
        weights=fsdp.sharded_weights(job, found.weights),
        adapters=fsdp.shard(found.adapters, ranks),
        gradients=fsdp.shard(found.gradients, ranks),
        optimizer=fsdp.shard(found.optimizer, ranks),
    )


def _moments(walk: Walk, *, first_step: bool) -> list[tuple[str, tuple[Term, ...]]]:
    """Return (name, terms besides weights and states) of each moment."""
    found = [("loss", _loss(walk)), ("backward", _backward(walk))]
    if walk.recipe.implementation.trained and not fsdp.is_sharded(walk.job):
        found.append(("embedding backward", _embedding_backward(walk)))
    if first_step:
        return [(f"first step: {name}", terms) for name, terms in found]
    return found if offload.steps_on_host(walk.job) else [*found, ("optimizer step", _optimizer_step(walk))]


def _after(walk: Walk) -> tuple[Term, ...]:
    if fsdp.is_sharded(walk.job):
        return (walk.states.gradients,)  # the sharded flat gradients stay until the next step begins
    return (walk.states.gradients, *_last_outputs(walk, mean=True)) if walk.recipe.keeps_gradients else ()


def _last_outputs(walk: Walk, *, mean: bool = False) -> tuple[Term, ...]:
    """Return the logits and the cache of the last batch: a loop holds them in a variable until the next forward.

    ``mean``: of the mean batch, where lengths are mixed. The cache's tensors are those that attention keeps, unless
    heads are repeated.
    Source: peft@0.19.1:method_comparison/MetaMathQA/run.py:train (``outputs = model(...)``).
    """
    if not walk.recipe.keeps_gradients or walk.job.loss in ("liger", "tiled"):
        return ()
    width = 4 if walk.recipe.loss.upcast == "head" else dtype_bytes(walk.job.precision.compute)
    per_token = int(walk.job.micro_batch_size * walk.job.model.vocab_size * width)
    unknown = walk.recipe.length_unknown
    tokens = adapted.mean_tokens(walk.job) if mean and unknown else walk.job.seq_len
    cache = mean or walk.recipe.implementation.repeat_kv
    expected = tokens * per_token + (adapted.cache_bytes(walk.job, tokens) if cache else 0)
    most = walk.job.seq_len * per_token + (adapted.cache_bytes(walk.job) if cache else 0)
    high = round(most * adapted.LENGTH_RANGE[1]) if unknown else most
    formula = "16-bit logits of the last batch, keys and values"
    source = "peft@0.19.1:method_comparison/MetaMathQA/run.py:train"
    return (ranged("last_outputs", expected, low=0, high=high, formula=formula, source=source),)


def _kept_gradients(walk: Walk) -> Term:
    """Return the gradients that stand while a later micro-batch of the step runs."""
    return walk.states.gradients if walk.job.grad_accum > 1 else exact("gradients", 0)


def _loss(walk: Walk) -> tuple[Term, ...]:
    """Return the moment of the loss: all layers have run, nothing has been released."""
    peak, frames = _loss_and_frames(walk)
    return (
        _kept_gradients(walk),
        _shortened(
            walk,
            _near("kept_activations", walk.one_pass.kept_bytes, walk.low_pass.kept_bytes, formula=_kept_formula(walk)),
        ),
        _near("final_norm_and_head_input", *frames),
        _shortened(walk, _loss_term(walk, peak)),
        *_casts(walk),
        *_last_outputs(walk),
        adapted.variants_term(walk.job, walk.recipe.adapters, micro_batch(walk.job)),
        *_gathered(walk, backward=False),
    )


def _gathered(walk: Walk, *, backward: bool) -> tuple[Term, ...]:
    """Return the parameters that stand whole while a part of the model runs."""
    if zero.stage_of(walk.job) == 3:
        return (zero.live_term(walk.job),)
    return fsdp.gathered_terms(walk.job, trained=walk.recipe.implementation.trained, backward=backward)


def _loss_term(walk: Walk, peak: int) -> Term:
    """Return the loss's own bytes; in a loop of one's own it may lie outside a compiled model."""
    high = peak + outside_graph(walk.job, walk.recipe)
    formula = {walk.loss.forward_bytes: walk.loss.formula, walk.loss.backward_bytes: walk.loss.backward_formula}
    words = formula.get(peak) or f"gradients of the logits, of the head and of its input: {peak:,} bytes"
    return ranged("loss", peak, low=peak, high=high, formula=words, source=walk.loss.source)


def _loss_and_frames(walk: Walk) -> tuple[int, list[int]]:
    """Return the bytes of the loss at its worst point, and what the final norm and the head keep at that point.

    A frozen head does not keep its input: the model's forward holds it, and lets go before the backward. When the
    gradient of a trained head is made, that of the logits and that of its input stand beside it.
    """
    head, passes = _head_gradient(walk), (walk.one_pass, walk.low_pass)
    logits = walk.job.micro_batch_size * walk.job.seq_len * walk.job.model.vocab_size
    narrow = int(logits * dtype_bytes(walk.job.precision.compute))
    after_head = narrow + head + passes[0].head_input_bytes if walk.job.loss == "plain" else 0
    backward = max(walk.loss.backward_bytes, after_head, head + _norm_backward(walk) - passes[0].head_input_bytes)
    lets_go = walk.job.loss == "plain" and not head
    away = passes[0].head_input_bytes if lets_go else 0
    if walk.loss.forward_bytes > backward - away:
        away = 0
    peak = max(walk.loss.forward_bytes, backward)
    if lets_go and not away:
        peak = walk.loss.forward_bytes
    return peak, [one.frame_bytes + one.head_input_bytes - away for one in passes]


def _norm_backward(walk: Walk) -> int:
    """Return what the backward of the final norm takes, where it is written out: five fp32 copies of its input.

    Source: transformers@5.23.0:models/llama/modeling_llama.py:LlamaRMSNorm.forward; torch@2.13.0:tools/autograd/
        derivatives.yaml (mul, pow, rsqrt, mean).
    """
    shape = micro_batch(walk.job)
    written = walk.recipe.implementation.norm in ("native", "late_cast")
    kinds = {norm.kind for norm in walk.job.model.final_norms}
    return 5 * 4 * shape.num_tokens * walk.job.model.hidden_size if written and kinds == {"rms"} else 0


def _backward(walk: Walk) -> tuple[Term, ...]:
    """Return the moment of the worst layer's backward."""
    if fsdp.is_sharded(walk.job):
        return _sharded_backward(walk)
    accumulates = walk.job.grad_accum > 1
    head = 0 if accumulates else _head_gradient(walk)
    worst = worst_backward(walk.one_pass, grads_before=head, all_grads=accumulates)
    layer = worst.layer
    temporary = accumulation_bytes(walk.states.trained, dtype=walk.job.precision.grads) if accumulates else 0
    passes = (walk.one_pass, walk.low_pass)
    kept = [sum(one.kept_bytes for one in each.layers[: layer + 1]) for each in passes]
    work = [each.layers[layer].points[worst.point][0] for each in passes]
    gradients = exact("gradients", worst.grad_bytes, formula=f"of what was differentiated, down to layer {layer}")
    return (
        _kept_gradients(walk) if accumulates else gradients,
        _shortened(
            walk, _near("kept_activations", *(one + min(0, less) for one, less in zip(kept, work, strict=True)))
        ),
        _near(
            "layer_backward",
            *(max(0, one) for one in work),
            formula=f"layer {layer}: recomputed tensors and gradients of activations",
        ),
        exact("accumulation_temporary", temporary, formula="the new gradient of the largest tensor"),
    )


def _sharded_backward(walk: Walk) -> tuple[Term, ...]:
    """Return the worst moment of a backward under FSDP.

    Trained layers: the last one, with all checkpoints; frozen layers that are recomputed: the first one, because
    checkpoints and gradients of the layers' inputs stay until the end.
    """
    trained, passes = walk.recipe.implementation.trained, (walk.one_pass, walk.low_pass)
    hooked = not zero.stage_of(walk.job)  # FSDP's hooks hold the inputs of frozen units
    holds = hooked and not trained and walk.job.recompute.kind == "full" and walk.recipe.reentrant
    num_layers = len(walk.one_pass.layers)
    layer = 0 if holds else num_layers - 1
    held = (fsdp.input_gradients(num_layers, walk.one_pass.stream_bytes),) if holds else ()
    return (
        walk.states.gradients if trained else exact("gradients", 0),
        _near("kept_activations", *(each.kept_bytes for each in passes)),
        _near("layer_backward", *(each.layers[layer].working_bytes for each in passes), formula=f"layer {layer}"),
        *held,
        *_gathered(walk, backward=True),
    )


def _embedding_backward(walk: Walk) -> tuple[Term, ...]:
    """Return the end of the backward: all gradients, and what the embedding's takes.

    Formula: tables of indices and partial sums (:func:`embedding_gradient_tables`), + the gradient of the residual
        stream. A tied head's gradient is a view, so that the sum with the embedding's is a tensor of its own: 2 x Vh
        more. With earlier micro-batches the new gradient stands beside the sum: Vh more.
    Source: torch@2.13.0:torch/csrc/autograd/input_buffer.cpp:can_accumulate_inplace.
    """
    model, tokens = walk.job.model, walk.job.micro_batch_size * walk.job.seq_len
    weight = int(model.vocab_size * model.hidden_size * dtype_bytes(walk.job.precision.grads))
    sorting = sum(embedding_gradient_tables(tokens, model.vocab_size, model.hidden_size))
    accumulates = weight if walk.job.grad_accum > 1 else 0
    laid = walk.one_pass.stream_bytes + sorting + accumulates
    tied = model.tied_embeddings and not is_headless(walk.job)
    view = walk.job.loss not in ("liger", "tiled")  # their gradient of the head is a tensor of its own, and added to
    more = max(laid + weight, (2 if view else 1) * weight + accumulates) if tied else laid
    return (
        walk.states.gradients,
        exact("embedding_backward", more, formula="sorted indices, fp32 rows, gradient of the residual stream"),
    )


def _optimizer_step(walk: Walk) -> tuple[Term, ...]:
    """Return the optimizer step: all gradients, and the step's own copies."""
    trained = walk.states.trained
    extra, most = (_step_copies(walk, impl) for impl in (walk.job.optimizer_impl, "foreach"))
    source = "torch@2.13.0:torch/optim/adam.py:_multi_tensor_adam"
    low, high = (0, max(extra, most)) if walk.recipe.impl_assumed else (extra, extra)
    return (
        walk.states.gradients,
        ranged("optimizer_temporaries", extra, low=low, high=high, source=source),
        exact("gradient_norms", clipping_bytes(trained), source="torch@2.13.0:torch/nn/utils/clip_grad.py"),
    )


def _step_copies(walk: Walk, impl: str | None) -> int:
    """Return what an implementation of the optimizer step allocates, of adapters and of full copies."""
    shards = fsdp.num_shards(walk.job) if fsdp.is_sharded(walk.job) else 1
    groups = ((walk.states.trained, walk.states.trained_dtype), (walk.states.copies, walk.job.precision.compute))
    return sum(
        temporaries(walk.job.optimizer, group, impl=impl, params=dtype, num_shards=shards) for group, dtype in groups
    )


def _casts(walk: Walk) -> tuple[Term, ...]:
    """Return the cached casts of fp32 weights under autocast: they live until the forward pass is left.

    Source: torch@2.13.0:aten/src/ATen/autocast_mode.cpp:cached_cast (leaves that require a gradient).
    """
    precision = walk.recipe.adapters
    adapters = walk.job.lora is not None and precision.autocast and precision.dtype == "float32"
    if not walk.recipe.autocast_casts and not adapters:
        return ()
    size = int(walk.states.trained.num_elements * dtype_bytes(walk.job.precision.compute))
    low = 0 if adapters else size
    words = f"{walk.states.trained.num_elements:,} trained values in {walk.job.precision.compute}"
    source = "torch@2.13.0:autocast_mode.cpp:cached_cast"
    return (ranged("autocast_casts", size, low=low, high=size, formula=words, source=source),)


def _inputs(walk: Walk) -> Term:
    """Return token ids, labels and mask of the micro-batch, the next one's copy, and scalars of the optimizer.

    Formula: 3 x 8 bytes per token; every small tensor takes a block of 512 bytes.
    Source: torch@2.13.0:c10/cuda/CUDACachingAllocator.cpp (kMinBlockSize).
    """
    tokens = walk.job.micro_batch_size * walk.job.seq_len * 3 * 8
    small = clipping_bytes(walk.states.trained)
    return ranged(
        "inputs_and_scalars",
        tokens,
        low=0,
        high=2 * tokens + 4 * small + 4 * MiB,
        formula="3 x 8 bytes per token of the micro-batch",
        source="torch@2.13.0:c10/cuda/CUDACachingAllocator.cpp",
    )


def _head_gradient(walk: Walk) -> int:
    """Return the gradient of the output head, where it is trained."""
    if is_headless(walk.job):
        return 0
    lora = walk.job.lora
    if not walk.recipe.implementation.trained and "lm_head" not in (lora.trained_modules if lora else ()):
        return 0
    model = walk.job.model
    return int(model.vocab_size * model.hidden_size * dtype_bytes(walk.job.precision.grads))


def _kept_formula(walk: Walk) -> str:
    per_layer = walk.one_pass.layers[0].kept_bytes
    return f"{len(walk.one_pass.layers)} layers, the first {per_layer:,} bytes"


def _shortened(walk: Walk, term: Term) -> Term:
    """Return a term that grows with the length, with the range of a length that is only known not to be exceeded."""
    if not walk.recipe.length_unknown:
        return term
    return adapted.shortened(term)


def _near(name: str, num_bytes: int, other: int | None = None, *, formula: str = "") -> Term:
    """Return a term of activations with their error; ``other``: what it is where a base was not prepared."""
    margin = round(num_bytes * ACTIVATION_ERROR)
    low = min(num_bytes, num_bytes if other is None else other) - margin
    return ranged(
        name,
        num_bytes,
        low=max(0, low),
        high=num_bytes + margin,
        formula=formula or SAVED_WORDS,
        source="torch@2.13.0:tools/autograd/derivatives.yaml",
    )


def _ledger(walk: Walk, moment: str, terms: tuple[Term, ...]) -> Ledger:
    held = walk.states
    base = [held.weights, held.adapters, held.beside, held.buckets, held.workspaces]
    children = [term for term in (*base, *terms, _inputs(walk)) if term.high_bytes]
    allocated = total("allocated", children)
    return Ledger(
        rank=0,
        moment=moment,
        allocated=allocated,
        reserved_overhead=reserved_overhead(walk.job, allocated, shift_copies=walk.recipe.loss.shift_copies),
        outside=outside(walk.job),
    )
