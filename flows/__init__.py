"""Prefect flows, the command line and the driver: decides what runs; never imports torch."""
