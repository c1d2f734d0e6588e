"""What to change, cheapest first, with what it gains where the arithmetic tells.

A piece of advice is words for a person, flags for a shell, and the bytes it frees or gives; 0 bytes stand for "not
known from this text". Directions matter: vLLM's share goes up when the KV cache is too small at the start and down when
a forward pass or another process needs room; SGLang's static fraction likewise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.observe.books import Books, books_of
from ullage.observe.oom import Fact
from ullage.observe.scan import SERVING
from ullage.observe.verdict import MATERIAL_SHARE, Finding
from ullage.units import cdiv, format_bytes

#: Who holds a card, per kind of chip.
_WHO = {"NPU": "npu-smi info", "HIP": "rocm-smi --showpids"}
_WHO_CUDA = "nvidia-smi --query-compute-apps=pid,used_memory --format=csv"
_HUGGING_FACE = ("hf_trainer", "accelerate", "deepspeed")
#: A request above this share of a card is one tensor worth looking at.
GREAT_SHARE = 0.25


class Piece(Frozen):
    """One change: what to do, the flags, what it gains and what it costs."""

    change: str
    flags: str = ""
    gain_bytes: int = 0
    cost: str = ""


class Case(Frozen):
    """All that advice depends on."""

    fact: Fact
    finding: Finding
    program: str
    phase: str
    settings: dict[str, str]

    @property
    def books(self) -> Books:
        """The card's books, for failed allocations of PyTorch."""
        return books_of(self.fact)

    @property
    def serving(self) -> bool:
        """Whether an engine was serving."""
        return self.program in SERVING or self.fact.framework in SERVING


def advise(case: Case) -> tuple[Piece, ...]:
    """Return advice for a case, the first being the one to try first."""
    from ullage.observe import advice_engines

    rules: dict[str, Callable[[Case], Iterable[Piece]]] = {
        "fragmentation": _fragmentation,
        "waiting": _waiting,
        "other_process": _other_process,
        "cap": _cap,
        "outside": _outside,
        "host": _host,
        "cascade": _cascade,
        "kv_pool": advice_engines.kv_pool,
        "start_budget": advice_engines.start_budget,
        "capacity": _capacity,
    }
    found: list[Piece] = []
    for piece in rules[case.finding.cause](case):
        if piece.change not in {known.change for known in found}:
            found.append(piece)
    return tuple(found)


def alloc_conf(case: Case) -> Piece | None:
    """Return the allocator setting against pieces that the version knows, none when it is set already."""
    if "expandable_segments:True" in case.settings.get("alloc_conf", ""):
        return None
    chip, versions, pieces = case.fact.detail("chip"), case.fact.versions, case.books.unallocated
    cost = _("none to speed that is known; not together with CUDA IPC of old versions, and not on Windows")
    if chip in ("XPU", "MPS", "MUSA", "MLU") or versions == "1.0-1.3":  # they have no such setting
        return None
    old = versions.startswith("1.")
    if chip == "NPU":
        flags = "PYTORCH_NPU_ALLOC_CONF=expandable_segments:True"
    elif old:
        change = _("let the allocator not split large blocks (from PyTorch 2.1 on: expandable_segments:True)")
        return Piece(
            change=change,
            flags="PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:128",
            gain_bytes=pieces,
            cost=_("slower when blocks of many sizes come and go"),
        )
    else:
        flags = "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        if versions == "2.9+":
            flags = "PYTORCH_ALLOC_CONF=expandable_segments:True " + flags
    return Piece(change=_("let segments grow, so that pieces join"), flags=flags, gain_bytes=pieces, cost=cost)


