"""Write docs/agreement.md: traced steps beside the closed form, and beside published peaks. Needs torch."""

from __future__ import annotations

import sys
from pathlib import Path

from ullage.trace.compare.agreement import Agreement, Case, compare
from ullage.units import GiB

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "agreement.md"
HEADS = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
LATENT_V3 = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
MODELS = {
    "meta-llama/Llama-3.2-1B": ((("num_hidden_layers", 4),), HEADS),
    "meta-llama/Llama-3.1-8B": ((("num_hidden_layers", 4),), HEADS),
    "Qwen/Qwen3-8B": ((("num_hidden_layers", 4),), HEADS),
    "mistralai/Mixtral-8x7B-v0.1": ((("num_hidden_layers", 3),), HEADS),
    "deepseek-ai/DeepSeek-V2-Lite": ((("num_hidden_layers", 4),), LATENT),
    "deepseek-ai/DeepSeek-V3": ((("num_hidden_layers", 5), ("num_nextn_predict_layers", 0)), LATENT_V3),
    "openai/gpt-oss-20b": ((("num_hidden_layers", 4),), HEADS),
}
SHAPES = ((4, 2048), (1, 512))
#: Models that are also asked with a frozen 4-bit base: (how it is held, whether it was prepared for training).
WITH_BASE = ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B", "Qwen/Qwen3-8B")
BASES = (("nf4", True), ("nf4", False), ("gptq", True))
VARIANTS = [
    (recompute, adapters, loss)
    for loss in ("plain", "liger")
    for adapters in (False, True)
    for recompute in ("none", "full")
]
HEAD = """# A trace beside the closed form

`ullage trace` runs the real classes of transformers on meta tensors; `ullage fit train` works the same step out from
tables. Here both are asked the same: models of the catalog at their real widths with few layers, bfloat16 parameters,
fused AdamW, one Hopper GPU, b sequences of s tokens. Adapters: rank 16 on the projections of attention, fp32 under
autocast; a base in nf4 (bitsandbytes) or GPTQ by stand-ins for its layers, GPTQ in float16. "liger" is a stand-in that
allocates what liger-kernel 0.6.3's fused linear cross entropy does. Attention is SDPA, of gpt-oss written out.

*peak* is allocated memory at its largest, over all moments of the second step; *layer* the largest difference of what
one layer keeps between forward and backward. No constant was fitted: the rules with their sources are in
`account/activations/`, and this page is written by `tools/make_agreement.py`.
"""


def cases() -> list[Case]:
    """Return every case of the page."""
    found = []
    for model, (overrides, targets) in MODELS.items():
        for micro_batch, seq_len in SHAPES:
            for recompute, adapters, loss in VARIANTS:
                found.append(
                    Case(
                        model=model,
                        overrides=overrides,
                        recompute=recompute,
                        lora=targets if adapters else (),
                        loss=loss,
                        micro_batch=micro_batch,
                        seq_len=seq_len,
                    )
                )
    return [*found, *_with_base()]


def _with_base() -> list[Case]:
    return [
        Case(
            model=model,
            overrides=MODELS[model][0],
            recompute=recompute,
            lora=MODELS[model][1],
            loss=loss,
            micro_batch=micro_batch,
            seq_len=seq_len,
            base=base,
            prepared=prepared,
        )
        for model in WITH_BASE
        for micro_batch, seq_len in SHAPES
        for base, prepared in BASES
        for recompute, loss in (("none", "plain"), ("full", "plain"), ("full", "liger"))
    ]


def row(found: Agreement) -> str:
    """Return a line of the table."""
    case, (traced, closed) = found.case, found.peak
    moments = ", ".join(f"{name} {worked / seen - 1:+.2%}" for name, seen, worked in found.moments)
    method = "LoRA" if case.lora else "full"
    if case.base is not None:
        method = f"LoRA, {case.base}{' as TRL prepares it' if case.base == 'nf4' and case.prepared else ''}"
    layer = f"{found.layer_error:+.2%}" if found.layers else ""
    name = case.model.rpartition("/")[2]
    return (
        f"| {name}, {case.overrides[0][1]} layers | {case.micro_batch} x {case.seq_len} | {method} | {case.recompute} "
        f"| {case.loss} | {traced / GiB:.3f} | {closed / GiB:.3f} | {found.peak_error:+.2%} | {layer} | {moments} |"
    )


def main() -> None:
    """Measure, write, say how long the page is."""
    found = []
    for case in cases():
        found.append(compare(case))
        print(row(found[-1]), file=sys.stderr, flush=True)
    worst = max(abs(one.peak_error) for one in found)
    worst_layer = max(abs(one.layer_error) for one in found)
    lines = [
        HEAD,
        f"{len(found)} jobs: the worst peak is {worst:.2%} off, the worst layer {worst_layer:.2%}.",
        "",
        "| model | b x s | method | recompute | loss | traced GiB | closed GiB | peak | layer | moments |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *map(row, found),
        "",
    ]
    rest = PAGE.read_text(encoding="utf-8").partition("<!-- by hand -->") if PAGE.exists() else ("", "", "")
    PAGE.write_text("\n".join(lines) + "\n" + "".join(rest[1:]), encoding="utf-8")


if __name__ == "__main__":
    main()
