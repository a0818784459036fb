"""Multi-head attention: a key/value head for every query head."""
n_kv_head = None
out_dir = "{out_dir}/mha"
