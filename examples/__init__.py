"""The example job: a small model of the standard library, its prompts, and how both are made."""
