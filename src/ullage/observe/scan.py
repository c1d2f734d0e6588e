"""One pass over a log: facts of deaths, figures of engines, and hints on which program ran and what it was doing."""

from __future__ import annotations

import re

from ullage.frozen import Frozen
from ullage.observe import engine_logs, oom_engines, oom_others, oom_outside, oom_patterns, training_logs
from ullage.observe.oom import Fact, Gatherer
from ullage.observe.streams import Readable, rank_of, read_lines

_TRIGGERS = (
    *oom_patterns.WORDS,
    *oom_engines.WORDS,
    *oom_others.WORDS,
    *oom_outside.WORDS,
    "MPS allocated",
)
_TRACEBACK = "Traceback (most recent call last)"
_WORDS = (*_TRIGGERS, *engine_logs.WORDS, *engine_logs.SETTING_WORDS, *training_logs.WORDS, _TRACEBACK)
_FRAME = re.compile(r'File "([^"]{1,400})", line \d+, in (\S{1,80})')
#: What a frame of a traceback says about the moment, the surest first.
_PHASES: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "optimizer step",
        re.compile(r"optim\S*#(?:step|_init_group|_?\w*adam\w*|_step)$|#_?optimizer_step$|#step_optimizer$"),
    ),
    ("graph capture", re.compile(r"#\w*capture\w*$")),
    ("kv cache", re.compile(r"#(?:_?allocate_kv_cache\w*|initialize_kv_cache\w*|init_memory_pool|_create_buffers)$")),
    ("profiling", re.compile(r"#(?:profile_run|_dummy_run|determine_(?:available_memory|num_available_blocks))$")),
    ("loss", re.compile(r"#(?:\w*cross_entropy\w*|log_softmax|ForCausalLMLoss|compute_logits|_get_logits)$")),
    ("backward", re.compile(r"#(?:backward|_engine_run_backward|run_backward)$")),
    (
        "load",
        re.compile(r"#(?:load_weights|load_model|from_pretrained|\w*load_state_dict|create_weights|load_checkpoint)$"),
    ),
)
#: Which program: by the paths of frames, and by words of its own.
_PROGRAMS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "vllm",
        re.compile(r"[/\\]vllm[/\\]|EngineCore|VllmWorker|RayWorkerWrapper|worker_base\.py:\d|\bvllm-\d|vllm serve"),
    ),
    (
        "sglang",
        re.compile(r"[/\\]sglang[/\\]|Capture cuda graph failed|--mem-fraction-static|^(?:[DPTE]P\d{1,6} )|sglang\.l"),
    ),
    ("tensorrt-llm", re.compile(r"\bTRT-LLM\b|TensorRT-LLM|[/\\]tensorrt_llm[/\\]")),
    ("text-generation-inference", re.compile(r"Unable to warmup model|text[-_]generation[-_](?:server|launch)")),
    ("deepspeed", re.compile(r"[/\\]deepspeed[/\\]|\[deepspeed\]|DeepSpeed info")),
    ("megatron", re.compile(r"[/\\]megatron[/\\]|Megatron")),
    ("torchtitan", re.compile(r"[/\\]torchtitan[/\\]")),
    ("torchtune", re.compile(r"[/\\]torchtune[/\\]")),
    ("litgpt", re.compile(r"[/\\]litgpt[/\\]")),
    ("lightning", re.compile(r"[/\\](?:pytorch_)?lightning[/\\]")),
    ("hf_trainer", re.compile(r"[/\\]trl[/\\]|transformers[/\\]trainer|[/\\]llamafactory[/\\]|[/\\]axolotl[/\\]")),
    ("accelerate", re.compile(r"[/\\]accelerate[/\\]")),
)  # fmt: skip
#: Words of which one stands in every text that a pattern above finds.
_PROGRAM_WORDS = (
    "vllm", "EngineCore", "Worker", "worker_base", "sglang", "Capture cuda graph", "--mem-fraction", "TP", "DP", "EP",
    "TRT-LLM", "ensor", "Unable to warmup", "text-generation", "text_generation", "eepspeed", "eepSpeed", "egatron",
    "torchtitan", "torchtune", "litgpt", "lightning", "trl", "trainer", "llamafactory", "axolotl", "accelerate",
)  # fmt: skip
SERVING = ("vllm", "sglang", "tensorrt-llm", "text-generation-inference", "llama.cpp", "ollama")


class Scan(Frozen):
    """What was found. ``phases`` and ``programs`` are keyed by speaker and counted over the log."""

    facts: tuple[Fact, ...]
    collected: engine_logs.Collected
    training: training_logs.Collected
    programs: tuple[tuple[str, int], ...]
    phases: tuple[tuple[str, str], ...]
    num_lines: int
    num_dropped: int = 0
    first_words: str = ""

    def program(self) -> str:
        """Return the program that the log names most often, empty when it names none."""
        return max(self.programs, key=lambda pair: pair[1], default=("", 0))[0]

    def phase(self, rank: str) -> str:
        """Return what a rank was doing when it failed."""
        known = dict(self.phases)
        return known.get(rank, "" if rank else next(iter(known.values()), ""))


class _Hints:
    """Programs and phases, while lines go by."""

    def __init__(self) -> None:
        self.programs: dict[str, int] = {}
        self.phases: dict[str, tuple[int, str]] = {}

    def take(self, rank: str, text: str, raw: str) -> None:
        if _TRACEBACK in text:
            self.phases.pop(rank, None)
        if any(map(raw.__contains__, _PROGRAM_WORDS)):
            for name, pattern in _PROGRAMS:
                if pattern.search(raw):
                    self.programs[name] = self.programs.get(name, 0) + 1
                    break
        frame = _FRAME.search(text)
        if frame is None:
            return
        place = f"{frame.group(1)}#{frame.group(2)}"
        for order, (phase, pattern) in enumerate(_PHASES):
            if pattern.search(place) and order <= self.phases.get(rank, (len(_PHASES), ""))[0]:
                self.phases[rank] = (order, phase)


def match_window(window: str) -> list[Fact]:
    """Return all facts of a window of lines."""
    torch = list(oom_patterns.match_torch(window))
    engines = list(oom_engines.match_engines(window))
    others = list(oom_others.match_others(window)) if not torch and not engines else []
    outside = list(oom_outside.match_outside(window))
    if torch or engines or others:  # the same death in the words of the layer below
        outside = [fact for fact in outside if fact.detail("library") != "driver"]
    return [*torch, *engines, *others, *outside]


def scan(stream: Readable) -> Scan:
    """Read a log once, in bounded memory."""
    gatherer, collected, hints = Gatherer(_TRIGGERS, match_window), engine_logs.Collected(), _Hints()
    training = training_logs.Collected()
    number, first_words = 0, ""
    for line in read_lines(stream, _WORDS):
        rank = rank_of(line.speaker)
        gatherer.take(line.number, line.speaker, rank, line.text, marked=line.marked)
        if line.marked:
            collected.take(line.number, rank, line.text)
            if any(map(line.text.__contains__, training_logs.WORDS)):
                training.take(line.number, rank, line.text)
        if line.marked or 'File "' in line.text:
            hints.take(rank, line.text, f"{line.speaker} {line.text}")
        number = line.number
        first_words = first_words or line.text.strip()[:120]
    facts = gatherer.finish(rank_of)
    return Scan(
        facts=tuple(facts),
        collected=collected,
        training=training,
        programs=tuple(hints.programs.items()),
        phases=tuple((rank, phase) for rank, (_order, phase) in hints.phases.items()),
        num_lines=number,
        num_dropped=gatherer.num_dropped,
        first_words=first_words,
    )
