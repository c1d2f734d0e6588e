"""``ullage bench serve`` against a real OpenAI-compatible server: ``transformers serve`` with a tiny random Llama."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import jsonschema
import pytest

from ullage.cli import main
from ullage.cli.schema import FOLDER
from ullage.records.validate import validate_files

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytestmark = [
    pytest.mark.reference,
    pytest.mark.skipif(
        not transformers.utils.import_utils.is_serve_available(), reason="transformers[serving] is not installed"
    ),
]
START_SECONDS = 120


def save_model(folder):
    """Save a Llama of random weights and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "user", "assistant", "hello", *(f"w{number}" for number in range(250))]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}assistant {% endif %}"
    )
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=2,
    )
    model = transformers.LlamaForCausalLM(config)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Start the server; yield its address, the model's name and its process number."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = (folder / "log").open("wb")
    process = subprocess.Popen([*command, "--dtype", "float32"], stdout=log, stderr=log, env=environment)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(process, url, folder / "log")
        yield url, str(folder), process.pid
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait(process, url, log):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-2000:]
        try:
            with opener.open(f"{url}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"the server did not start: {log.read_text()[-2000:]}")


@pytest.mark.parametrize("api", ["completions", "chat"])
def test_all_phases_against_a_real_server(server, api, tmp_path, capsys):
    url, model, pid = server
    records, page = tmp_path / "r.jsonl", tmp_path / "b.html"
    words = ["--model", model, "--api", api, "--word", "w1", "--prompt-tokens", "48", "--output-tokens", "6"]
    words += ["--max-concurrency", "4", "--requests", "3", "--idle", "0.5", "--pid", str(pid)]
    assert main(["bench", "serve", url, *words, "--json", "--records", str(records), "--html", str(page)]) == 0
    answer = json.loads(capsys.readouterr().out)
    jsonschema.validate(answer, json.loads((FOLDER / "bench.json").read_text()))
    assert [phase["name"] for phase in answer["phases"]] == ["idle", "full_load", "changing_load"]
    for phase in answer["phases"]:
        assert phase["peak_used_bytes"] > 50 * 2**20 and len(phase["ranks"][0]["curve"]) >= 3
    full, changing = answer["phases"][1], answer["phases"][2]
    assert full["figures"]["num_errors"] == changing["figures"]["num_errors"] == 0
    for wave in (*full["waves"], *changing["waves"]):
        assert wave["output_tokens"] == 6 * wave["num_requests"]  # the model never ends by itself
        assert 0 < wave["ttft_p50_seconds"] <= wave["request_p50_seconds"]
        extra = 2 if api == "chat" else 0  # user, assistant
        assert wave["measured_prompt_tokens"] == wave["prompt_tokens"] + extra
    assert full["figures"]["inter_token_p50_seconds"] > 0 and full["figures"]["output_tokens_per_second"] > 0
    assert 1 <= answer["break_point"]["largest"] <= 4
    assert answer["stability"]["num_bursts"] == 2
    report = validate_files([records])
    assert report.num_records == 1 and not report.internal_errors
    quantities = {figure["quantity"] for figure in json.loads(records.read_text())["measured"]}
    assert quantities == {"host_used", "served_concurrency"}
    html = page.read_text(encoding="utf-8")
    assert "Times: changing load" in html and "Memory: full load" in html


def test_a_model_the_server_does_not_have_is_one_sentence(server, capsys):
    assert main(["bench", "serve", server[0], "--model", "no/such-model", "--idle", "0.1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
