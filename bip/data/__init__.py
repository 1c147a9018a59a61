"""Image sets: what they are, how they are stored, in which order and view they are drawn.

`order` gives the image at each position, `augment` its crop and flip; both are pure functions.
`sets` describes the data sets, one file each. `stores` reads and writes what lies on disk, `splits`
finds it, `decode` turns bytes into pixels. `loaders` fetch the images of requests (`reader`), one
loader per file, and `batches` makes training batches of them. `options` carries the settings.
`tools` are the commands of `python -m bip data`.
"""
