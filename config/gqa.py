"""Grouped-query attention: two key/value heads, each shared by half of the query heads."""
n_kv_head = 2
out_dir = "{out_dir}/gqa"
