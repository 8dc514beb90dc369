"""What is wrong with the data: copies, leaks, label conflicts and shortcuts, found before any trial."""
