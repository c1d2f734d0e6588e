"""A command line or a shell script that starts a fine-tuning job → its settings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.jsonfile import is_file
from ullage.read.recipe_fields import Fields

#: Which of TRL's scripts a line runs: ``trl dpo``, or a copy of its file.
_SCRIPT = re.compile(r"\b(?:trl|swift)\s+([a-z]+)\b(?!/)|(?:^|[\s/])([a-z][\w]*)\.py\b", re.MULTILINE)
#: What starts a job: the last such command of a script is the one that is read.
_LAUNCHER = re.compile(
    r"(?:^|[\s;&(])(?:accelerate\s+launch|torchrun|deepspeed|trl\s+[a-z]+|swift\s+(?:sft|pt|rlhf)|"
    r"llamafactory-cli\s+train|axolotl\s+train|python3?(?:\.\d+)?)\s"
)
_ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)=(\"[^\"]*\"|'[^']*'|\S*)", re.MULTILINE)
_VARIABLE = re.compile(r"\$\{([A-Za-z_]\w*)(?::-([^}]*))?\}|\$([A-Za-z_]\w*)")
_SUM = re.compile(
    r"\$\(\s*expr\s+(\d{1,9})\s*(/|\\?\*|\+|-)\s*(\d{1,9})\s*\)|"
    r"\$\(\(\s*(\d{1,9})\s*(/|\*|\+|-)\s*(\d{1,9})\s*\)\)"
)
_FLAG = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)
#: Flags of torchrun, ``accelerate launch`` and ``deepspeed`` that say where processes run.
LAUNCH = (
    "nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "standalone", "rdzv_backend",
    "rdzv_endpoint", "rdzv_id", "rdzv_conf", "num_machines", "machine_rank", "main_process_ip", "main_process_port",
    "num_gpus", "num_nodes", "hostfile", "include", "exclude", "module", "multi_gpu", "num_cpu_threads_per_process",
    "same_network", "main_training_function", "max_restarts", "script", "use_cpu", "tee", "log_dir",
)  # fmt: skip
_MAX_SCRIPT = 200_000
#: The setting under which a line's environment says how PyTorch's allocator works, and where it says so.
ALLOC_CONF = "PYTORCH_ALLOC_CONF"
_ENVIRONMENT = re.compile(r"(?:^|[\s;])PYTORCH_(?:CUDA_)?ALLOC_CONF=(\"[^\"]*\"|'[^']*'|[^\s\"']+)")


def fields_of_line(line: str, where: str) -> Fields:
    """Return the ``--name value`` and ``--name=value`` pairs of a command line as settings; a bare flag is true.

    Of a script the last command that starts a job is read, with the variables that it has set by then; a file of
    settings (``--config``) is read first.

    Raises:
        InputError: quotes that do not close, or a file of settings that is not there.
    """
    command = _command(line[:_MAX_SCRIPT])
    try:
        words = shlex.split(command, comments=True)
    except ValueError as error:
        raise InputError(_("is no command line ({reason})").format(reason=error), where=where) from None
    values: dict[str, Any] = {}
    name = None
    for word in words:
        flag = _FLAG.fullmatch(word)
        if flag:
            name = flag.group(1).replace("-", "_")
            values[name] = True if flag.group(2) is None else flag.group(2)
        elif word.endswith(".py"):  # the script: what stands before it was said to its launcher
            name = None
        elif name is None and word.endswith((".yaml", ".yml")):  # llamafactory-cli train FILE, axolotl train FILE
            values.setdefault("config", word)
        elif name is not None:
            before = values[name]
            values[name] = word if before is True else f"{before},{word}"
    stated = _ENVIRONMENT.findall("\n".join(one for one in line.splitlines() if not one.lstrip().startswith("#")))
    if stated:
        values[ALLOC_CONF] = stated[-1].strip("\"'")
    script = [one.group(1) or one.group(2) for one in _SCRIPT.finditer(command)]
    if script:
        values["script"] = script[-1]
    return Fields({**_config(values, where), **values}, where)


def _command(text: str) -> str:
    """Return the last command of a script that starts a job, its variables filled in; the text itself where none is."""
    whole = re.sub(r"\\[ \t]*\r?\n", " ", text).rstrip().rstrip("\\")
    logical = [one for one in whole.splitlines() if not one.lstrip().startswith("#")]
    if len(logical) < 2:
        return whole
    started = [index for index, one in enumerate(logical) if _LAUNCHER.search(one) and "--" in one]
    if not started:
        return whole
    set_before = "\n".join(logical[: started[-1]])
    known = {one.group(1): one.group(2).strip("\"'") for one in _ASSIGNMENT.finditer(set_before)}
    return _filled(logical[started[-1]], known)


def _filled(text: str, known: dict[str, str]) -> str:
    """Return the text with variables replaced, also where their values name others; unknown ones stay."""
    for _round in range(4):
        text = _VARIABLE.sub(
            lambda one: known.get(one.group(1) or one.group(3), one.group(2) or one.group(0))[:4000], text
        )[:_MAX_SCRIPT]
        text = _SUM.sub(_counted, text)
    return text


def _counted(one: re.Match[str]) -> str:
    """Return what ``$(expr 16 / 8)`` or ``$((16 / 8))`` comes to; what cannot be divided stays."""
    first, sign, second = int(one.group(1) or one.group(4)), one.group(2) or one.group(5), one.group(3) or one.group(6)
    if sign == "/":
        return str(first // int(second)) if int(second) else one.group(0)
    return str(first * int(second) if "*" in sign else first + int(second) if sign == "+" else first - int(second))


def _config(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the settings of the file that ``--config`` or a bare word names; flags of the line win over them.

    Source: trl@1.16.0:scripts/utils.py:TrlParser.parse_args_and_config.
    """
    named = values.get("config")
    if not isinstance(named, str) or not named.endswith((".yaml", ".yml")):
        return {}
    from ullage.read.yamlfile import read_yaml

    for place in (Path(where).parent / named, Path(named)):
        if "\0" not in named and is_file(place):
            found = read_yaml(place)
            if not isinstance(found, dict):
                raise InputError(_("is not a mapping of settings"), where=str(place))
            values.pop("config")
            return {key: value for key, value in found.items() if key != "env"}
    raise InputError(_("the file {name} is not there").format(name=named[:200]), where=f"{where[:80]}: --config")


