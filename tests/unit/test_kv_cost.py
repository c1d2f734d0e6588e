"""What engines say a token costs: the slopes that their pools are built from, whole models on one rank."""

import json

import pytest

from ullage.cli import main


@pytest.mark.parametrize(
    ("words", "slope"),
    [
        ("deepseek-v3 --on 8xH200", 61 * 576 * 2),
        ("deepseek-v3 --on 8xH200 --engine sglang --kv-dtype fp8", 61 * 576),
        ("deepseek-v3.2 --on 8xH200 --kv-dtype fp8", 61 * (656 + 132)),
        ("deepseek-v3.2 --on 8xH200", 61 * (1152 + 132)),
        ("deepseek-v2-lite --on H100", 27 * 576 * 2),
        ("llama-3.1-8b --on H100", 32 * 8 * 256 * 2),
        ("qwen3-next-80b-a3b-instruct --on 2xH200", 12 * 512 * 2),  # one of two KV heads on each rank
        ("deepseek-v3 --on 1xB300 --engine llamacpp --kv-dtype q8_0 --quantization gguf:Q2_K", 61 * 576 * 34 // 32),
        ("gpt-oss-120b --on H100", 18 * 8 * 128 * 2),
    ],
)
def test_slope(words, slope, capsys):
    main(["fit", "serve", *words.split(), "--json", "--no-advice"])
    assert json.loads(capsys.readouterr().out)["serving"]["kv_bytes_per_token"] == slope