def smaller_step(case: Case) -> list[Piece]:
    """Return the changes that make a training step, or a forward pass, smaller."""
    from ullage.observe import advice_engines

    if case.serving:
        return list(advice_engines.smaller_pass(case))
    found = []
    asked, capacity = case.books.requested, case.books.capacity
    if capacity and asked >= GREAT_SHARE * capacity:
        found.append(
            Piece(
                change=_(
                    "a single request of {asked}: use flash or fused attention instead of eager scores, and a chunked "
                    "loss; then a smaller batch or shorter sequence"
                ).format(asked=format_bytes(asked)),
                flags="attn_implementation=flash_attention_2" if case.program in _HUGGING_FACE else "",
                cost=_("none; usually faster"),
            )
        )
    batch = Piece(
        change=_("a smaller micro-batch, with gradient accumulation so that the global batch stays"),
        flags=_batch_flags(case.program),
        cost=_("smaller kernels, somewhat slower"),
    )
    recompute = Piece(
        change=_("recompute activations in the backward pass"),
        flags=_recompute_flags(case.program),
        cost=_("about a third more computation"),
    )
    states = Piece(
        change=_("share or move the optimizer states: ZeRO or FSDP over the ranks, 8-bit states, or the host's memory"),
        flags=_state_flags(case.program),
        cost=_("communication, or slower optimizer steps"),
    )
    first = [states, batch, recompute] if case.phase == "optimizer step" else [batch, recompute, states]
    if case.phase == "load":
        first = [
            Piece(
                change=_("load fewer bytes per GPU: shards over more GPUs, or quantised weights"),
                cost=_("GPUs, or some accuracy"),
            ),
            *first,
        ]
    return [*found, *first]


def _batch_flags(program: str) -> str:
    return {
        "megatron": "--micro-batch-size 1",
        "deepspeed": '"train_micro_batch_size_per_gpu": 1',
        "torchtitan": "--training.local_batch_size 1",
        "hf_trainer": "--per_device_train_batch_size 1 --gradient_accumulation_steps N",
    }.get(program, "")


def _recompute_flags(program: str) -> str:
    return {
        "megatron": "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        "torchtitan": "--activation_checkpoint.mode full",
        "hf_trainer": "--gradient_checkpointing true",
        "deepspeed": "model.gradient_checkpointing_enable()",
    }.get(program, "")


def _state_flags(program: str) -> str:
    return {
        "megatron": "--use-distributed-optimizer",
        "deepspeed": '"offload_optimizer": {"device": "cpu"}',
        "hf_trainer": "--optim adamw_8bit",
    }.get(program, "")


def _capacity(case: Case) -> list[Piece]:
    from ullage.observe import advice_engines

    if case.fact.kind in ("buffer_oom", "xla_oom"):
        return list(advice_engines.buffers(case))
    found = smaller_step(case)
    books = case.books
    conf = alloc_conf(case)
    fits_together = (books.free or 0) + books.unallocated >= books.requested
    material = books.unallocated >= MATERIAL_SHARE * (books.capacity or 0)
    if conf is not None and books.unallocated and (fits_together or material):
        hopeless = case.finding.confidence == "certain"  # joined pieces would not have been enough
        found.insert(len(found) if hopeless else 1, conf)
    return found


def _fragmentation(case: Case) -> list[Piece]:
    found: list[Piece] = []
    if case.program == "text-generation-inference":
        found = smaller_step(case)[:1]
    conf = alloc_conf(case)
    if conf is not None and case.fact.detail("allocator") != "cudaMallocAsync":
        found.append(conf)
    found += smaller_step(case)[:3]
    return found


def _waiting(case: Case) -> list[Piece]:
    return [
        Piece(change=_("retry once, unchanged: a block that waits for an event is free a moment later")),
        Piece(
            change=_("look who else is on the GPU at that moment"),
            flags=_WHO.get(case.fact.detail("chip"), "nvidia-smi"),
        ),
        Piece(change=_("on Windows and WSL the driver gives less than it shows: leave a tenth of the card free")),
        *smaller_step(case)[:1],
    ]


