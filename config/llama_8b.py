"""The Llama 3.1 8B shape at a context of 8,192 tokens.

Bring your own text, prepared with a tokenizer of at most 128,256 ids.
Calculated by bench.py --mode=scale, not measured: 159.4 billion tokens, 6,481 GPU-hours on H100s.
DDP would need 202.4 GB on each GPU, which is too much. FSDP on 8 GPUs would need 82.9 GB, or
34.1 GB with activations recomputed, as set below.
"""
out_dir = "{out_dir}/llama_8b"
dataset = "text"
block_size = 8192
vocab_size = 128256
n_layer = 32
n_head = 32
n_kv_head = 8
n_embd = 4096
n_ff = 14336
rope_theta = 5e5
qk_norm = False
tie_embeddings = False
batch_size = 1
tokens_per_step = 2**22
max_steps = 38000
eval_interval = 1000
warmup_steps = 2000
learning_rate = 3e-4
min_lr = 3e-5
eval_tokens = 2**22
parallel = "fsdp"
recompute = True
