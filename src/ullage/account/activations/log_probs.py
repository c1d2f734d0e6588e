"""Log-probabilities of the labels, as preference and reinforcement losses make them out of hidden states."""

from __future__ import annotations

from dataclasses import replace

from ullage.account.activations.logits import LossPeak
from ullage.account.activations.saved import ALLOCATOR_BLOCK_BYTES
from ullage.frozen import Frozen
from ullage.spec.rlhf import ON_POLICY, LogProbStyle
from ullage.spec.training import TrainingJob
from ullage.units import dtype_bytes, round_up

#: Tokens and vocabulary rows of one tile of TRL's fused head.
#: Source: trl@1.16.0:kernels/chunked_logprob.py:TOKEN_CHUNK_SIZE, trainer/utils.py:_CHUNKED_LOGPROB_CHUNK_SIZE.
TILE_TOKENS, TILE_ROWS = 4096, 32768


class LogProbs(Frozen):
    """One batch of log-probabilities.

    Attributes:
        style: as in :class:`ullage.spec.rlhf.Rlhf`.
        num_rows: sequences; num_tokens: their tokens that are scored, all rows together.
        vocab_size, hidden_size: of the head.
        width: bytes of the compute dtype; weight_width: of the head's weight.
        widened: logits are handed on in fp32 (autocast's ``convert_outputs_to_fp32``, or the trainer's own cast).
        scaled: logits are divided by a temperature, which is one more copy of them.
        head_trained: the head has a gradient.
        outputs_held: the model's output object lives on while the reference runs.
    """

    style: LogProbStyle
    num_rows: int
    num_tokens: int
    vocab_size: int
    hidden_size: int
    width: int = 2
    weight_width: int = 2
    widened: bool = True
    scaled: bool = False
    head_trained: bool = True
    outputs_held: bool = False


class LogProbPeak(Frozen):
    """``loss``: of the trained pass; ``scoring_bytes``: of a pass without gradients, logits and all."""

    loss: LossPeak
    scoring_bytes: int


def log_probs_of(job: TrainingJob) -> LogProbPeak:
    """Return what the log-probabilities of one batch of a policy's job take."""
    asked = job.rlhf
    assert asked is not None
    lora = job.lora
    trained = lora is None or "lm_head" in lora.trained_modules
    return log_prob_peak(
        LogProbs(
            style=asked.log_probs,
            num_rows=job.micro_batch_size,
            num_tokens=scored_tokens(job),
            vocab_size=job.model.vocab_size,
            hidden_size=job.model.hidden_size,
            width=int(dtype_bytes(job.precision.compute)),
            weight_width=int(dtype_bytes(job.precision.params)) if lora is None else 2,
            widened=is_widened(job),
            scaled=asked.kind in ON_POLICY,
            head_trained=trained,
        )
    )


def tiled_peak(job: TrainingJob) -> LogProbPeak:
    """Return what TRL's loss of next tokens takes: log-probabilities of the labels, in tiles of head and log-softmax.

    Every token is scored that has a label; here all of them.
    Source: trl@1.16.0:trainer/utils.py:add_fused_lm_head, trainer/sft_trainer.py:SFTTrainer.compute_loss.
    """
    lora = job.lora
    return log_prob_peak(
        LogProbs(
            style="tiled",
            num_rows=job.micro_batch_size,
            num_tokens=job.micro_batch_size * job.seq_len,
            vocab_size=job.model.vocab_size,
            hidden_size=job.model.hidden_size,
            width=int(dtype_bytes(job.precision.compute)),
            weight_width=int(dtype_bytes(job.precision.params)) if lora is None else 2,
            head_trained=lora is None or "lm_head" in lora.trained_modules,
        )
    )


def scored_tokens(job: TrainingJob) -> int:
    """Return the tokens of a batch that are scored: of generated rows the completion alone (``logits_to_keep``).

    Source: trl@1.16.0:trainer/grpo_trainer.py:GRPOTrainer._get_per_token_logps_and_entropies; verl scores all tokens
        (verl@1dda039:verl/workers/engine/fsdp/transformer_impl.py).
    """
    asked, length = job.rlhf, job.seq_len
    if asked is not None and asked.kind in ON_POLICY and asked.completion_len and asked.log_probs != "inplace":
        length = min(length, asked.completion_len)
    return job.micro_batch_size * length


