"""The nine designs of docs/cache.md, for compare.py alone: python compare.py config/cache.py"""
design = ["mha", "gqa", "mqa", "mla", "tied", "share", "window", "gemma_like", "deepseek_v4_like"]
match = "params"
seeds = 6
seed = 1
decode_batch_size = 16
out_dir = "{out_dir}/cache"
