"""What Megatron-LM takes when a flag is not given, and the few flags that decide kernels.

Mirrors Megatron-LM@adc69db (October 2025) to @d98e8a6 (August 2026) and Transformer Engine 2.8 to 2.11.
"""

from __future__ import annotations

from dataclasses import field
from typing import Literal, overload

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec.training import TrainingJob
from ullage.units import MiB

VERSIONS = ("adc69db", "d98e8a6")

#: Where master weights are not Transformer Engine's: on the host, or in FSDP's own buffers.
_MASTERS_APART = frozenset({"optimizer-cpu-offload", "use-megatron-fsdp", "use-torch-fsdp2"})

Kernel = Literal["flash", "fused", "unfused", "local"]


class Settings(Frozen):
    """A job's Megatron-LM settings with every default filled in.

    Attributes:
        transformer_engine: layers of Transformer Engine; False: ``--transformer-impl local``.
        attention: flash-attn, cuDNN's fused kernel, Transformer Engine's unfused, or Megatron's local one.
        fused_loss: ``native`` (torch.compile), ``te`` (Triton, in place), or None.
        decoupled_gradients: the optimizer works on 16-bit gradients without a copy in fp32.
        master: format of master weights; ``int16``: what a bf16 parameter lacks of fp32.
        second_moment: format of Adam's second moment.
        wgrad_fusion: weight gradients are accumulated into the main gradient by the GEMM.
        cublas_workspace_bytes: of one PyTorch cuBLAS workspace (handle and stream).
        te_workspace_bytes: of one Transformer Engine cuBLAS workspace.
        flags: every flag kept on the job.
    """

    transformer_engine: bool
    attention: Kernel
    attention_sure: bool
    hidden_dropout: float
    attention_dropout: float
    fused_activation: bool
    fused_loss: Literal["native", "te"] | None
    wgrad_fusion: bool
    distributed_optimizer: bool
    overlap_grad_reduce: bool
    grouped_gemm: bool
    dispatcher: Literal["alltoall", "allgather", "flex"]
    capacity_factor: float | None
    decoupled_gradients: bool
    master: str
    second_moment: str
    fp8_param_gather: bool
    cublas_workspace_bytes: int
    te_workspace_bytes: int
    flags: dict[str, str] = field(default_factory=dict, compare=False)

    def on(self, name: str) -> bool:
        """Say whether a switch is set."""
        return self.flags.get(name, "").lower() in ("true", "1", "yes")

    def count(self, name: str, default: int) -> int:
        """Return a whole number, checked by the reader."""
        text = self.flags.get(name, "")
        if text and not text.isdigit():
            raise InputError(_("--{name} needs a whole number, not {text!r}").format(name=name, text=text[:40]))
        return int(text) if text else default


def resolve(job: TrainingJob) -> tuple[Settings, tuple[str, ...]]:
    """Fill in the defaults; the sentences say what was assumed.

    A job without a command line takes what Megatron-LM's recipes for large models set: no dropout, Transformer Engine,
    fused loss as stated, alltoall dispatch with grouped GEMM.
    """
    flags = dict(job.flags)
    native = flags.get("native") == "true"
    on = {name for name, value in flags.items() if value.lower() in ("true", "1", "yes")}
    engine = flags.get("transformer-impl", "transformer_engine") != "local" and flags.get("spec") != "local"
    kernel, sure = _attention(job, flags, engine)
    assumed = [] if sure else [_("attention kernel: {kernel}, as Transformer Engine chooses").format(kernel=kernel)]
    capability = job.machine.gpu.compute_capability or (9, 0)
    dropout = 0.1 if native else 0.0
    return Settings(
        transformer_engine=engine,
        attention=kernel,
        attention_sure=sure,
        hidden_dropout=_number(flags, "hidden-dropout", dropout),
        attention_dropout=_number(flags, "attention-dropout", dropout),
        fused_activation=_fused_activation(job, on),
        fused_loss=_fused_loss(job, flags),
        wgrad_fusion="no-gradient-accumulation-fusion" not in on,
        distributed_optimizer=job.parallel.zero_stage >= 1,
        overlap_grad_reduce="overlap-grad-reduce" in on,
        grouped_gemm="moe-grouped-gemm" in on or not native,
        dispatcher=_dispatcher(flags, native),
        capacity_factor=_number(flags, "moe-expert-capacity-factor", None),
        decoupled_gradients=_decoupled(job, flags, on),
        master=_master(job, flags, on),
        second_moment=_second_moment(job, flags, on),
        fp8_param_gather="fp8-param-gather" in on,
        cublas_workspace_bytes=cublas_workspace(flags.get("env.CUBLAS_WORKSPACE_CONFIG", ""), capability),
        te_workspace_bytes=32 * MiB + 1024 if capability >= (9, 0) else 4 * MiB,
        flags=flags,
    ), tuple(assumed)


@overload
def _number(flags: dict[str, str], name: str, default: float) -> float: ...
@overload
def _number(flags: dict[str, str], name: str, default: None) -> float | None: ...
def _number(flags: dict[str, str], name: str, default: float | None) -> float | None:
    """Return a flag's number between 0 and 1,000."""
    text = flags.get(name, "")
    if not text:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1000:
        raise InputError(_("--{name} needs a number from 0 to 1000, not {text!r}").format(name=name, text=text[:40]))
    return value


