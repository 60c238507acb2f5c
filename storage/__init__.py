"""Parquet, DuckDB and fsspec: knows rows, not models."""
