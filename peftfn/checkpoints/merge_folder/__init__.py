"""A model's folder with adapters merged in, from file to file.

`merging` is the whole of it, from the top: `naming` says what the files' tensors are called in the model, `planning`
what is copied and what is made, `beside` what goes with the weights, `writing` writes one file. `shards` is the
format's bytes, and `unfinished` keeps the output whole or not there.
"""
