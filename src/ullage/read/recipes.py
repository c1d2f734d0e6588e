"""Recipes of the Trainer family by name: which reader, and which settings name the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.axolotl_recipe import axolotl_recipe
from ullage.read.jsonfile import is_file
from ullage.read.llamafactory_recipe import llamafactory_recipe
from ullage.read.recipe_fields import Fields
from ullage.read.recipe_line import ALLOC_CONF, fields_of_line
from ullage.read.recipe_words import RecipeWords, lay_over
from ullage.read.swift_recipe import swift_recipe
from ullage.read.trainer_recipe import trainer_recipe, trl_recipe
from ullage.read.yamlfile import read_yaml
from ullage.spec.training import TrainingJob

#: The settings and the program's version → what they say.
READERS: dict[str, Callable[..., RecipeWords]] = {
    "trainer": trainer_recipe,
    "trl": trl_recipe,
    "llamafactory": llamafactory_recipe,
    "axolotl": axolotl_recipe,
    "swift": swift_recipe,
}
#: What a program asks of PyTorch's allocator by itself.
#: Source: axolotl@0.19.0:axolotl/utils/__init__.py:set_pytorch_cuda_alloc_conf.
_ALLOC_CONF = {"axolotl": "expandable_segments:True"}
#: Options of the command line that a recipe states itself; a Trainer without a length leaves ``seq`` to the flags.
STATED = (
    "engine", "dp", "tp", "pp", "cp", "ep", "sp", "zero", "fsdp", "micro_batch", "grad_accum", "precision", "optimizer",
    "optimizer_impl", "recompute", "attention", "loss", "lora", "method", "base_quantization", "offload", "compile",
)  # fmt: skip


def read_fields(rest: str) -> Fields:
    """Return the settings of a file, of a file that holds a command line, or of the line itself."""
    path = Path(rest)
    if not is_file(path):
        if "--" not in rest and not rest.endswith((".yaml", ".yml")):
            raise InputError(_("is neither a file nor a command line"), where=rest[:80])
        return fields_of_line(rest, "--from")
    if path.suffix.lower() in (".sh", ".txt", ".bash"):
        from ullage.read.launch_line import line_of

        return fields_of_line(line_of(rest), rest)
    return Fields(read_yaml(path), rest)


def model_of(fields: Fields) -> str | None:
    """Return the model that a recipe names."""
    return fields.word("model_name_or_path") or fields.word("base_model") or fields.word("model")


def with_recipe(kind: str, fields: Fields, job: TrainingJob) -> TrainingJob:
    """Lay a recipe over a job.

    Raises:
        InputError: a setting with a value that it cannot have, or one that is not followed.
    """
    stated = fields.word(ALLOC_CONF) or _ALLOC_CONF.get(kind, "")
    words = READERS[kind](fields, job.engine_version)
    return lay_over(replace(job, alloc_conf=stated), words, Path(fields.where))
