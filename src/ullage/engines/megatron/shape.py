"""Sizes of one micro-batch on one rank under tensor, sequence and context parallelism."""

from __future__ import annotations

from dataclasses import replace

from ullage.engines.megatron.defaults import Settings
from ullage.frozen import Frozen
from ullage.spec.training import TrainingJob


class Sizes(Frozen):
    """Token counts of one micro-batch on one rank.

    Attributes:
        micro_batch_size: b; seq_len: s; decoder_seq_len, encoder_seq_len: of an encoder-decoder, else s.
        tensor, context: parallel sizes; sequence: activations between GEMMs are split over the tensor ranks.
    """

    micro_batch_size: int
    seq_len: int
    decoder_seq_len: int
    encoder_seq_len: int
    tensor: int
    context: int
    sequence: bool

    @property
    def tokens(self) -> int:
        """Tokens in a tensor-parallel region."""
        return self.micro_batch_size * self.seq_len // self.context

    @property
    def stream_tokens(self) -> int:
        """Tokens of the residual stream: divided over the tensor ranks under sequence parallelism."""
        return self.tokens // self.tensor if self.sequence else self.tokens

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
        return replace(self, seq_len=self.decoder_seq_len)


def sizes_of(job: TrainingJob, settings: Settings) -> Sizes:
    """Sizes of the job's micro-batch."""
    return Sizes(
        micro_batch_size=job.micro_batch_size,
        seq_len=job.seq_len,
        decoder_seq_len=settings.count("decoder-seq-length", job.seq_len),
        encoder_seq_len=job.seq_len,
        tensor=job.parallel.tensor_parallel_size,
        context=job.parallel.context_parallel_size,
        sequence=job.parallel.sequence_parallel,
    )
