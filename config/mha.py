"""Multi-head attention: one key/value head for each query head."""
n_kv_head = None
out_dir = "{out_dir}/mha"
