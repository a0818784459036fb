"""Local layers see the last 64 tokens, and every fourth layer all of them."""
window = 64
global_every = 4
out_dir = "{out_dir}/window"
