"""The GPT-2 350M shape, for eight large GPUs.

Add config/gqa.py after it to choose the attention variant. Prepare the data with --tokenizer=gpt2.
Calculated by bench.py --mode=scale, not measured: 10.0 billion tokens, 17 GPU-hours on H100s,
31.7 GB on each of 8 (DDP).
"""
out_dir = "{out_dir}/gpt2_350m"
dataset = "text"
block_size = 1024
vocab_size = 50304  # 50,257 rounded up to a multiple of 128
n_layer = 24
n_head = 16
n_embd = 1024
batch_size = 16
tokens_per_step = 2**19
max_steps = 19073
warmup_steps = 700
learning_rate = 3e-4
min_lr = 3e-5
eval_tokens = 2**20
