"""Data sets: what they are, how they are stored, and in which order, crop and flip they are drawn.

`order` gives the image at each position, `augment` its crop and flip; both are pure functions.
`sets` describes the data sets, one per file. `stores` reads and writes files, `splits` finds them,
`decode` turns bytes into pixels. `loaders` fetch the images of requests (`reader`), one loader per
file, and `batches` makes training batches of them. `options` holds the settings. `tools` are the
commands of `python -m bip data`.
"""
