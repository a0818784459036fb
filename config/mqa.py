"""Multi-query attention: one key/value head for all query heads."""
n_kv_head = 1
out_dir = "{out_dir}/mqa"
