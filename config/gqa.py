"""Grouped-query attention: two key/value heads, shared by the query heads."""
n_kv_head = 2
out_dir = "{out_dir}/gqa"
