"""One worker process on a node: layers, KV cache, links; knows nothing of Prefect or DuckDB."""

import logging

# transformers imports torchao wherever it is installed, and has no switch for that (0.4 s and 10 MB,
# measured); at its import torchao then names each CUDA library that this node lacks.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
