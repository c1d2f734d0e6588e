"""A command line of llama.cpp, ik_llama.cpp or their tools → flags by one canonical name each.

Read are ``llama-server``, ``llama-cli``, ``llama-bench``, ``llama-sweep-bench``, ``llama-perplexity`` and bare lists of
flags. Flags without influence on memory are known and passed over; one that is not known is an error that names it and
the nearest known ones.

Source: llama.cpp@b7000:common/arg.cpp:common_params_parser_init; ik_llama.cpp@8337e4cd:common/common.cpp:
gpt_params_find_arg (``-mla``, ``-fmoe``, ``-amb``, ``-rtr``, ``-ser`` ...).
"""

from __future__ import annotations

import shlex

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _

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
    "fit": ("-fit", "--fit"),
    "fit_target": ("-fitt", "--fit-target"),
    "fit_ctx": ("-fitc", "--fit-ctx"),
    "draft_model": ("-md", "--model-draft"),
    "draft_ctx": ("-cd", "--ctx-size-draft"),
    "draft_gpu_layers": ("-ngld", "--gpu-layers-draft", "--n-gpu-layers-draft"),
    "mmproj": ("-mm", "--mmproj"),
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
}
#: flags that may stand alone or before a value: ``-fa``, ``-fa on``, ``-fa 1``
_MAYBE = {"flash_attn": ("-fa", "--flash-attn")}
#: no influence on memory, with a value
_HARMLESS_VALUED = (
    "-t --threads -tb --threads-batch -td --threads-draft --threads-http -s --seed -p --prompt -f --file -n --predict "
    "--n-predict --temp --top-k --top-p --min-p --repeat-penalty --repeat-last-n --presence-penalty "
    "--frequency-penalty --host --port -a --alias --api-key --api-key-file --path --numa --prio --poll --timeout -to "
    "--chat-template --chat-template-file --chat-template-kwargs --reasoning-format --reasoning-budget --keep "
    "--samplers --mirostat --rope-scaling --rope-scale --rope-freq-base --rope-freq-scale --yarn-orig-ctx "
    "--yarn-ext-factor --yarn-attn-factor --yarn-beta-slow --yarn-beta-fast --override-kv --slot-save-path --slots "
    "--log-file --verbosity -lv --grammar --grammar-file --json-schema -j --lookup-cache-static -npp -ntg -npl -r "
    "--repetitions -pg -d --n-depth -o --output --draft --draft-max --draft-min --draft-p-min --cache-reuse "
    "--slot-prompt-similarity -sps --defrag-thold -dt -cram --cache-ram --ctx-checkpoints --image-min-tokens "
    "--image-max-tokens --sleep-idle-seconds --models-dir --models-max -hft --hf-token -mu --model-url --lora "
    "--offload-policy -op --pooling --ssl-key-file --ssl-cert-file -C --cpu-mask --chunks --tags --tensor-type"
)
_HARMLESS_SWITCHES = (
    "-i --interactive -cnv --conversation -no-cnv --color -co --jinja --no-jinja --metrics --no-slots --no-webui "
    "--webui -v --verbose --log-disable --log-timestamps --log-prefix --warmup --no-warmup -wb --warmup-batch "
    "--ignore-eos --context-shift --no-context-shift --mmap -cb --cont-batching -nocb --no-cont-batching --props "
    "--check-tensors --no-perf --simple-io -e --escape --no-escape --offline -thp --transparent-huge-pages -st "
    "--single-turn --no-display-prompt --special -sp --reranking --rerank --cache-prompt --no-cache-prompt -gr "
    "--graph-reuse -ger --grouped-expert-routing -vq --validate-quants --no-host --no-repack --repack -mqkv "
    "--merge-qkv -khad --k-cache-hadamard -h --help --version"
)
_PROGRAMS = ("llama-", "./llama-", "main", "server", "ollama", "ik_llama")


def _spellings() -> dict[str, tuple[str, str]]:
    found: dict[str, tuple[str, str]] = {}
    for kind, table in (("value", _VALUED), ("switch", _SWITCHES), ("maybe", _MAYBE)):
        for name, words in table.items():
            for word in words:
                found[word] = (kind, name)
    for word in _HARMLESS_VALUED.split():
        found[word] = ("value", "")
    for word in _HARMLESS_SWITCHES.split():
        found[word] = ("switch", "")
    return found


_KNOWN = _spellings()


class LlamaCommand(Frozen):
    """A command line as understood. ``flags``: canonical name and value as typed, repeated flags in order."""

    program: str
    flags: tuple[tuple[str, str], ...]

    def last(self, name: str) -> str | None:
        """Return the value of the last flag called ``name``: a later flag wins."""
        return next((value for key, value in reversed(self.flags) if key == name), None)


def parse_command(line: str) -> LlamaCommand:
    """Parse a command line.

    Raises:
        InputError: quotes do not match, a flag is not known, or a value is missing.
    """
    if len(line) > 100_000:
        raise InputError(_("the command line is longer than 100,000 characters"))
    try:
        words = shlex.split(line.replace("\\\n", " "), comments=False)
    except ValueError as error:
        raise InputError(_("the command line cannot be split into words: {why}").format(why=error)) from error
    program = ""
    while words and not words[0].startswith("-"):
        word = words.pop(0)
        base = word.rsplit("/", 1)[-1]
        if "=" not in word and base.startswith(_PROGRAMS):
            program = base
    flags: list[tuple[str, str]] = []
    at = 0
    while at < len(words):
        at = _one_flag(words, at, flags)
    return LlamaCommand(program=program, flags=tuple(flags))


def _one_flag(words: list[str], at: int, flags: list[tuple[str, str]]) -> int:
    """Read the flag at ``at`` into ``flags``; return where the next one stands."""
    word, has_value, value = words[at], False, ""
    if word.startswith("--") and "=" in word:
        word, value = word.split("=", 1)
        has_value = True
    word = word.replace("_", "-") if word.startswith("--") else word
    if word not in _KNOWN:
        raise InputError(
            _("unknown llama.cpp flag {flag!r}").format(flag=words[at][:80]),
            remedy=_("the nearest known flags are {nearest}").format(nearest=", ".join(_nearest(word))),
        )
    kind, name = _KNOWN[word]
    follows = words[at + 1] if at + 1 < len(words) else None
    at += 1
    if kind == "value" and not has_value:
        if follows is None:
            raise InputError(_("the flag {flag} needs a value").format(flag=word))
        value, at = follows, at + 1
    elif kind == "switch":
        value = value or "1"
    elif kind == "maybe" and not has_value:
        known = follows is not None and follows.lower() in ("0", "1", "on", "off", "auto", "true", "false")
        value, at = (str(follows), at + 1) if known else ("1", at)
    if name:
        flags.append((name, value))
    return at


def _nearest(word: str) -> list[str]:
    from difflib import get_close_matches

    return get_close_matches(word, _KNOWN, n=3, cutoff=0.4) or ["-ngl", "-c", "-ot"]
