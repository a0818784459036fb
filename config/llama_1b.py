"""The Llama 3.2 1B shape at a context of 2,048 tokens.

Bring your own text, prepared with a tokenizer of at most 128,256 ids.
Calculated by bench.py --mode=scale, not measured: 25.2 billion tokens, 145 GPU-hours on H100s,
54.9 GB on each of 8 (DDP).
"""
out_dir = "{out_dir}/llama_1b"
dataset = "text"
block_size = 2048
vocab_size = 128256
n_layer = 16
n_head = 32
n_kv_head = 8
n_embd = 2048
n_ff = 8192
rope_theta = 5e5
qk_norm = False
batch_size = 8
tokens_per_step = 2**20
max_steps = 24000
eval_interval = 1000
learning_rate = 3e-4
min_lr = 3e-5
eval_tokens = 2**20
