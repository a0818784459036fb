"""Two small layers that learn associative recall: first run python data/recall/prepare.py.

The embedding table starts at a standard deviation of 0.5. At the default of 0.02, the second layer
hardly sees the tokens beside the output of the first, and the loss stays on a plateau. Heads of
width 8 have four rotary frequencies; a larger rope_theta leaves more of them for matching values.
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
