"""Sizes of one micro-batch on one rank under tensor, sequence and context parallelism.

Every size may be a whole number or an array of them, one element a layout (:mod:`ullage.numeric`).
"""

from __future__ import annotations

from dataclasses import replace

from ullage.engines.megatron.defaults import Settings
from ullage.frozen import Frozen
from ullage.numeric import where
from ullage.spec.training import TrainingJob


class Sizes(Frozen):
    """Token counts of one micro-batch on one rank.

    Attributes:
        micro_batch_size: b; seq_len: s; decoder_seq_len, encoder_seq_len: of an encoder-decoder, else s.
        tokens: in a tensor-parallel region; stream_tokens: of the residual stream, which sequence parallelism divides
            over the tensor ranks.
        tensor, context: parallel sizes; sequence: activations between GEMMs are split over the tensor ranks.
        expert, expert_tensor: parallel sizes of routed experts.
        vocab_size: with padding.
    """

    micro_batch_size: int
    seq_len: int
    decoder_seq_len: int
    encoder_seq_len: int
    tokens: int
    stream_tokens: int
    tensor: int
    context: int
    sequence: bool
    expert: int
    expert_tensor: int
    vocab_size: int

    def scores(self, num_heads: int, *, cross: bool = False) -> int:
        """Elements of one score matrix: b * a/t * (s/c) * s; cross attention looks at the encoder's tokens."""
        keys = self.encoder_seq_len if cross else self.seq_len
        return self.micro_batch_size * -(-num_heads // self.tensor) * (self.seq_len // self.context) * keys

    @property
    def encoder_tokens(self) -> int:
        """Tokens of the encoder's output on the rank."""
        return self.micro_batch_size * self.encoder_seq_len // self.context

    def decoder(self) -> Sizes:
        """The sizes that an encoder-decoder's decoder works on; of other models, these."""
        if self.decoder_seq_len is self.seq_len:
            return self
        tokens = self.micro_batch_size * self.decoder_seq_len // self.context
        stream = where(self.sequence, tokens // self.tensor, tokens)
        return replace(self, seq_len=self.decoder_seq_len, tokens=tokens, stream_tokens=stream)


def sizes_of(job: TrainingJob, settings: Settings) -> Sizes:
    """Sizes of the job's micro-batch: b*s/c tokens, over t in the residual stream under sequence parallelism."""
    parallel = job.parallel
    tensor = parallel.tensor_parallel_size
    tokens = job.micro_batch_size * job.seq_len // parallel.context_parallel_size
    experts = parallel.expert_tensor_parallel_size
    return Sizes(
        micro_batch_size=job.micro_batch_size,
        seq_len=job.seq_len,
        decoder_seq_len=settings.count("decoder-seq-length", job.seq_len),
        encoder_seq_len=job.seq_len,
        tokens=tokens,
        stream_tokens=where(parallel.sequence_parallel, tokens // tensor, tokens),
        tensor=tensor,
        context=parallel.context_parallel_size,
        sequence=parallel.sequence_parallel,
        expert=parallel.expert_parallel_size,
        expert_tensor=tensor if experts is None else experts,
        vocab_size=job.model.vocab_size,
    )
