"""Which reader understands which ``model_type``: ``module:function`` in this folder."""

FAMILIES: dict[str, str] = {
    "llama": "llama:read",
    "deepseek_v3": "deepseek:read_v3",
    "falcon_h1": "falcon_h1:read",
    "jamba": "jamba:read",
    "kimi_linear": "kimi_linear:read",
    "minimax_m1": "minimax:read_m1",
    "minimax_m3": "minimax:read_m3",
    "nemotron_h": "nemotron_h:read",
    "qwen3_next": "qwen_next:read_next",
    "qwen3_5_text": "qwen_next:read_3_5_text",
    "qwen3_5_moe_text": "qwen_next:read_3_5_text",
    "qwen2_vl": "vision_qwen:read_2_vl",
    "qwen2_5_vl": "vision_qwen:read_2_5_vl",
    "qwen3_vl": "vision_qwen:read_3_vl",
    "qwen3_vl_moe": "vision_qwen:read_3_vl",
    "qwen3_5": "vision_qwen:read_3_vl",
    "qwen3_5_moe": "vision_qwen:read_3_vl",
    "glm4v_moe": "vision_qwen:read_glm4v_moe",
}
