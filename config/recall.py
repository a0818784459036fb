"""Two small layers for associative recall: first run python data/recall/prepare.py.

results/recall has what it reached with 8, 4, 2 and 1 key/value heads. In short trials with one
seed each, the model learned nothing with embed_std=0.02, the default, but did with larger values.
The effect of rope_theta is not established.
"""
out_dir = "{out_dir}/recall"
dataset = "recall"
block_size = 128
n_layer = 2
n_head = 8
n_embd = 64
rope_theta = 1e5
tie_embeddings = False
embed_std = 0.5
optimizer = "muon"
learning_rate = 1e-2
tokens_per_step = 2**13
max_steps = 1500
eval_interval = 100
