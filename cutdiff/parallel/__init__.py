"""One picture, or one set of pictures, over many processes, as torchrun starts them.

Read the files in this order; each imports only files above it, and nothing else of the package:

- `process`: which process this is, and the two errors that say that a run is over. It needs no torch.
- `lines`: lines for the user, which are whole. It needs no torch.
- `stopping`: SIGINT and SIGTERM, answered also while torch keeps the process waiting. It needs no torch.
- `watch`: ends this process when another one hangs, and names that one. It needs no torch.
- `ranks`: the processes that share the work of a picture, and how they exchange tensors and values.
- `launch`: all processes of a run: how they meet, and which group draws which picture.
"""
