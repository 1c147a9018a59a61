"""Image sets: what they are, how they are stored, in which order and in which view they are drawn.

`order` says which image stands at which position, `augment` which crop and flip it gets there;
both are pure functions. `stores` and `datasets` find the bytes, `decode` turns them into pixels,
`loaders` hands out batches, `build` makes stores.
"""
