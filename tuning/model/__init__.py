"""The final model: its training, export, model card and test."""
