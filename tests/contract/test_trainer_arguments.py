"""The Trainer's real argument classes: each of their settings is read, or known to cost nothing."""

import dataclasses

import pytest

pytest.importorskip("transformers")
pytest.importorskip("torch")
pytestmark = pytest.mark.reference

from transformers import TrainingArguments  # noqa: E402
from transformers.training_args import OptimizerNames  # noqa: E402

from ullage.read.recipe_fields import Fields  # noqa: E402
from ullage.read.recipe_words import OPTIMIZERS  # noqa: E402
from ullage.read.recipes import READERS  # noqa: E402

#: Settings that do change the memory and that are not followed: they are named to the user.
NAMED = {"parallelism_config"}


def test_every_setting_of_the_trainer_is_known():
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    words = READERS["trainer"](Fields(dict.fromkeys(names), "arguments"))
    assert set(words.unknown) <= NAMED, sorted(set(words.unknown) - NAMED)


def test_defaults_are_the_trainers(tmp_path):
    real = TrainingArguments(output_dir=str(tmp_path))
    words = READERS["trainer"](Fields({}, "arguments"))
    assert words.micro_batch_size == real.per_device_train_batch_size
    assert words.grad_accum == real.gradient_accumulation_steps
    assert words.recompute == real.gradient_checkpointing
    assert OPTIMIZERS[str(real.optim.value)] == (words.optimizer, words.optimizer_impl)


def test_known_optimizers_are_the_trainers():
    of_no_trainer = set(OPTIMIZERS) - {name.value for name in OptimizerNames}
    # axolotl@0.19.0:src/axolotl/utils/schemas/enums.py:CustomSupportedOptimizers has names of its own for torchao's
    of_axolotl = {"ao_adamw_4bit", "ao_adamw_8bit", "ao_adamw_fp8"}
    assert of_no_trainer <= {"adamw_hf", "muon"} | of_axolotl
