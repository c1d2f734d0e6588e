"""Which program a command starts, and how its trainers spell the micro-batch and the accumulation.

Sources of the spellings and defaults: transformers@5.23.0:training_args.py:TrainingArguments (batch 8, accumulation 1);
megatron-lm core_r0.14:megatron/training/arguments.py (micro-batch required, global batch = micro x data parallel where
none is given); torchtitan@v0.2.0:torchtitan/config/job_config.py (local 8, global -1 = local x data parallel);
litgpt@v0.5.11:litgpt/args.py:TrainArgs (accumulation follows from the global batch); torchtune@v0.6.1:recipes/configs;
llamafactory@v0.9.3:src/llamafactory/hparams/parser.py:read_args (settings after the file win).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ullage.guard.run.words import Words

_ENGINE_MODULES = {
    "vllm": ("vllm.entrypoints.",),
    "sglang": ("sglang.launch_server", "sglang.srt.server"),
}
_LLAMA = re.compile(r"(?:^|/)(?:llama-(?:server|cli|bench|run)|llama-mtmd-cli|ik_llama-server)$")
_LAUNCHERS = ("torchrun", "accelerate", "deepspeed", "torch.distributed.run", "torch.distributed.launch")


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """How a family of trainers is told its step.

    Attributes:
        micro: spellings of the samples per device and pass; ``micro_default`` where the trainer has one.
        accumulation: spellings of the passes per step; empty where a global batch decides it.
        whole: spellings of the global batch.
        recompute: the words that switch recompute on, each ``(spellings, flag, value)``.
    """

    name: str
    micro: tuple[str, ...]
    micro_flag: str
    micro_default: int | None = None
    accumulation: tuple[str, ...] = ()
    accumulation_flag: str = ""
    accumulation_default: int = 1
    whole: tuple[str, ...] = ()
    recompute: tuple[tuple[tuple[str, ...], str, str], ...] = ()


_HF_RECOMPUTE = ((("gradient_checkpointing",), "--gradient_checkpointing", "True"),)
TRAINERS = (
    Trainer(
        name="hf_trainer",
        micro=("per_device_train_batch_size", "per_gpu_train_batch_size"),
        micro_flag="--per_device_train_batch_size",
        micro_default=8,
        accumulation=("gradient_accumulation_steps",),
        accumulation_flag="--gradient_accumulation_steps",
        recompute=_HF_RECOMPUTE,
    ),
    Trainer(
        name="megatron",
        micro=("micro_batch_size",),
        micro_flag="--micro-batch-size",
        whole=("global_batch_size",),
        recompute=(
            (("recompute_granularity",), "--recompute-granularity", "full"),
            (("recompute_method",), "--recompute-method", "uniform"),
            (("recompute_num_layers",), "--recompute-num-layers", "1"),
        ),
    ),
    Trainer(
        name="torchtitan",
        micro=("training.local_batch_size", "training.batch_size"),
        micro_flag="--training.local_batch_size",
        whole=("training.global_batch_size",),
        recompute=((("activation_checkpoint.mode",), "--activation_checkpoint.mode", "full"),),
    ),
    Trainer(
        name="litgpt",
        micro=("train.micro_batch_size",),
        micro_flag="--train.micro_batch_size",
        whole=("train.global_batch_size",),
    ),
    Trainer(
        name="torchtune",
        micro=("batch_size",),
        micro_flag="batch_size=",
        accumulation=("gradient_accumulation_steps",),
        accumulation_flag="gradient_accumulation_steps=",
        recompute=((("enable_activation_checkpointing",), "enable_activation_checkpointing=", "True"),),
    ),
    Trainer(
        name="script",
        micro=("micro_batch", "micro_batch_size", "batch_size", "batch_size_per_gpu", "micro_bs"),
        micro_flag="--micro_batch",
        accumulation=("gradient_accumulation_steps", "grad_accum", "accumulation_steps", "grad_accum_steps",
                      "accum_steps", "accumulate_grad_batches"),
        accumulation_flag="--gradient_accumulation_steps",
    ),
)  # fmt: skip


def engine_of(words: Sequence[str]) -> str:
    """Return the serving engine that a command starts: ``vllm``, ``sglang``, ``llamacpp``, or nothing."""
    for index, word in enumerate(words[:12]):
        for engine, modules in _ENGINE_MODULES.items():
            if word.startswith(modules):
                return engine
        name = word.rpartition("/")[2]
        if name in ("vllm", "sglang") and "serve" in words[index + 1 : index + 2]:
            return name
        if _LLAMA.search(word):
            return "llamacpp"
    return ""


def engine_line(words: Sequence[str]) -> list[str]:
    """Return the command from the engine's own words on: launchers and wrappers before it are left out."""
    for index, word in enumerate(words):
        name = word.rpartition("/")[2]
        modules = any(word.startswith(found) for found in _ENGINE_MODULES.values())
        if modules:
            return ["python", "-m", *words[index:]]
        if name in ("vllm", "sglang") or _LLAMA.search(word):
            return [name, *words[index + 1 :]]
    return list(words)


def trainer_of(words: Sequence[str]) -> Trainer | None:
    """Return the family of trainers whose flags a command gives, None where no step can be told from its words."""
    for trainer in TRAINERS:
        line = Words(words, assignments=trainer.name == "torchtune")
        if trainer.name == "torchtune":
            if "tune" in {word.rpartition("/")[2] for word in words[:3]} and line.find(trainer.micro):
                return trainer
            continue
        given = line.find(trainer.micro) is not None
        steered = line.find(trainer.accumulation) is not None or line.find(trainer.whole) is not None
        if trainer.name == "script":
            if given and line.find(trainer.accumulation) is not None:
                return trainer
        elif given or (steered and trainer.name != "hf_trainer"):
            return trainer
    return None


def llama_factory_file(words: Sequence[str]) -> Path | None:
    """Return the settings file of a ``llamafactory-cli train FILE`` line."""
    for index, word in enumerate(words[:-2]):
        if word.rpartition("/")[2] in ("llamafactory-cli", "lmf") and words[index + 1] == "train":
            path = Path(words[index + 2])
            return path if path.suffix in (".yaml", ".yml", ".json") and path.is_file() else None
    return None


def launcher_retries(words: Sequence[str]) -> int:
    """Return how often a launcher would itself start the same command line again."""
    names = {word.rpartition("/")[2] for word in words[:6]}
    if not names & set(_LAUNCHERS):
        return 0
    return Words(words).whole(("max_restarts",)) or 0