def _dispatcher(flags: dict[str, str], native: bool) -> Literal["alltoall", "allgather", "flex"]:
    given = flags.get("moe-token-dispatcher-type") or ("allgather" if native else "alltoall")
    if given in ("alltoall", "alltoall_seq"):
        return "alltoall"
    return "flex" if given == "flex" else "allgather"


def _decoupled(job: TrainingJob, flags: dict[str, str], on: set[str]) -> bool:
    """Transformer Engine's Adam holds the master weights and takes gradients as they are.

    Not with FP8 of current scales and fp32 master weights, which Megatron-LM holds itself.
    Source: Megatron-LM@d98e8a6:megatron/core/optimizer/optimizer_config.py
        (use_precision_aware_optimizer_no_fp8_or_ds_fp8).
    """
    if flags.get("native") != "true":
        return job.precision.moments != "float32"
    own = job.precision.fp8_recipe not in (None, "delayed") and job.precision.master == "float32"
    return "use-precision-aware-optimizer" in on and (not own or "optimizer-cpu-offload" in on)


def _master(job: TrainingJob, flags: dict[str, str], on: set[str]) -> str:
    """Format of master weights: of fp32 beside bf16 parameters only the 16 bits are kept that those lack.

    Source: Megatron-LM@d98e8a6:megatron/core/optimizer/optimizer_config.py (store_param_remainders);
        TransformerEngine@v2.8:transformer_engine/pytorch/optimizers/fused_adam.py:FusedAdam.
    """
    master = job.precision.master or "float32"
    remainders = flags.get("native") == "true" and _decoupled(job, flags, on) and not on & _MASTERS_APART
    return "int16" if remainders and master == "float32" and job.precision.params == "bfloat16" else master


def _second_moment(job: TrainingJob, flags: dict[str, str], on: set[str]) -> str:
    """Format of Adam's second moment, where it is given apart from the first."""
    given = flags.get("exp-avg-sq-dtype", "")
    if flags.get("native") != "true" or "use-precision-aware-optimizer" not in on:
        return job.precision.moments
    return {"bf16": "bfloat16", "fp16": "float16", "fp8": "float8_e4m3"}.get(given, "float32")


def _fused_loss(job: TrainingJob, flags: dict[str, str]) -> Literal["native", "te"] | None:
    """``--cross-entropy-loss-fusion`` is native unless ``--cross-entropy-fusion-impl te`` is given."""
    if job.loss not in ("fused", "liger", "chunked"):
        return None
    return "te" if flags.get("cross-entropy-fusion-impl") == "te" else "native"


def _fused_activation(job: TrainingJob, on: set[str]) -> bool:
    """Fused bias with GeLU or SwiGLU is on by default; GeLU's needs a bias."""
    gated = any(getattr(block, "gated", False) for layer in job.model.layers for block in layer.ffns)
    return "no-bias-swiglu-fusion" not in on if gated else "no-bias-gelu-fusion" not in on


def cublas_workspace(config: str, capability: tuple[int, int]) -> int:
    """Bytes of one PyTorch cuBLAS workspace: one per thread's handle and stream.

    Formula: sum of size x count over ``:size:count`` pairs, size in KiB; else 32 MiB from Hopper on, 8.125 MiB before.
    Source: pytorch@2.9:aten/src/ATen/cuda/CublasHandlePool.cpp:parseChosenWorkspaceSize. Known error: before PyTorch
    2.8 Blackwell took 8.125 MiB.
    """
    sizes = [part for part in config.split(":") if part]
    if sizes and len(sizes) % 2 == 0 and all(part.isdigit() and len(part) < 9 for part in sizes):
        return sum(int(size) * int(times) * 1024 for size, times in zip(sizes[::2], sizes[1::2], strict=True))
    return 32 * MiB if capability >= (9, 0) else 8 * MiB + 128 * 1024


def _attention(job: TrainingJob, flags: dict[str, str], engine: bool) -> tuple[Kernel, bool]:
    """The attention kernel, and whether that is certain.

    Left to itself, Transformer Engine takes cuDNN's kernel from Hopper on and flash-attn before; where only
    deterministic kernels are allowed, cuDNN's backward drops out on Ampere and on Blackwell.

    Source: TransformerEngine@v2.8:transformer_engine/pytorch/attention/dot_product_attention/utils.py:
    get_attention_backend.
    """
    if not engine:
        return "local", True
    backend = flags.get("attention-backend", "auto")
    named: dict[str, Kernel] = {"flash": "flash", "fused": "fused", "unfused": "unfused", "local": "local"}
    if backend in named:
        return named[backend], True
    if backend == "auto" and flags.get("native") != "true" and job.attention is not None:
        given: dict[str, Kernel] = {"flash": "fused", "sdpa": "fused", "eager": "unfused", "unfused": "unfused"}
        return given[job.attention], job.attention != "flash"
    capability = job.machine.gpu.compute_capability or (9, 0)
    deterministic = flags.get("env.NVTE_ALLOW_NONDETERMINISTIC_ALGO") == "0" or flags.get("deterministic-mode")
    if capability < (9, 0) or (deterministic and capability >= (10, 0)):
        return "flash", False
    return "fused", False