def accelerate_of(fields: Fields) -> dict[str, Any] | None:
    """Return the Accelerate configuration that a line is launched with, or what stands in its place; None without one.

    Source: accelerate@1.15.0:commands/launch.py:launch_command_parser; trl@1.16.0:cli/accelerate_config.py.
    """
    for key in LAUNCH:
        if key in fields.values and not isinstance(fields.values[key], (dict, list)):
            fields.raw(key)
    file = fields.word("config_file") or fields.word("accelerate_config")
    stage, deepspeed, fsdp = fields.count("zero_stage"), fields.flag("use_deepspeed"), fields.flag("use_fsdp")
    processes, named = fields.count("num_processes"), fields.word("deepspeed_config_file")
    sharding = {key: fields.raw(key) for key in fields.values if key.startswith("fsdp_") and fsdp}
    found: dict[str, Any] = {"mixed_precision": fields.word("mixed_precision") or "no"}
    if processes is not None:
        found["num_processes"] = processes
    if file is not None:
        return {"config_file": file, **found}
    if deepspeed:
        devices = {key: fields.word(key) for key in ("offload_optimizer_device", "offload_param_device")}
        section = {"zero_stage": 2 if stage is None else stage, "deepspeed_config_file": named, **devices}
        return {**found, "distributed_type": "DEEPSPEED", "deepspeed_config": section}
    if fsdp:
        return {**found, "distributed_type": "FSDP", "fsdp_config": sharding}
    return {**found, "distributed_type": "MULTI_GPU"} if processes is not None else None
