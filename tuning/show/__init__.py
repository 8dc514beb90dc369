"""What people look at: the terminal, the summary, the report and its plots."""
