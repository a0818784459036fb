"""The GPT-2 124M shape, for one or more large GPUs: 0.5M GPT-2 tokens per step, 10B in total.

Add config/gqa.py after it to choose the attention variant. Bring your own text, for example from
data/hub, and prepare it with --tokenizer=gpt2. Calculated by bench.py --mode=scale, not measured:
10.0 billion tokens, 6 GPU-hours on H100s, 13.4 GB on each of 8 (DDP).
"""
out_dir = "{out_dir}/gpt2_124m"
dataset = "text"
block_size = 1024
vocab_size = 50304  # 50,257 rounded up to a multiple of 128
n_layer = 12
n_head = 12
n_embd = 768
batch_size = 16
tokens_per_step = 2**19
max_steps = 19073
warmup_steps = 700
learning_rate = 6e-4
min_lr = 6e-5
eval_tokens = 2**20
