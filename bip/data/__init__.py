"""Image sets: what they are, how they are stored, in which order and in which view they are drawn.

`order` says which image stands at which position, `augment` which crop and flip it gets there;
both are pure functions. `stores`, `published` and `datasets` find the bytes, `staging` brings them
to a node's disk, `decode` turns them into pixels. `sources` and `dali` fetch images for requests,
`loaders` makes batches of them. `layouts`, `build` and `writer` make stores, `inspect` checks them,
`prepare` explains how to get ImageNet.
"""
