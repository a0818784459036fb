"""MLA that caches 128 numbers per token and layer, as MHA does in config/recall.py. For another
model, set kv_lora_rank + rope_head_dim to 2 n_head head_dim of its MHA."""
attention = "mla"
kv_lora_rank = 120
rope_head_dim = 8
out_dir = "{out_dir}/wide_mla"