def is_widened(job: TrainingJob) -> bool:
    """Return whether logits are handed on in fp32.

    Autocast's wrapper makes outputs fp32; DeepSpeed's engine runs no autocast; LLaMA-Factory casts by itself.
    Source: accelerate@1.10.0:accelerator.py:Accelerator.prepare_model (convert_outputs_to_fp32);
        llamafactory@0.9.5:train/dpo/trainer.py:CustomDPOTrainer.concatenated_forward.
    """
    if job.rlhf is not None and job.rlhf.log_probs == "inplace":
        return False
    return job.engine != "deepspeed" or (job.rlhf is not None and job.rlhf.log_probs == "full")


def log_prob_peak(asked: LogProbs) -> LogProbPeak:
    """Return what log-probabilities take at their worst points.

    Formula: N tokens, V rows of the vocabulary, r sequences, w bytes of the compute dtype, e = 4 where logits are
        widened, else w. rows, widened: forward NV (w + 4), kept 4NV, backward NV max(12, 8 + 8/r): the rows' gradients
        stacked, those of the gathered values, and their sum; or, of few rows, logits, gradients and three rows in one
        expression. rows, narrow: forward 2wNV, kept wNV, backward NV max(2w, w + 2w/r). full: forward 3eNV (2e for one
        row, which needs no contiguous copy), kept 2eNV, backward 3eNV. tiled: one tile, hidden states, and in backward
        fp32 gradients of hidden states and head with their casts.
    Source: trl@1.14.2:trainer/utils.py:selective_log_softmax; torch@2.13.0:torch/csrc/autograd/FunctionsManual.cpp:
        logsumexp_backward, autograd/input_buffer.cpp; trl@0.14.0:trainer/dpo_trainer.py:DPOTrainer.concatenated_forward
        and llamafactory@0.9.5:train/trainer_utils.py:get_batch_logps (all at once); trl@1.16.0:
        kernels/chunked_logprob.py:_ChunkedLogProbFunction.
    Known error: below 3 % of traced heads; metrics on logits (means over completions) may add up to half of them.
    """
    if asked.style == "none":
        return _scalar(asked)
    if asked.style == "unused":
        return _unused(asked)
    if asked.style == "tiled":
        return _tiled(asked)
    if asked.style == "inplace":
        return _in_place(asked)
    return _full(asked) if asked.style == "full" else _rows(asked)


def _rows(asked: LogProbs) -> LogProbPeak:
    logits, rows, width = asked.num_tokens * asked.vocab_size, max(1, asked.num_rows), asked.width
    source = "trl@1.14.2:trainer/utils.py:selective_log_softmax"
    if asked.widened or width == 4:
        narrow = width if width < 4 else 0
        forward, kept, backward = max(narrow + 4, 8 if asked.scaled else 4), 4, max(12, 8 + 8 / rows)
        scoring: float = max(forward, 4 + 4 / rows)
        made = f"logits {narrow} + in fp32 4; backward {backward:g}"
    else:
        forward, backward = 2 * width, max(2 * width, width + 2 * width / rows)
        kept, scoring = width * (2 if asked.outputs_held else 1), width + width / rows
        made = f"logits {width} + log-softmax {width}; backward {backward:g}"
        if asked.scaled:
            forward, scoring = max(forward, 3 * width), 2 * width + width / rows
    return _peak(asked, logits, forward, kept, backward, scoring, made, source)


def _full(asked: LogProbs) -> LogProbPeak:
    logits = asked.num_tokens * asked.vocab_size
    each = 4 if asked.widened else asked.width
    copy = each if asked.num_rows > 1 else 0
    made = f"logits {each} + log-softmax {each}" + (f" + contiguous copy {copy}" if copy else "")
    forward = max(2 * each + copy, each + asked.width)
    source = "llamafactory@0.9.5:train/trainer_utils.py:get_batch_logps"
    return _peak(asked, logits, forward, 2 * each, 3 * each, forward, made, source)


