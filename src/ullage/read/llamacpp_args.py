"""A command line of llama.cpp, ik_llama.cpp or their tools → flags by one canonical name each.

Read are ``llama-server``, ``llama-cli``, ``llama-bench``, ``llama-sweep-bench``, ``llama-perplexity`` and bare lists of
flags. Flags without influence on memory are known and passed over; one that is not known is an error that names it and
the nearest known ones.

Source: llama.cpp@b7000:common/arg.cpp:common_params_parser_init; ik_llama.cpp@8337e4cd:common/common.cpp:
gpt_params_find_arg (``-mla``, ``-fmoe``, ``-amb``, ``-rtr``, ``-ser`` ...).
"""

from __future__ import annotations

import re
from functools import lru_cache

from ullage.catalog import load
from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.read.shell_line import ShellCommand, image_end, is_unset, split_command, unset_variable

#: Takes two values.
_PAIRED = ("--control-vector-layer-range",)
#: canonical name → spellings of flags that take one value
_VALUED = {
    "model_path": ("-m", "--model"),
    "hf_repo": ("-hf", "-hfr", "--hf-repo"),
    "hf_file": ("-hff", "--hf-file"),
    "n_gpu_layers": ("-ngl", "--n-gpu-layers", "--gpu-layers"),
    "split_mode": ("-sm", "--split-mode"),
    "tensor_split": ("-ts", "--tensor-split"),
    "main_gpu": ("-mg", "--main-gpu"),
    "max_gpu": ("--max-gpu",),
    "override_tensor": ("-ot", "--override-tensor"),
    "n_cpu_moe": ("-ncmoe", "--n-cpu-moe"),
    "device": ("-dev", "--device"),
    "n_ctx": ("-c", "--ctx-size"),
    "n_batch": ("-b", "--batch-size"),
    "n_ubatch": ("-ub", "--ubatch-size"),
    "parallel": ("-np", "--parallel"),
    "cache_type_k": ("-ctk", "--cache-type-k"),
    "cache_type_v": ("-ctv", "--cache-type-v"),
    "mla": ("-mla", "--mla-use"),
    "attn_max_batch": ("-amb", "--attention-max-batch"),
    "smart_expert_reduction": ("-ser", "--smart-expert-reduction"),
    "fit_target": ("-fitt", "--fit-target"),
    "fit_ctx": ("-fitc", "--fit-ctx"),
    "n_cpu_ffn": ("-ncffn", "--n-cpu-ffn"),
    "model_url": ("-mu", "--model-url"),
    "draft_model": (
        "-hfd",
        "-hfrd",
        "--hf-repo-draft",
        "--spec-draft-hf",
        "--spec-draft-model",
        "-md",
        "--model-draft",
    ),
    "speculation": ("--spec-type",),
    "draft_ctx": ("-cd", "--ctx-size-draft"),
    "draft_gpu_layers": ("-ngld", "--spec-draft-ngl", "--gpu-layers-draft", "--n-gpu-layers-draft"),
    "mmproj": ("-mmu", "--mmproj-url", "-mm", "--mmproj"),
    "mmproj_device": ("-mmdev", "--mmproj-device"),
    "lora": ("--lora-scaled", "--lora"),
    "control_vector": ("--control-vector-scaled", "--control-vector"),
    "control_vector_layers": _PAIRED,
    "indexer_cache": ("-ictk", "--indexer-cache-type-k"),
    "cache_of_some_layers": (
        *("-ctk-first", "--cache-type-k-first", "-ctk-last", "--cache-type-k-last"),
        *("-ctv-first", "--cache-type-v-first", "-ctv-last", "--cache-type-v-last"),
    ),
    "kv_unified_per_slot": ("--kv-unified-per-slot",),
    "rpc": ("--rpc",),
    "worst_graph_tokens": ("-wgt", "--worst-graph-tokens"),
}
#: canonical name → spellings of flags without a value
_SWITCHES = {
    "cpu_moe": ("-cmoe", "--cpu-moe"),
    "kv_unified": ("-kvu", "--kv-unified"),
    "no_kv_unified": ("-no-kvu", "--no-kv-unified"),
    "no_flash_attn": ("-no-fa", "--no-flash-attn"),
    "no_kv_offload": ("-nkvo", "--no-kv-offload"),
    "swa_full": ("--swa-full",),
    "no_op_offload": ("--no-op-offload", "-nopo"),
    "fused_moe": ("-fmoe", "--fused-moe"),
    "no_fused_moe": ("-no-fmoe", "--no-fused-moe"),
    "run_time_repack": ("-rtr", "--run-time-repack"),
    "no_mmap": ("--no-mmap",),
    "mlock": ("--mlock",),
    "embedding": ("--embedding", "--embeddings"),
    "multi_token_prediction": ("-mtp", "--multi-token-prediction"),
    "no_multi_token_prediction": ("-no-mtp", "--no-multi-token-prediction"),
    "mmproj_on_host": ("--no-mmproj-offload",),
    "mmproj_on_device": ("--mmproj-offload", "--mmproj-auto"),
    "no_mmproj": ("--no-mmproj", "--no-mmproj-auto"),
    "kv_offload": ("-kvo", "--kv-offload"),
    "op_offload": ("--op-offload",),
    "sparse_attention": ("-dsa", "--dsa"),
    "graph_split": ("-smgs", "--split-mode-graph-scheduling"),
    "expert_prefetch": ("--defer-experts", "--prefetch-experts"),
    "swa_compress": ("--swa-compress",),
}
#: flags that may stand alone or before a value: ``-fa``, ``-fa on``, ``-fa 1``
_MAYBE = {"flash_attn": ("-fa", "--flash-attn"), "fit": ("-fit", "--fit")}
_PROGRAMS = ("llama-", "main", "server", "ollama", "ik_llama")
#: Words after a flag that may stand alone.
_CHOICES = ("0", "1", "on", "off", "auto", "true", "false")

