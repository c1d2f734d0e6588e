"""Command lines of the llama.cpp family."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.errors import InputError
from ullage.read.llamacpp_args import parse_command


def test_a_server_line_is_read_under_one_name_per_flag() -> None:
    command = parse_command(
        "CUDA_VISIBLE_DEVICES=0,1 ./build/bin/llama-server -m /models/r1.gguf -c 61440 -ctk q8_0 -mla 3 -fa -amb 512 "
        '-fmoe --n-gpu-layers 63 -ot "blk.(3).ffn_.*=CUDA0" --override-tensor exps=CPU --parallel 1 --threads 24'
    )
    assert command.program == "llama-server"
    assert command.flags == (
        ("model_path", "/models/r1.gguf"),
        ("n_ctx", "61440"),
        ("cache_type_k", "q8_0"),
        ("mla", "3"),
        ("flash_attn", "1"),
        ("attn_max_batch", "512"),
        ("fused_moe", "1"),
        ("n_gpu_layers", "63"),
        ("override_tensor", "blk.(3).ffn_.*=CUDA0"),
        ("override_tensor", "exps=CPU"),
        ("parallel", "1"),
    )


@pytest.mark.parametrize(
    ("line", "value"), [("-fa -c 512", "1"), ("-fa on -c 512", "on"), ("-fa 0", "0"), ("--flash-attn=auto", "auto")]
)
def test_flash_attention_takes_a_value_or_none(line: str, value: str) -> None:
    assert parse_command(line).last("flash_attn") == value


def test_the_last_of_a_repeated_flag_wins() -> None:
    assert parse_command("-c 512 --ctx-size 1024").last("n_ctx") == "1024"


def test_an_unknown_flag_is_named_with_its_nearest() -> None:
    with pytest.raises(InputError, match=r"--n-cpu-moes.*--n-cpu-moe"):
        parse_command("llama-server --n-cpu-moes 3")


@pytest.mark.parametrize("line", ["llama-server -c", "llama-cli 'open", "-c 1 stray"])
def test_what_cannot_be_read_is_an_input_error(line: str) -> None:
    with pytest.raises(InputError):
        parse_command(line)


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused(line: str) -> None:
    with contextlib.suppress(InputError):
        parse_command(line)
