"""What is to be traced. No torch here."""

from __future__ import annotations

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _

ENGINES = ("hf", "plain")
DTYPES = {
    "float32": "float32", "fp32": "float32", "bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16",
    "fp16": "float16",
}  # fmt: skip
OPTIMIZERS = ("adamw", "adam", "sgd", "sgd_momentum", "adafactor", "muon", "adamw8bit", "none")
#: Quantised forms of a frozen base, and what a trainer does to it before adapters are put in.
BASES = ("nf4", "fp4", "gptq")
PREPARATIONS = ("trl", "peft", "none")
IMPLEMENTATIONS = ("foreach", "fused", "forloop")
#: More tokens than any step holds.
MOST_TOKENS = 1 << 26
MOST_STEPS = 64
MOST_RANKS = 1 << 16


class LoraOptions(Frozen):
    """Adapters: rank, scale, dropout, and the modules that get one ("all-linear" for every linear layer)."""

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ("all-linear",)


class TraceJob(Frozen):
    """The step to trace.

    Attributes:
        engine: "hf" steps as transformers' Trainer (clips, frees gradients after the step), "plain" as a plain loop.
        dtype: of the parameters; autocast: dtype that ``torch.autocast`` computes in, None without.
        optimizer_impl: "foreach", "fused" or "forloop"; None: what the engine takes on a GPU.
        recompute: "none", or "full": every decoder layer is a checkpoint; ``reentrant``: as transformers did before 5.
        steps: optimizer steps that are traced; the second differs from the first, which has no states yet.
        clip: gradients are clipped to a norm.
        base: how the linear layers of a frozen base are held, None: in ``dtype``; ``nested``: scales of nf4 are 8-bit
            (double quantisation); ``group_size``: of GPTQ, 0: one group per output.
        prepare: "peft": what is not packed becomes fp32; "trl": but embeddings and head; "none". Not for GPTQ.
        earlier_adapters: adapters around GPTQ run as in PEFT up to 0.13.
        attention: kernel of scaled dot product attention, or "eager" for the model's written-out formula.
        routing_skew: 0: every expert gets as many tokens.
        unroll: trace few of the layers that repeat and repeat their events.
        fsdp: ranks over which FSDP2 shards the model, 0: none; ``reshard_after_forward`` as ``fully_shard`` has it.
        tp: ranks over which matrices are split, 0: none; with ``fsdp`` a mesh of both. ``sp`` splits the sequence
            between the blocks, and the loss, as well.
        ddp: ranks that hold replicas under DistributedDataParallel, 0: none.
        world: ranks of the fake process group in which a program wraps its module itself, 0: no group.
        rank: which of the ranks is traced; uneven shards differ.
    """

    micro_batch: int = 1
    seq_len: int = 4096
    grad_accum: int = 1
    steps: int = 2
    engine: str = "hf"
    dtype: str = "bfloat16"
    autocast: str | None = None
    optimizer: str = "adamw"
    optimizer_impl: str | None = None
    recompute: str = "none"
    reentrant: bool = False
    inference: bool = False
    clip: bool | None = None
    lora: LoraOptions | None = None
    base: str | None = None
    nested: bool = True
    group_size: int = 128
    prepare: str = "trl"
    earlier_adapters: bool = False
    attention: str = "auto"
    routing_skew: float = 0.0
    compute_capability: tuple[int, int] = (9, 0)
    unroll: bool = True
    fsdp: int = 0
    ddp: int = 0
    world: int = 0
    tp: int = 0
    sp: bool = False
    rank: int = 0
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        """Check what would fail far from here."""
        for name, value, known in (
            ("engine", self.engine, ENGINES),
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("dtype", self.dtype, tuple(DTYPES)),
            ("autocast", self.autocast, (None, *DTYPES)),
            ("optimizer implementation", self.optimizer_impl, (None, *IMPLEMENTATIONS)),
            ("recompute", self.recompute, ("none", "full")),
            ("base", self.base, (None, *BASES)),
            ("preparation", self.prepare, PREPARATIONS),
            ("attention", self.attention, ("auto", "eager", "flash", "efficient", "cudnn", "math")),
        ):
            if value not in known:
                raise InputError(
                    _("unknown {name} {value!r}").format(name=name, value=str(value)[:40]),
                    remedy=_("known are {known}").format(known=", ".join(each for each in known if each)),
                )
        for name, count, most in (
            ("micro-batch", self.micro_batch, MOST_TOKENS),
            ("sequence length", self.seq_len, MOST_TOKENS),
            ("tokens", self.micro_batch * self.seq_len, MOST_TOKENS),
            ("gradient accumulation", self.grad_accum, 4096),
            ("steps", self.steps, MOST_STEPS),
            ("group size", self.group_size or 1, MOST_TOKENS),
        ):
            if not 1 <= count <= most:
                raise InputError(_("{name}: {value} is outside 1 to {most}").format(name=name, value=count, most=most))
        self._check_ranks()

    def _check_ranks(self) -> None:
        given = {name: count for name in ("fsdp", "ddp", "world", "tp") if (count := getattr(self, name))}
        if len(given) > 1 and set(given) != {"fsdp", "tp"}:
            raise InputError(
                _("{names} cannot be combined").format(names=", ".join(f"--{name}" for name in given)),
                remedy=_("wrap your own module and trace it with --world N"),
            )
        for name, count in (given | {"ranks": self.num_ranks} if given else given).items():
            if not 2 <= count <= MOST_RANKS:
                raise InputError(
                    _("{name}: {value} ranks are outside 2 to {most}").format(name=name, value=count, most=MOST_RANKS)
                )
        if self.sp and not self.tp:
            raise InputError(_("--sp splits the sequence over the ranks of --tp, which is missing"))
        if not 0 <= self.rank < max(1, self.num_ranks):
            raise InputError(
                _("there is no rank {rank} of {ranks}").format(rank=self.rank, ranks=max(1, self.num_ranks)),
                remedy=_("ranks are numbered from 0"),
            )

    def stated(self, *names: str) -> tuple[str, ...]:
        """Return those of the names whose values are not the defaults."""
        usual = TraceJob()

        def same(value: object) -> object:
            return DTYPES.get(value, value) if isinstance(value, str) else value

        return tuple(name for name in names if same(getattr(self, name)) != same(getattr(usual, name)))

    @property
    def num_ranks(self) -> int:
        """Ranks of the process group, 0 without one."""
        if self.fsdp and self.tp:
            return self.fsdp * self.tp
        return self.fsdp or self.ddp or self.world or self.tp

    @property
    def implementation(self) -> str:
        """Return the implementation of the optimizer step.

        Source: transformers@5.23.0:training_args.py (adamw_torch_fused); torch@2.13.0:torch/optim/optimizer.py:
            _default_to_fused_or_foreach (foreach on CUDA).
        """
        return self.optimizer_impl or ("fused" if self.engine == "hf" and self.optimizer == "adamw" else "foreach")

    @property
    def clips(self) -> bool:
        """Say whether gradients are clipped. Source: transformers@5.23.0:training_args.py (max_grad_norm 1.0)."""
        return self.engine == "hf" if self.clip is None else self.clip


def parse_lora(text: str) -> LoraOptions:
    """Read ``r=16,alpha=32,dropout=0.05,targets=q_proj+v_proj``.

    Raises:
        InputError: an unknown word or a value that is no number.
    """
    values: dict[str, object] = {}
    for part in text.split(","):
        key, equals, value = part.strip().partition("=")
        try:
            if key in ("r", "rank", "alpha") and equals:
                values["r" if key == "rank" else key] = int(value)
            elif key == "dropout" and equals:
                values[key] = float(value)
            elif key == "targets" and value:
                values[key] = tuple(value.split("+"))
            else:
                raise ValueError
        except ValueError:
            raise InputError(
                _("{part!r} is not an option of adapters").format(part=part[:40]),
                remedy="r=16,alpha=32,targets=q_proj+v_proj",
            ) from None
    found = LoraOptions(**values)  # type: ignore[arg-type]
    if not 1 <= found.r <= 65536 or not 0 <= found.dropout < 1:
        raise InputError(
            _("the rank {r} or dropout {dropout} of the adapters is impossible").format(
                r=found.r, dropout=found.dropout
            )
        )
    return found
