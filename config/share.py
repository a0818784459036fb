"""Every second layer reads the keys and values of the layer below it."""
kv_share = 2
out_dir = "{out_dir}/share"
