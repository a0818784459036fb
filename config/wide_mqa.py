"""MQA whose one head is as wide as all eight of config/recall.py together, so that both cache as
much. For another model, set head_dim to n_head times that of its MHA."""
n_kv_head = 1
head_dim = 64
out_dir = "{out_dir}/wide_mqa"
