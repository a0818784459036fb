"""Values are the keys, so that one tensor is cached instead of two."""
kv_tied = True
out_dir = "{out_dir}/tied"