#: Canonical names of what takes memory of a device and is not counted.
NOT_COUNTED = (
    "lora",
    "control_vector",
    "mmproj",
    "rpc",
    "draft_model",
    "multi_token_prediction",
    "indexer_cache",
    "cache_of_some_layers",
    "graph_split",
    "expert_prefetch",
    "kv_unified_per_slot",
)
#: Ways to speculate that need no weights.
_FREE_SPECULATION = ("ngram", "none", "suffix")


@lru_cache(maxsize=1)
def _known() -> dict[str, tuple[str, str]]:
    """Return every spelling with its kind and canonical name; without a name: no influence on memory."""
    found: dict[str, tuple[str, str]] = {}
    harmless = load("engines/llamacpp_flags.json")
    for kind, key in (("value", "valued"), ("switch", "switches"), ("loose", "maybe")):
        found.update(dict.fromkeys(harmless[key], (kind, "")))
    for kind, table in (("value", _VALUED), ("switch", _SWITCHES), ("maybe", _MAYBE)):
        for name, words in table.items():
            found.update(dict.fromkeys(words, (kind, name)))
    return found


class LlamaCommand(Frozen):
    """A command line as understood.

    Attributes:
        program: its name without folders, empty where the line is flags alone.
        flags: canonical name and value as typed, repeated flags in order.
        environment: what stands before the program.
        visible_gpus: devices that the line leaves, None where it says nothing.
    """

    program: str
    flags: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...] = ()
    visible_gpus: int | None = None

    def last(self, name: str) -> str | None:
        """Return the value of the last flag called ``name``: a later flag wins."""
        return next((value for key, value in reversed(self.flags) if key == name), None)


def parse_command(line: str) -> LlamaCommand:
    """Parse a command line.

    Raises:
        InputError: quotes do not match, a flag is not known, or a value is missing.
    """
    command = split_command(line, after_program)
    words = list(command.words)
    flags: list[tuple[str, str]] = []
    at = 0
    while at < len(words):
        at = _one_flag(words, at, flags)
    return LlamaCommand(
        program=command.program,
        flags=tuple(flags),
        environment=command.environment,
        visible_gpus=_devices(flags, command),
    )


def after_program(words: list[str]) -> int | None:
    """Return where the flags begin: after the program, or after the image of a container."""
    for at, word in enumerate(words):
        if word.startswith("-") and words[0] not in ("docker", "podman", "nerdctl", "numactl", "taskset", "sudo"):
            break
        base = re.split(r"[/\\]", word)[-1]
        if "=" not in word and base.startswith(_PROGRAMS) and ":" not in base and "." not in base.removesuffix(".exe"):
            return at + 1
    return image_end(words)


def _devices(flags: list[tuple[str, str]], command: ShellCommand) -> int | None:
    """Return how many devices ``-dev`` or the environment leave (None: all)."""
    named = next((value for name, value in reversed(flags) if name == "device"), None)
    if named is None:
        return command.visible_gpus
    return len([part for part in named.split(",") if part.strip() and part.strip().lower() not in ("none", "cpu")])


def not_counted(flags: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """Return a sentence for each flag that takes memory of a device and is not counted."""
    spelled = {**_VALUED, **_SWITCHES}
    given = [name for name in NOT_COUNTED if any(key == name for key, _value in flags)]
    said = [_("{flag}: its influence on memory is not counted").format(flag=spelled[name][-1]) for name in given]
    kinds = [kind for key, value in flags if key == "speculation" for kind in re.split(r"[,:]", value)[:1]]
    if any(not kind.startswith(_FREE_SPECULATION) for kind in kinds):
        said.append(_("--spec-type: the layers or the model that draft are not counted"))
    return tuple(said)


def _one_flag(words: list[str], at: int, flags: list[tuple[str, str]]) -> int:
    """Read the flag at ``at`` into ``flags``; return where the next one stands."""
    word, has_value, value = words[at], False, ""
    if word.startswith("--") and "=" in word:
        word, value = word.split("=", 1)
        has_value = True
    word = word.replace("_", "-") if word.startswith("--") else word
    if word not in _known():
        if not word.startswith("-"):
            raise _stray(word)
        raise InputError(
            _("unknown llama.cpp flag {flag!r}").format(flag=words[at][:80]),
            remedy=_("the nearest known flags are {nearest}").format(nearest=", ".join(_nearest(word))),
        )
    kind, name = _known()[word]
    follows = words[at + 1] if at + 1 < len(words) else None
    at += 1
    if kind == "value" and not has_value:
        if follows is None:
            raise InputError(_("the flag {flag} needs a value").format(flag=word))
        value, at = follows, at + (2 if word in _PAIRED else 1)
    elif kind == "loose" and not has_value:
        at += follows is not None and not follows.startswith("-")
    elif kind == "switch":
        value = value or "1"
    elif kind == "maybe" and not has_value:
        known = follows is not None and follows.lower() in _CHOICES
        value, at = (str(follows), at + 1) if known else ("1", at)
    if name:
        flags.append((name, value))
    return at


def _nearest(word: str) -> list[str]:
    from difflib import get_close_matches

    return get_close_matches(word, _known(), n=3, cutoff=0.4) or ["-ngl", "-c", "-ot"]


def _stray(word: str) -> InputError:
    if is_unset(word):
        return unset_variable(word)
    return InputError(_("{word!r} belongs to no flag").format(word=word[:80]))
