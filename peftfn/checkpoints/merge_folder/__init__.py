"""A model's folder with adapters merged in, from file to file.

`merging` is the whole of it, from the top: `tensor_names` says what the files' tensors are called in the model,
`planning` what is copied and what is made, `other_files` what goes with the weights, and `writing` writes one file,
which `flushing` brings to the disk meanwhile. `shards` reads and writes the format's bytes, and `unfinished` keeps the
output whole or not there.
"""
