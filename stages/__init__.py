"""One worker process on a node: layers, KV cache, links; knows nothing of Prefect or DuckDB."""
