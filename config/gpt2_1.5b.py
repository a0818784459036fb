"""The GPT-2 1.5B shape, for eight large GPUs.

Add config/gqa.py after it to choose the attention variant. Prepare the data with --tokenizer=gpt2.
Calculated by bench.py --mode=scale, not measured: 31.5 billion tokens, 228 GPU-hours on H100s,
65.8 GB on each of 8 (DDP).

GPT-2 has 25 heads, which cannot share the two key/value heads of config/gqa.py. This shape has 20
heads of width 80 instead, with the same number of parameters.
"""
out_dir = "{out_dir}/gpt2_1.5b"
dataset = "text"
block_size = 1024
vocab_size = 50304  # 50,257 rounded up to a multiple of 128
n_layer = 48
n_head = 20
n_embd = 1600
batch_size = 8
tokens_per_step = 2**20
max_steps = 30000
eval_interval = 1000
warmup_steps = 700
learning_rate = 2e-4
min_lr = 2e-5
eval_tokens = 2**20
