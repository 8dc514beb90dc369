"""What a run leaves: its journal, tables and predictions, on a disk or in a storage."""
