"""Which reader understands which ``model_type``: ``module:function`` in this folder."""

FAMILIES: dict[str, str] = {
    "llama": "llama:read",
    "deepseek_v3": "deepseek:read_v3",
}