def _peak(
    asked: LogProbs,
    logits: int,
    forward: float,
    kept: float,
    backward: float,
    scoring: float,
    made: str,
    source: str,
) -> LogProbPeak:
    """Return the peak of a loss whose sizes are so many bytes a logit."""
    loss = LossPeak(
        forward_bytes=_bytes(logits * forward),
        backward_bytes=_bytes(logits * backward),
        kept_bytes=_bytes(logits * kept),
        formula=f"{asked.num_tokens:,} tokens x {asked.vocab_size:,} x ({made})",
        source=source,
    )
    return LogProbPeak(loss=loss, scoring_bytes=_bytes(logits * scoring))


def _in_place(asked: LogProbs) -> LogProbPeak:
    """Return the peak of a kernel that writes the gradient over the logits; scoring makes the entropy of all of them.

    Formula: wNV in forward and backward; without gradients logits, softmax, their product and its exponents: 4wNV.
    Source: verl@1dda039:verl/utils/torch_functional.py:logprobs_from_logits_flash_attn, entropy_from_logits.
    Known error: with chunks or a fused kernel the entropy's three copies drop out.
    """
    logits, width = asked.num_tokens * asked.vocab_size, asked.width
    source = "verl@1dda039:verl/utils/torch_functional.py:logprobs_from_logits_flash_attn"
    return _peak(asked, logits, width, width, width, 4 * width, f"logits {width}, gradient in place", source)


def _tiled(asked: LogProbs) -> LogProbPeak:
    tile = _bytes(min(asked.num_tokens, TILE_TOKENS) * min(TILE_ROWS, asked.vocab_size) * asked.width)
    hidden, head = asked.num_tokens * asked.hidden_size, asked.vocab_size * asked.hidden_size
    kept = _bytes(hidden * asked.width)
    cast = asked.weight_width if asked.weight_width < 4 else 0
    weight = _bytes(head * (4 + cast)) if asked.head_trained else 0
    loss = LossPeak(
        forward_bytes=tile + kept + _bytes(10 * 4 * asked.num_tokens),
        backward_bytes=tile + kept + _bytes(hidden * (4 + asked.width)) + weight,
        kept_bytes=kept,
        head_grad_bytes=_bytes(head * asked.weight_width) if asked.head_trained else 0,
        formula=f"tile of {min(asked.num_tokens, TILE_TOKENS):,} x {min(TILE_ROWS, asked.vocab_size):,}, fp32 gradients"
        " of hidden states" + (" and head" if asked.head_trained else ""),
        source="trl@1.16.0:kernels/chunked_logprob.py:_ChunkedLogProbFunction",
    )
    return LogProbPeak(loss=loss, scoring_bytes=tile + kept)


def _scalar(asked: LogProbs) -> LogProbPeak:
    """Return the peak of a scalar head: one score a token, and the gradient of the scores.

    Source: transformers@5.23.0:modeling_layers.py:GenericForSequenceClassification.forward.
    """
    scores = _bytes(asked.num_tokens * 4)
    loss = LossPeak(
        forward_bytes=2 * scores,
        backward_bytes=2 * scores,
        kept_bytes=scores,
        formula=f"{asked.num_tokens:,} scores",
        source="transformers@5.23.0:modeling_layers.py:GenericForSequenceClassification.forward",
    )
    return LogProbPeak(loss=loss, scoring_bytes=scores)


def _unused(asked: LogProbs) -> LogProbPeak:
    """Return the peak of a scalar head beside the vocabulary's, whose logits are made, cast to fp32 and dropped.

    Source: trl@0.24.0:models/modeling_value_head.py:AutoModelForCausalLMWithValueHead.forward;
        llamafactory@0.9.5:train/rm/trainer.py:PairwiseTrainer.compute_loss.
    """
    found = _scalar(asked).loss
    logits = asked.num_tokens * asked.vocab_size
    made = _bytes(logits * (asked.width + (4 if asked.width < 4 else 0)))
    formula = f"{asked.num_tokens:,} tokens x {asked.vocab_size:,} x (logits {asked.width} + in fp32 4), not used"
    loss = replace(found, forward_bytes=made + found.forward_bytes, formula=formula)
    return LogProbPeak(loss=loss, scoring_bytes=made)


def _bytes(num_bytes: float) -> int:
    return round_up(round(num_bytes), ALLOCATOR_BLOCK_BYTES)