def _other_process(case: Case) -> list[Piece]:
    found, books = [], case.books
    others = books.others if books.others is not None else books.beyond
    several = len(books.foreign) >= 2 and books.own is not None
    if several or case.fact.detail("ranks"):
        found.append(
            Piece(
                change=_(
                    "give each rank its own GPU: {count} processes share GPU {device} "
                    "(set the device by LOCAL_RANK, or CUDA_VISIBLE_DEVICES per process)"
                ).format(count=len(books.foreign) + 1, device=case.fact.count("device") or 0),
                gain_bytes=others or 0,
                cost=_("none"),
            )
        )
    if case.fact.kind == "xla_oom":
        found.append(
            Piece(
                change=_("end the other process, or let JAX not take the card beforehand"),
                flags="XLA_PYTHON_CLIENT_PREALLOCATE=false",
            )
        )
    elif books.foreign:
        number, amount = books.foreign[0]
        found.append(
            Piece(
                change=_("end process {number}, the largest of the others, or move it away").format(number=number),
                flags=f"kill {number}",
                gain_bytes=amount,
                cost=_("that process"),
            )
        )
    else:
        found.append(
            Piece(
                change=_("see who holds the card, and end it or take another GPU (containers share cards, too)"),
                flags=_WHO.get(case.fact.detail("chip"), _WHO_CUDA),
                gain_bytes=others or 0,
            )
        )
    found.append(Piece(change=_("take a free GPU"), flags="CUDA_VISIBLE_DEVICES=N", cost=_("none")))
    return found + smaller_step(case)[:1]


def _cap(case: Case) -> list[Piece]:
    gap = case.finding.gap_bytes or 0
    if case.fact.detail("chip") == "MPS":
        raised = Piece(
            change=_("raise the share that PyTorch may take of the unified memory"),
            flags="PYTORCH_MPS_HIGH_WATERMARK_RATIO=0.0",
            gain_bytes=gap,
            cost=_("the system may swap or stop"),
        )
        return [*smaller_step(case)[:1], raised]
    fraction = ""
    if case.books.capacity and case.books.limit:
        hundredths = cdiv(100 * (case.books.limit + gap), case.books.capacity)
        fraction = f"{min(hundredths, 100) / 100:.2f}"
    flags = f"per_process_memory_fraction:{fraction}" if fraction else "per_process_memory_fraction"
    raised = Piece(change=_("raise the process's own limit"), flags=flags, gain_bytes=gap, cost=_("less for others"))
    return [raised, *smaller_step(case)]


def _outside(case: Case) -> list[Piece]:
    from ullage.observe import advice_engines

    found = list(advice_engines.leave_room(case))
    if case.fact.detail("library") == "NCCL":
        found.append(
            Piece(
                change=_("let NCCL take less: smaller buffers, fewer channels"),
                flags="NCCL_BUFFSIZE=2097152 NCCL_MAX_NCHANNELS=8",
                cost=_("bandwidth"),
            )
        )
    if not case.serving:
        found += smaller_step(case)[:1]
    return found


def _host(case: Case) -> list[Piece]:
    if case.fact.detail("scope") == "shared memory":
        return [
            Piece(change=_("give the container more shared memory"), flags="docker run --shm-size=16g"),
            Piece(change=_("fewer workers of the data loader"), flags="num_workers=0"),
        ]
    gap = case.finding.gap_bytes or 0
    found = [
        Piece(
            change=_("give the job more host memory (container or job limit), or run fewer processes on the node"),
            gain_bytes=gap,
        ),
        Piece(change=_("fewer workers of the data loader, and no full copy of the weights per rank while loading")),
        Piece(change=_("offload less to the host: optimizer states, parameters, KV cache or CPU layers")),
    ]
    if case.fact.kind == "killed":
        found.insert(0, Piece(change=_("see whether the kernel did it"), flags="dmesg -T | grep -i 'killed process'"))
    if case.fact.framework == "ollama":
        found.insert(0, Piece(change=_("take a smaller model or quantisation, or a shorter context"), gain_bytes=gap))
    return found


def _cascade(_case: Case) -> list[Piece]:
    return [
        Piece(change=_("read the log of the rank that is not among those that waited; it died or fell behind first")),
        Piece(
            change=_("let PyTorch record which rank was where"),
            flags="TORCH_NCCL_TRACE_BUFFER_SIZE=2000 TORCH_NCCL_DUMP_ON_TIMEOUT=1",
        ),
    ]
