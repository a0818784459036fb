"""Everything that is neither a program nor the decoder. Nothing here imports train.py, model.py or another program."""
