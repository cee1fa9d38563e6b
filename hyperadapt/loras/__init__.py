"""Ordinary LoRA folders: written from tasks, or read to be distilled."""
