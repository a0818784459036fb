"""A cache like that of DeepSeek-V4, at toy size.

It borrows one key/value head whose values are its keys, windows, and rotation of a part of the head
(https://huggingface.co/docs/transformers/main/model_doc/deepseek_v4). It leaves out the compression
of distant tokens: here every fourth layer sees all tokens as they are. It also leaves out the
compressed queries, attention sinks, experts and hyper-connections.
"""
n_kv_head = 1
kv_tied = True
rope_fraction = 0.25
window = 64
global_every = 4
out_dir = "{out_dir}/deepseek_v4_like"
